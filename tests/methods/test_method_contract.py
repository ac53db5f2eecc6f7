"""What every merge method must keep. A new method is tested by an entry in `CASES`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shardmix.dtypes import FLOAT_DTYPES
from shardmix.errors import RecipeError
from shardmix.methods.base import MergeMethod, Params
from shardmix.methods.ops import CountingOps
from shardmix.methods.registry import METHODS, merge_method
from shardmix.methods.statistics import PIECE_NUM_ELEMENTS
from tests.support.combining import COMPILED, FLOATS, NAMES, raw_bytes, reduce
from tests.support.models import random_tensor
from tests.support.simulated_cuda import SimulatedCuda

NUM_ELEMENTS = 5003


@dataclass(frozen=True)
class Case:
    """A method, its parameters, and what it should give, in float64."""

    method: str
    params: Params
    oracle: Callable[[list[np.ndarray]], np.ndarray]


def weights(*values, **shared):
    return Params(shared, tuple({"weight": value} for value in values))


def slerp_oracle(t):
    def oracle(values):
        a, b = values
        unit_a, unit_b = (x / np.linalg.norm(x) for x in values)
        angle = math.acos(float(unit_a @ unit_b))
        return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)

    return oracle


CASES = [
    Case(
        "linear",
        weights(0.6, 0.3, -0.2, normalize=False),
        lambda v: 0.6 * v[0] + 0.3 * v[1] - 0.2 * v[2],
    ),
    Case("linear", weights(3.0, 1.0, normalize=True), lambda v: 0.75 * v[0] + 0.25 * v[1]),
    Case("linear", weights(0.0, 1.0, normalize=False), lambda v: v[0]),
    Case(
        "task_arithmetic",
        weights(0.7, -0.4, **{"normalize": False, "lambda": 0.5}),
        lambda v: v[0] + 0.35 * (v[1] - v[0]) - 0.2 * (v[2] - v[0]),
    ),
    Case(
        "task_arithmetic",
        weights(1.0, 3.0, **{"normalize": True, "lambda": 2.0}),
        lambda v: v[0] + 0.5 * (v[1] - v[0]) + 1.5 * (v[2] - v[0]),
    ),
    Case("task_arithmetic", weights(0.0, **{"normalize": False, "lambda": 1.0}), lambda v: v[0]),
    Case("slerp", Params({"t": 0.3}, ({},)), slerp_oracle(0.3)),
    Case("slerp", Params({"t": 0.0}, ({},)), lambda v: v[0]),
    Case("slerp", Params({"t": 1.0}, ({},)), lambda v: v[1]),
    Case("passthrough", Params({}, ({},)), lambda v: v[0]),
]
IDS = [f"{number}-{case.method}" for number, case in enumerate(CASES)]


def num_sources(case: Case, *, is_wide: bool = False) -> int:
    method = merge_method(case.method)
    models = method.contributors(case.params, is_wide=is_wide)
    return len(models) + method.needs(case.params).base_model


def factors_of(case: Case, sources: list[torch.Tensor]) -> tuple[float, ...]:
    """Return a case's factors for these sources, statistics gathered by pieces."""
    method = merge_method(case.method)
    is_wide = torch.float64 in {source.dtype for source in sources}
    models = method.contributors(case.params, is_wide=is_wide)
    return method.factors(case.params, models, statistics_of(method, case.params, sources))


def statistics_of(method: MergeMethod, params: Params, sources: list[torch.Tensor]):
    values = [source.double().numpy() for source in sources]
    found = []
    for statistic in method.needs(params).statistics:
        pieces = (
            [value[start : start + PIECE_NUM_ELEMENTS].copy() for value in values]
            for start in range(0, len(values[0]), PIECE_NUM_ELEMENTS)
        )
        found.append(statistic.total([statistic.of_piece(piece) for piece in pieces]))
    return found


def sources_for(case: Case, dtypes: list[torch.dtype], num_elements=NUM_ELEMENTS):
    count = num_sources(case, is_wide=torch.float64 in dtypes)
    return [
        random_tensor((num_elements,), dtypes[number % len(dtypes)], seed=number)
        for number in range(count)
    ]


def merged(case: Case, sources, out_dtype=torch.float32, **options):
    return reduce(sources, factors_of(case, sources), out_dtype, method=case.method, **options)


def test_every_method_has_a_case():
    assert {case.method for case in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_the_oracles(case, dtype):
    """Within rounding of float32 (or float64) of the formula."""
    sources = sources_for(case, [dtype])
    expected = case.oracle([source.double().numpy() for source in sources])
    error = np.abs(merged(case, sources, dtype).double().numpy() - expected).max()
    assert error <= 4 * torch.finfo(dtype).eps * np.abs(expected).max()


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_chunks_change_no_bit(case, out_dtype):
    sources = sources_for(case, FLOATS[:3])
    whole = raw_bytes(merged(case, sources, out_dtype, chunk_nbytes=1 << 20))
    for chunk_nbytes in (64, 1000, 4096):
        pieces = merged(case, sources, out_dtype, chunk_nbytes=chunk_nbytes)
        assert raw_bytes(pieces) == whole


@pytest.mark.parametrize("out_dtype", COMPILED, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_kernels_give_torchs_bits(case, out_dtype):
    """Values that are not finite included."""
    sources = sources_for(case, COMPILED)
    for number, source in enumerate(sources):
        source[number * 7 : number * 7 + 3] = torch.tensor([math.nan, math.inf, -math.inf])
    factors = factors_of(case, sources_for(case, COMPILED))
    options = {"method": case.method, "chunk_nbytes": 4096}
    by_torch = reduce(sources, factors, out_dtype, backend="cpu", **options)
    by_kernels = reduce(sources, factors, out_dtype, backend="llvm", **options)
    assert raw_bytes(by_kernels) == raw_bytes(by_torch)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gpu_gives_the_cpus_bits(case, seed):
    """On a simulated GPU, in whatever order its streams run."""
    out_dtype = FLOATS[seed % len(FLOATS)]
    sources = sources_for(case, FLOATS[seed:])
    expected = raw_bytes(merged(case, sources, out_dtype))
    on_gpu = merged(case, sources, out_dtype, backend=SimulatedCuda(seed), chunk_nbytes=4096)
    assert raw_bytes(on_gpu) == expected


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_declared_whole(name):
    """Each has a type, a sentence, and a default within its bounds or none."""
    method = METHODS[name]
    assert method.name == name
    assert method.summary
    assert method.reference.startswith("https://")
    names = [parameter.name for parameter in method.parameters]
    assert len(set(names)) == len(names)
    for parameter in method.parameters:
        assert parameter.type in (float, bool, str)
        assert parameter.description[0].islower() or parameter.description[0].isdigit()
        if parameter.default is not None:
            assert isinstance(parameter.default, parameter.type)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_factors_are_as_many_as_declared(case):
    method = merge_method(case.method)
    sources = sources_for(case, [torch.float32])
    factors = factors_of(case, sources)
    method.check(case.params)
    models = method.contributors(case.params, is_wide=False)
    declared = method.num_factors
    assert len(factors) == (len(models) if declared is None else declared)
    counted = CountingOps()
    method.combine(counted, [counted] * len(sources), [counted] * len(factors))
    assert counted.num_results <= 4 * len(sources)


def test_unknown_method_suggests_another():
    with pytest.raises(RecipeError, match="did you mean 'task_arithmetic'"):
        merge_method("task-arithmetic")


def test_float_dtypes_are_all_tried():
    assert {NAMES[dtype] for dtype in FLOATS} == FLOAT_DTYPES
