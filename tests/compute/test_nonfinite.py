import itertools
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmix.compute.backend import NonfiniteCounts
from shardmix.compute.keep_first import KeepFirst
from shardmix.methods import keep_first
from shardmix.plan.memory_budget import VRAM_BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.units import MIB
from tests.support.combining import (
    COMPILED,
    FLOATS,
    NAMES,
    backend_of,
    combined_chunks,
    raw_bytes,
    segment_of,
)
from tests.support.models import random_tensor
from tests.support.sampling import every_nth, examples, sample

# The least magnitude that rounding to nearest even makes infinite: half a unit above the largest.
OVERFLOW = {
    torch.float16: math.ldexp(2 - 2.0**-11, 15),
    torch.bfloat16: math.ldexp(2 - 2.0**-8, 127),
    torch.float32: math.ldexp(2 - 2.0**-24, 127),
    torch.float64: math.inf,
}
WEIGHTS = ((1.0, 0.0), (0.5, 0.5), (1.0, -1.0), (1.0, 1.0), (0.3, 1e30))
BACKENDS = [("cpu", dtype) for dtype in FLOATS] + [("llvm", dtype) for dtype in COMPILED]


def sums_of(sources, weights):
    """Return the sums before they are rounded, by numpy, as float64."""
    wide = np.float64 if any(source.dtype == torch.float64 for source in sources) else np.float32
    total = None
    with np.errstate(over="ignore", invalid="ignore"):
        for source, weight in zip(sources, weights, strict=True):
            product = wide(weight) * source.double().numpy().astype(wide)
            total = product if total is None else total + product
    return total.astype(np.float64)


def expected_counts(sums, out_dtype):
    overflowed = np.isfinite(sums) & (np.abs(sums) >= OVERFLOW[out_dtype])
    return NonfiniteCounts(
        num_nan=int(np.isnan(sums).sum()),
        num_inf=int((np.isinf(sums) | overflowed).sum()),
        num_overflowed=int(overflowed.sum()),
    )


