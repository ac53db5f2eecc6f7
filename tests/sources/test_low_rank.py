"""The arithmetic of adapters: one rounding a product and a sum, the same bits in every way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmix.formats.stored_floats import stored, widened
from shardmix.sources import low_rank_kernel
from shardmix.sources.low_rank import add_product
from tests.support.adapters import applied
from tests.support.models import random_tensor
from tests.support.sampling import examples

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def raw(tensor, dtype):
    return stored(memoryview(tensor.view(torch.uint8).numpy().reshape(-1)), dtype)


@settings(max_examples=examples(20), deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(1, 21),
    columns=st.integers(1, 70),
    rank=st.integers(1, 9),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 99),
)
def test_kernel_has_the_same_bits(dtype, rows, columns, rank, bounds, seed):
    """Of any elements that follow one another, wherever in a row they begin and end."""
    weight = random_tensor((rows, columns), DTYPES[dtype], seed=seed)
    a, b = random_tensor((rank, columns), seed=seed + 1), random_tensor((rows, rank), seed=seed + 2)
    expected = applied(weight, a, b, 0.3).numpy().reshape(-1)
    by_numpy = np.empty((rows, columns), np.float32)
    values = raw(weight, dtype)
    add_product(dtype, values.reshape(rows, columns), by_numpy, b.numpy(), a.numpy(), 0.3)
    assert by_numpy.tobytes() == expected.tobytes()
    start, stop = sorted(int(bound * rows * columns) for bound in bounds)
    kernel = low_rank_kernel.kernel(dtype)
    if kernel is None or start == stop:
        return
    row, column = divmod(start, columns)
    out = np.full(stop - start, np.nan, np.float32)
    kernel.add_range(values[start:stop], out, column, b.numpy()[row:], a.numpy(), 0.3)
    assert out.tobytes() == expected[start:stop].tobytes()


def test_float64_has_no_kernel():
    assert low_rank_kernel.kernel("F64") is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_widening_is_exact(dtype):
    tensor = random_tensor((3, 8), {**DTYPES, "F64": torch.float64}[dtype], seed=5)
    tensor[0, 0], tensor[0, 1] = float("inf"), float("nan")
    wide = widened(raw(tensor, dtype).reshape(3, 8)[:, ::2], dtype, np.float64)
    assert torch.equal(torch.from_numpy(wide).nan_to_num(), tensor[:, ::2].double().nan_to_num())
