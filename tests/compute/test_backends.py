import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shardmix.compute.backend import Combiners
from shardmix.compute.keep_first import KeepFirst
from shardmix.compute.torch_cpu import TorchBackend
from shardmix.compute.torch_ops import accumulate, round_into
from shardmix.methods import keep_first
from shardmix.plan.chunk_size import chunk_num_elements
from shardmix.system.buffers import PAGE_NBYTES, address, offset_in_page
from tests.support.combining import (
    COMPILED,
    FLOATS,
    NAMES,
    at_offsets,
    backend_of,
    raw_bytes,
    reduce,
    segment_of,
)
from tests.support.models import random_tensor, round_once, weighted_sum
from tests.support.sampling import examples


def assert_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert raw_bytes(actual) == raw_bytes(expected)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtypes", [FLOATS[:3], FLOATS, [torch.bfloat16] * 3, [torch.float64] * 2])
def test_sum_rounds_by_the_contract(dtypes, out_dtype):
    """A sum is rounded as the contract says."""
    sources = [random_tensor((1003,), dtype, seed=i) for i, dtype in enumerate(dtypes)]
    weights = [0.5, 1 / 3, -0.123456789, 0.7][: len(sources)]
    assert_bits(reduce(sources, weights, out_dtype), weighted_sum(sources, weights, out_dtype))


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_chunk_size_keeps_the_bits(out_dtype):
    """The chunk size does not change the bits."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    sources = [random_tensor((1009,), dtype, seed=i) for i, dtype in enumerate(dtypes)]
    sources[1][500] = math.nan
    sources[2][77] = math.inf
    sources[0][77] = -math.inf
    weights = [0.4, 0.35, 0.25]
    whole = reduce(sources, weights, out_dtype)
    for chunk_nbytes in (8, 24, 100, 1000, 4036, 1 << 20):
        assert_bits(reduce(sources, weights, out_dtype, chunk_nbytes=chunk_nbytes), whole)


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_every_nan_has_one_bit_pattern(out_dtype):
    patterns = [0x7FC00001, 0xFFC12345, 0x7F800001, 0xFF800001]
    nans = torch.from_numpy(np.array(patterns * 9 + [0x7FC00000], dtype=np.uint32).view(np.float32))
    result = reduce([nans, torch.ones(37)], [0.5, 0.5], out_dtype)
    assert_bits(result, torch.full((37,), math.nan, dtype=out_dtype))


def test_infinities_and_signed_zeros_stay():
    values = torch.tensor([math.inf, -math.inf, -0.0, 0.0, 3.4e38])
    result = reduce([values, values], [0.5, 0.5], torch.bfloat16)
    assert_bits(result, torch.tensor([math.inf, -math.inf, -0.0, 0.0, math.inf]).bfloat16())


def test_subnormal_values_are_not_flushed():
    values = torch.tensor([1e-45, -1e-45, 1e-40, 6e-39])
    assert_bits(
        reduce([values, values], [0.5, 0.25], torch.float32),
        weighted_sum([values, values], [0.5, 0.25], torch.float32),
    )


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_float64_is_rounded_to_16_bits_once(out_dtype):
    """By way of float32, half a unit and a little would be rounded twice, and downwards."""
    unit = 2.0**-10 if out_dtype == torch.float16 else 2.0**-7
    halfway = np.array([1 + unit / 2 + 2.0**-40, 1 + unit / 2 - 2.0**-40, 1 + unit / 2, -1.75])
    source = torch.from_numpy(np.concatenate([halfway, -halfway]))
    result = reduce([source, torch.zeros(8, dtype=torch.float64)], [1.0, 0.0], out_dtype)
    assert result[0].item() == 1 + unit
    assert result[1].item() == 1
    assert_bits(result, round_once(source.numpy(), out_dtype))


@settings(max_examples=examples(200), deadline=None)
@given(
    values=hnp.arrays(np.float64, 16, elements=st.floats(width=64, allow_nan=False)),
    out_dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_float64_rounds_to_16_bits_as_numpy(values, out_dtype):
    """Any float64 is rounded to 16 bits as numpy does."""
    source = torch.from_numpy(values)
    result = reduce([source, torch.zeros_like(source)], [1.0, 0.0], out_dtype)
    with np.errstate(over="ignore", under="ignore"):
        expected = round_once(values, out_dtype)
    # x · 1 + 0 · 0 turns -0.0 into 0.0; that is addition's doing.
    assert_bits(result + 0.0, expected + 0.0)


@settings(max_examples=examples(60), deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=2, max_size=6),
    out_dtype=st.sampled_from(FLOATS),
    num_elements=st.integers(1, 3000),
    chunk_nbytes=st.sampled_from([8, 64, 1000, 4096, 1 << 20]),
    seed=st.integers(0, 2**20),
)
def test_mixed_dtypes_agree_with_the_oracle(dtypes, out_dtype, num_elements, chunk_nbytes, seed):
    """Any mix of dtypes agrees with the oracle."""
    sources = [
        random_tensor((num_elements,), dtype, seed=seed + i) for i, dtype in enumerate(dtypes)
    ]
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(sources))).tolist()
    with np.errstate(over="ignore"):
        expected = weighted_sum(sources, weights, out_dtype)
    assert_bits(reduce(sources, weights, out_dtype, chunk_nbytes=chunk_nbytes), expected)


def special_values():
    """Values where arithmetic and rounding are delicate, in every pairing of two sources."""
    patterns = np.array(
        [
            *(0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000, 0xBF800001),
            *(0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF7F8000, 0x7F7F7FFF),
            *(0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F800001, 0x7FFFFFFF, 0x33FFFFFF),
        ],
        dtype=np.uint32,
    ).view(np.float32)
    first, second = np.meshgrid(patterns, patterns)
    return torch.from_numpy(first.ravel().copy()), torch.from_numpy(second.ravel().copy())


@pytest.mark.parametrize("out_dtype", COMPILED)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -1.0], [1 / 3, 2 / 3], [1e30, 1e-30]])
def test_special_values_have_torchs_bits(weights, out_dtype):
    """Compiled sums have torch's bits for special values."""
    single = special_values()
    for sources in (single, [values.bfloat16() for values in single]):
        compiled = reduce(sources, weights, out_dtype, backend="llvm")
        assert_bits(compiled, reduce(sources, weights, out_dtype))