def assert_counted(sources, weights, out_dtype, **options):
    """Hold what is said of every chunk, and of parts of it, against numpy; return all counts."""
    sums = sums_of(sources, weights)
    for start, combiner, chunk in combined_chunks(sources, weights, out_dtype, **options):
        num_elements = len(chunk) // out_dtype.itemsize
        whole = expected_counts(sums[start : start + num_elements], out_dtype)
        assert combiner.is_finite == (whole.num_nan + whole.num_inf == 0)
        cuts = sorted({0, num_elements // 3, num_elements // 2, num_elements})
        for first, last in itertools.combinations(cuts, 2):
            expected = expected_counts(sums[start + first : start + last], out_dtype)
            assert combiner.count_nonfinite(first, last) == expected
    return expected_counts(sums, out_dtype)


def delicate_values(dtype):
    """Values at which something becomes infinite, and their neighbours, as far as `dtype` goes."""
    edges = np.array([*OVERFLOW.values(), *(torch.finfo(d).max for d in FLOATS)])
    with np.errstate(over="ignore"):
        singles = edges.astype(np.float32)
    below = [np.nextafter(edges, 0), np.nextafter(singles, np.float32(0))]
    values = np.concatenate([edges, *below, [0, 1, 1e-45, math.nan, math.inf]])
    return torch.from_numpy(np.concatenate([values, -values])).to(dtype)


@pytest.mark.parametrize(
    ("kernel", "weights"), sample("kernels that count", itertools.product(BACKENDS, WEIGHTS), 14)
)
def test_every_dtype_counts_nan_inf_overflow(kernel, weights):
    """NaN, infinities and overflows are counted for every dtype."""
    backend, out_dtype = kernel
    for dtype in COMPILED if backend == "llvm" else FLOATS:
        pairs = torch.cartesian_prod(delicate_values(dtype), delicate_values(dtype))
        sources = [pairs[:, 0].contiguous(), pairs[:, 1].contiguous()]
        for chunk_nbytes in (8, 1000, MIB):
            few = slice(0, 400 if chunk_nbytes == 8 else None)
            counts = assert_counted(
                [source[few] for source in sources],
                weights,
                out_dtype,
                chunk_nbytes=chunk_nbytes,
                backend=backend,
            )
            assert counts.num_nan


@pytest.mark.parametrize(("backend", "out_dtype"), BACKENDS)
def test_one_element_decides_anywhere(backend, out_dtype):
    """One element decides, wherever it stands.

    In a vector or in the rest of a loop, in any lane; and the largest finite value does not.
    """
    num_elements = 203
    largest = torch.finfo(min(out_dtype, torch.float32, key=lambda d: torch.finfo(d).max)).max
    for value in (math.nan, math.inf, -math.inf, largest, -largest):
        for place in every_nth(range(num_elements), 15):
            source = random_tensor((num_elements,), torch.float32, seed=place) * 1e-3
            source[place] = value
            sources = [source, torch.zeros(num_elements), torch.zeros(num_elements)]
            ((_, combiner, _),) = combined_chunks(
                sources, [1.0, 1.0, 1.0], out_dtype, backend=backend
            )
            assert combiner.is_finite == math.isfinite(value)
            counts = combiner.count_nonfinite(place, place + 1)
            assert counts == NonfiniteCounts(int(math.isnan(value)), int(math.isinf(value)), 0)


def test_float16_overflow_is_told_apart():
    """What rounding to float16 makes infinite is told apart.

    65520 is the least that overflows; an infinity that a model already has did not.
    """
    source = torch.tensor([65504.0, 65519.0, 65520.0, -70000.0, math.inf, -math.inf, math.nan, 1.0])
    ((_, combiner, _),) = combined_chunks([source, source], [0.5, 0.5], torch.float16)
    assert not combiner.is_finite
    assert combiner.count_nonfinite(0, 8) == NonfiniteCounts(num_nan=1, num_inf=4, num_overflowed=2)
    assert combiner.count_nonfinite(0, 2) == NonfiniteCounts(0, 0, 0)


@pytest.mark.parametrize("backend", ["cpu", "llvm"])
def test_unrounded_overflow_is_an_infinity(backend):
    """A sum that overflows before it is rounded is an infinity."""
    source = torch.full((9,), 3e38)
    for out_dtype in COMPILED:
        ((_, combiner, _),) = combined_chunks([source] * 2, [1, 1], out_dtype, backend=backend)
        assert combiner.count_nonfinite(0, 9) == NonfiniteCounts(0, num_inf=9, num_overflowed=0)


@pytest.mark.parametrize(("backend", "out_dtype"), BACKENDS)
def test_large_values_are_finite(backend, out_dtype):
    """Large values are finite though their total is not.

    To add a chunk up is a quick look at it, and no more.
    """
    dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    largest = torch.full((4001,), torch.finfo(out_dtype).max, dtype=dtype)
    alternating = largest * torch.tensor([1.0, -1.0]).repeat(2001)[:4001]
    for source in (largest, -largest, alternating):
        chunks = combined_chunks([source, source], [0.5, 0.5], out_dtype, backend=backend)
        assert all(combiner.is_finite for _, combiner, _ in chunks)


@pytest.mark.parametrize("backend", ["cpu", "llvm"])
def test_a_chunk_is_judged_by_itself(backend):
    """One combiner goes through finite chunks and others in turn."""
    source = torch.zeros(64 * 5)
    source[64] = math.nan
    source[64 * 3 + 63] = -math.inf
    chunks = combined_chunks(
        [source, source], [0.5, 0.5], torch.float32, chunk_nbytes=64 * 4, backend=backend
    )
    assert [combiner.is_finite for _, combiner, _ in chunks] == [True, False, True, False, True]


@settings(max_examples=examples(100), deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=2, max_size=4),
    out_dtype=st.sampled_from(FLOATS),
    num_elements=st.integers(1, 500),
    num_delicate=st.integers(0, 20),
    chunk_nbytes=st.sampled_from([8, 64, 1000, 1 << 16]),
    seed=st.integers(0, 2**20),
)
def test_chunks_are_counted_as_by_numpy(
    dtypes, out_dtype, num_elements, num_delicate, chunk_nbytes, seed
):
    """Any chunk of any dtypes is counted as numpy counts."""
    generator = np.random.default_rng(seed)
    sources = []
    for number, dtype in enumerate(dtypes):
        source = random_tensor((num_elements,), dtype, seed=seed + number)
        places = torch.from_numpy(generator.integers(num_elements, size=num_delicate))
        values = delicate_values(dtype)
        source[places] = values[torch.from_numpy(generator.integers(len(values), size=len(places)))]
        sources.append(source)
    weights = generator.dirichlet(np.ones(len(sources))).tolist()
    for backend in ("cpu", "llvm") if {*dtypes, out_dtype} <= {*COMPILED} else ("cpu",):
        assert_counted(sources, weights, out_dtype, chunk_nbytes=chunk_nbytes, backend=backend)


@pytest.mark.parametrize(("backend", "out_dtype"), BACKENDS)
def test_counting_takes_less_than_a_mebibyte(backend, out_dtype):
    """Counting takes less than a mebibyte, however long the chunk.

    And so does what a compiled sum does anew where it is not finite.
    """
    num_elements = 1 << 20
    dtype = torch.float32 if backend == "llvm" else torch.float64
    source = torch.full((num_elements,), math.inf, dtype=dtype)
    source[::2] = torch.finfo(dtype).max
    segment = segment_of([NAMES[dtype]] * 2, NAMES[out_dtype], [0.5, 0.5], num_elements)
    (combiner,) = backend_of(backend, segment).make_combiners(chunk_nbytes=source.nbytes)
    raw = memoryview(bytearray(raw_bytes(source)))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        combiner.begin(segment, 0, num_elements)
        combiner.add(0, raw)
        combiner.add(1, raw)
        combiner.finish()
        counts = combiner.count_nonfinite(0, num_elements)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert counts == expected_counts(sums_of([source] * 2, [0.5, 0.5]), out_dtype)
    assert counts.num_inf >= num_elements // 2
    assert 1 << 16 < peak - before < MIB


def test_integers_are_always_finite():
    """Integers are finite, whatever their bits."""
    infinity = memoryview(np.full(10, 0x7F800000, dtype=np.int32).tobytes())
    combiner = KeepFirst(chunk_nbytes=1 << 12)
    combiner.begin(segment_of(["I32"] * 2, "I32", [0.5, 0.5], 10, keep_first.NAME), 0, 10)
    for source in range(2):
        combiner.add(source, infinity)
    combiner.finish()
    assert combiner.is_finite
    assert combiner.count_nonfinite(0, 10) == NonfiniteCounts(0, 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gpu_counts_as_numpy_does(dtype, out_dtype):
    pairs = torch.cartesian_prod(delicate_values(dtype), delicate_values(dtype))
    ordinary = random_tensor((200_003,), dtype)
    sources = [torch.cat([pairs[:, side], ordinary * 1e-3]) for side in range(2)]
    for weights in ([0.5, 0.5], [1.0, -1.0], [0.3, 1e30]):
        for chunk_nbytes in (8 << 10, MIB):
            assert_counted(sources, weights, out_dtype, chunk_nbytes=chunk_nbytes, backend="cuda")
    few = [source[:9] for source in sources]  # the extremes take more than such a chunk
    assert_counted(few, [0.5, 0.5], out_dtype, chunk_nbytes=8, backend="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_look_keeps_the_planned_memory():
    """A look for NaN takes no memory of the GPU beyond what is planned.

    Its buffers, and 2 MiB that temporaries of a stream may have.
    """
    source = torch.zeros(16 * MIB // 4)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    planned = VRAM_BUFFERS_PER_WORKER * 4 * MIB + 2 * MIB
    for _ in combined_chunks(
        [source, source], [0.5, 0.5], torch.float32, chunk_nbytes=4 * MIB, backend="cuda"
    ):
        assert torch.cuda.max_memory_reserved() - before <= planned


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((2, 0, 0), "2 NaN in the merged tensor"),
        ((0, 3, 0), "3 Inf in the merged tensor"),
        ((0, 3, 3), "3 values too large for F16, made Inf by rounding"),
        ((1, 5, 3), "1 NaN and 2 Inf and 3 values too large for F16, made Inf by rounding"),
    ],
)
def test_rounded_infinities_are_told_apart(counts, said):
    """Infinities by rounding are told apart.

    They are counted once: as values that were too large, not as infinities as well.
    """
    plan = SimpleNamespace(tensor_dtype=lambda name: "F16")
    told = MergePlan.nonfinite_finding(plan, "w", counts)
    assert told.startswith(said)
    assert told.count("Inf") == (counts[1] > counts[2]) + (counts[2] > 0)