@settings(max_examples=examples(40), deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(COMPILED), min_size=2, max_size=5),
    out_dtype=st.sampled_from(COMPILED),
    num_elements=st.integers(1, 3000),
    chunk_nbytes=st.sampled_from([4, 64, 1000, 1 << 20]),
    seed=st.integers(0, 2**20),
)
def test_compiled_sums_agree_with_the_oracle(dtypes, out_dtype, num_elements, chunk_nbytes, seed):
    sources = [
        random_tensor((num_elements,), dtype, seed=seed + i) for i, dtype in enumerate(dtypes)
    ]
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(sources))).tolist()
    result = reduce(sources, weights, out_dtype, chunk_nbytes=chunk_nbytes, backend="llvm")
    assert_bits(result, weighted_sum(sources, weights, out_dtype))


def test_bfloat16_converts_as_torch_does():
    """Every bfloat16 is widened and rounded as torch does."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    zeros = torch.zeros_like(every)
    for weights in ([1.0, 0.0], [1 / 3, 1.0]):
        compiled = reduce([every, zeros], weights, torch.bfloat16, backend="llvm")
        assert_bits(compiled, reduce([every, zeros], weights, torch.bfloat16))


@pytest.mark.parametrize("backend", ["cpu", "llvm"])
def test_no_backend_fuses_products_and_sums(backend):
    """A fused multiply-add gives 2**-46 here; two roundings give 0."""
    first, second = torch.full((64,), 1.0), torch.full((64,), 1.0 + 2**-23)
    weights = [-1.0 - 2**-22, 1.0 + 2**-23]
    assert not reduce(
        [first, second, first * 0], [*weights, 1.0], torch.float32, backend=backend
    ).any()
    assert not reduce(
        [first * 0, first, second], [1.0, *weights], torch.float32, backend=backend
    ).any()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_result_is_within_half_an_ulp(out_dtype):
    """The result is within half an ulp of the exact sum, but for ties."""
    sources = [random_tensor((20_000,), out_dtype, seed=i) for i in range(3)]
    weights = [0.5, 0.3, 0.2]
    result = reduce(sources, weights, out_dtype).double()
    exact = sum(w * s.double() for w, s in zip(weights, sources, strict=True))
    normal = result.abs() > 2.0**-14
    bits = 11 if out_dtype == torch.float16 else 8
    ulp = torch.ldexp(torch.ones_like(result), torch.frexp(exact)[1] - bits)
    assert ((result - exact).abs() / ulp)[normal].max() < 0.51


def read_by_kernel(path, sources, weights, out_dtype, *, gap, cut=0):
    """Have a kernel read sources from a file, where they lie `gap` bytes apart, and sum them."""
    num_elements = sources[0].numel()
    offsets, content = [], bytearray()
    for source in sources:
        content += bytes(gap)
        offsets.append(len(content))
        content += raw_bytes(source)
    path.write_bytes(content[: len(content) - cut])
    segment = segment_of([NAMES[s.dtype] for s in sources], NAMES[out_dtype], weights, num_elements)
    segment = at_offsets(segment, offsets, out_offset=gap)
    nbytes = 8 * num_elements  # for a chunk of all
    (combiner,) = backend_of("llvm", segment).make_combiners(chunk_nbytes=nbytes)
    combiner.begin(segment, 0, num_elements)
    with path.open("rb") as file:
        return combiner.read([file.fileno()] * len(sources))


@pytest.mark.parametrize("num_elements", [1, 63, 64, 4096, 300_000, 300_007])
@pytest.mark.parametrize("gap", [0, 8, 13, 4090])
def test_a_kernel_reads_what_it_sums(tmp_path, gap, num_elements):
    dtypes = COMPILED if gap else [torch.bfloat16] * 3
    sources = [random_tensor((num_elements,), dtype, seed=i) for i, dtype in enumerate(dtypes)]
    weights = [0.5, 1 / 3, -0.123456789]
    for out_dtype in COMPILED:
        done = read_by_kernel(tmp_path / "file", sources, weights, out_dtype, gap=gap)
        data, seconds = done
        assert bytes(data) == raw_bytes(weighted_sum(sources, weights, out_dtype))
        assert 0 < seconds < 60


def test_kernel_leaves_what_it_cannot_read(tmp_path):
    """A kernel leaves to others what it cannot read."""
    sources = [random_tensor((200_000,), torch.bfloat16, seed=seed) for seed in (0, 1)]
    path, weights = tmp_path / "file", [0.5, 0.5]
    assert read_by_kernel(path, sources, weights, torch.bfloat16, gap=8) is not None
    assert read_by_kernel(path, sources, weights, torch.bfloat16, gap=8, cut=1) is None


def agree(first, *others):
    names = {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.uint8: "U8"}
    tensors = [first, *others]
    dtypes = [names[t.dtype] for t in tensors]
    segment = segment_of(dtypes, dtypes[0], [0.5] * len(tensors), first.numel(), keep_first.NAME)
    combiner = KeepFirst(chunk_nbytes=1 << 12)
    combiner.begin(segment, 0, segment.num_elements)
    for source, tensor in enumerate(tensors):
        staging = combiner.staging(source)
        staging[:] = raw_bytes(tensor)
        combiner.add(source, staging)
    return torch.frombuffer(bytearray(combiner.finish()), dtype=first.dtype), combiner.disagreeing


def test_integers_that_agree_are_kept():
    values = torch.arange(100)
    kept, disagreeing = agree(values, values.clone(), values.int())
    assert torch.equal(kept, values)
    assert disagreeing == frozenset()


def test_differing_integers_keep_the_first():
    """Integers that disagree are the first model's, and reported."""
    values = torch.arange(100)
    other = values.clone()
    other[-1] = 7
    kept, disagreeing = agree(values, values, other)
    assert torch.equal(kept, values)
    assert disagreeing == {2}


def test_booleans_are_compared_as_they_are():
    values = torch.tensor([True, False, True])
    assert agree(values, ~values)[1] == {1}
    assert agree(values, values)[1] == frozenset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("dtypes", [FLOATS[:3], FLOATS, [torch.bfloat16] * 3])
def test_gpu_gives_the_cpus_bits(dtypes, out_dtype):
    """A GPU gives the same bits as the CPU."""
    sources = [random_tensor((100_003,), dtype, seed=i) for i, dtype in enumerate(dtypes)]
    sources[0][5000] = math.nan
    weights = [0.5, 0.3, 0.2, 0.1][: len(sources)]
    for chunk_nbytes in (1 << 12, 1 << 20):
        on_gpu = reduce(sources, weights, out_dtype, chunk_nbytes=chunk_nbytes, backend="cuda")
        assert_bits(on_gpu, reduce(sources, weights, out_dtype))


class Recorded:
    """In the place of a tensor: tells by what it was multiplied."""

    def __init__(self, dtype):
        self.dtype = dtype

    def copy_(self, values):
        self.factors = []

    def mul_(self, factor):
        self.factors.append(factor)

    def add_(self, values):
        pass


@pytest.mark.parametrize("is_first", [True, False])
def test_weight_rounds_to_the_sums_dtype(is_first):
    """A weight is rounded to the sums dtype.

    By ourselves: how a library rounds a number that it multiplies by is its own affair.
    """
    for dtype, expected in [(torch.float32, float(np.float32(0.1))), (torch.float64, 0.1)]:
        accumulator, scratch = Recorded(dtype), Recorded(dtype)
        accumulate(accumulator, scratch, None, 0.1, first=is_first)
        assert (accumulator if is_first else scratch).factors == [expected]


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
def test_a_float64_nan_stays_one_in_16_bits(out_dtype):
    """Whatever its bits are: rounding to odd takes some of them apart."""
    patterns = [0x7FF0000000000001, 0xFFF0000000000001, 0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF]
    patterns += [0xFFFFFFFFFFFFFFFF, 0x7FF00000FFFFFFFF, 0xFFF7FFFFFFFFFFFF]
    source = torch.from_numpy(np.array(patterns, dtype=np.uint64).view(np.float64))
    out = torch.zeros(len(patterns), dtype=out_dtype)
    round_into(out, source.clone(), torch.zeros_like(source))
    assert out.isnan().all()
    result = reduce([source], [1.0], out_dtype)
    assert_bits(result, torch.full_like(out, math.nan))


@pytest.mark.parametrize("chunk_nbytes", [1 << 16, 1 << 20, 2 << 20, 3_000_000])
@pytest.mark.parametrize("out_dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(
    "dtypes", [["BF16"], ["F64"], ["F32"] * 2, ["BF16"] * 9, ["BF16", "F64"], ["F16"] * 40]
)
def test_a_chunk_fits_its_buffers(dtypes, out_dtype, chunk_nbytes):
    """No part is larger than a buffer, and all parts together not larger than the four."""
    segment = segment_of(dtypes, out_dtype, [1.0] * len(dtypes), 10**9)
    count = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
    widths = [int(dtype.removeprefix("B")[1:]) // 8 for dtype in (*dtypes, out_dtype)]
    assert count * max(*widths, 4) <= chunk_nbytes
    assert count * (sum(widths) + 4) <= 4 * chunk_nbytes
    assert count >= chunk_nbytes // (3 * max(*widths, 4)) or len(dtypes) > 8


@pytest.mark.parametrize("dtype", ["BOOL", "I8", "I16", "I32", "I64"])
def test_chunk_of_integers_fits_its_buffers(dtype):
    """A chunk of integers fits its buffers. They are smaller, and a chunk may be smaller still."""
    width = 1 if dtype == "BOOL" else int(dtype[1:]) // 8
    for other in (dtype, "I64"):
        segment = segment_of([dtype, other], dtype, [0.5, 0.5], 10**9, keep_first.NAME)
        widest = 8 if other == "I64" else width
        for chunk_nbytes, buffer_nbytes in [(1 << 20, 1 << 16), (1 << 12, 1 << 12), (4, 8)]:
            count = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
            assert 1 <= count <= max(1, buffer_nbytes // widest)


def begun(combiner, segment, start, sources):
    """Do one chunk of a segment from whole sources; return its output's bytes."""
    num_elements = len(sources[0])
    combiner.begin(segment, start, num_elements)
    for number, source in enumerate(sources):
        staging = combiner.staging(number)
        assert len(staging) == source.nbytes
        staging[:] = raw_bytes(source)
        combiner.add(number, staging)
    data = bytes(combiner.finish())
    combiner.wait()
    return data


@pytest.mark.parametrize("backend", ["cpu", "llvm"])
def test_a_combiner_does_chunk_after_chunk(backend):
    """A shorter one at the same place in a page, and one of another segment of the same length."""
    first, second = random_tensor((4096,), seed=1), random_tensor((4096,), seed=2)
    segment = segment_of(["F32"] * 2, "F32", [0.5, 0.5], 4106)
    (combiner,) = backend_of(backend, segment).make_combiners(chunk_nbytes=1 << 16)
    for start, stop in [(0, 4096), (4096, 4106), (0, 4096)]:
        parts = [source[: stop - start] for source in (first, second)]
        expected = weighted_sum(parts, [0.5, 0.5], torch.float32)
        assert begun(combiner, segment, start, parts) == raw_bytes(expected)
    other = dataclasses.replace(segment, factors=(2.0, -1.0))
    expected = weighted_sum([first, second], [2.0, -1.0], torch.float32)
    assert begun(combiner, other, 0, [first, second]) == raw_bytes(expected)


@pytest.mark.parametrize("backend", ["cpu", "llvm"])
def test_buffers_lie_half_a_page_off(backend):
    """Buffers lie half a page from their files.

    Wherever in the segment a chunk begins, for sources and for the output.
    """
    sources = [torch.ones(100).bfloat16()] * 2
    segment = segment_of(["BF16"] * 2, "BF16", [0.5, 0.5], 10_000)
    segment = at_offsets(segment, (130, 1000), out_offset=264)
    (combiner,) = backend_of(backend, segment).make_combiners(chunk_nbytes=1 << 16)
    for start in (0, 100, 1077, 4096):
        combiner.begin(segment, start, 100)
        for number, source in enumerate(sources):
            staging = combiner.staging(number)
            expected = offset_in_page(segment.sources[number].offset + 2 * start)
            assert address(staging) % PAGE_NBYTES == expected
            staging[:] = raw_bytes(source)
            combiner.add(number, staging)
        expected = offset_in_page(segment.out_offset + 2 * start)
        assert address(combiner.finish()) % PAGE_NBYTES == expected


def test_chunks_lie_alike_within_pages():
    """All chunks of a segment lie alike within pages.

    They have as many elements as pages have bytes, or at least whole vectors.
    """
    segment = segment_of(["BF16"] * 3, "BF16", [0.5] * 3, 10**9)
    assert chunk_num_elements(segment, chunk_nbytes=1_000_000) % PAGE_NBYTES == 0
    assert chunk_num_elements(segment, chunk_nbytes=10_000) % 64 == 0


def test_integers_agree_chunk_by_chunk():
    """What differed in one chunk is not said of the next."""
    segment = segment_of(["I64"] * 2, "I64", [0.5, 0.5], 8, keep_first.NAME)
    combiner = KeepFirst(chunk_nbytes=1 << 12)
    values = torch.arange(4)
    for other, differing in [(values + 1, {1}), (values, set())]:
        begun(combiner, segment, 0, [values, other])
        assert combiner.disagreeing == differing


def test_integers_take_small_buffers():
    """They are not in the projection by themselves."""
    (linear,) = TorchBackend("cpu").make_combiners(chunk_nbytes=1 << 12)
    tracemalloc.start()
    try:
        combiner = Combiners(linear, chunk_nbytes=16 << 20)[keep_first.NAME]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    segment = segment_of(["I64"], "I64", [1.0], 10**6, keep_first.NAME)
    combiner.begin(segment, 0, chunk_num_elements(segment, chunk_nbytes=16 << 20))
    assert len(combiner.staging(0)) == 1 << 16
    assert 1 << 16 < peak < 1 << 18


def test_merge_restores_torchs_threads():
    """Torch's threads are as before a merge."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        backend = TorchBackend("cpu")
        with backend.running():
            backend.make_combiners(chunk_nbytes=1 << 12)
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
