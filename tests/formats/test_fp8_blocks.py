"""Codes and scales of FP8 blocks are those of torch's casts, bit for bit."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmix.formats.fp8_blocks import Fp8Blocks
from shardmix.formats.fp8_kernel import encoding_kernel
from shardmix.formats.matrices import Bands
from shardmix.formats.output_coding import PIECE_NUM_ELEMENTS, Quantiser
from shardmix.formats.small_floats import encode_e4m3
from tests.support.fp8_reference import quantised
from tests.support.sampling import examples

HAS_KERNELS = importlib.util.find_spec("llvmlite") is not None


def coded(values, *, is_compiled=False):
    """Return codes and scales of a tensor of matrices, band by band."""
    array = values.numpy().reshape(-1).copy()
    *leading, rows, columns = values.shape
    bands = Bands(int(np.prod(leading, dtype=int)), rows, columns, Fp8Blocks.block)
    coding = Fp8Blocks()
    quantiser = Quantiser(coding, is_compiled=is_compiled)
    all_scales, codes = [], []
    is_finite = bool(np.isfinite(array).all())
    for band in range(bands.num_bands):
        its = bands.elements(band)
        assert bands.of(its.start) == bands.of(its.stop - 1) == band
        part = array[its.start : its.stop]
        largest = np.zeros(bands.num_scales, np.float32)
        # In two pieces, which divide a row.
        middle = len(its) // 3
        for start, stop in ((0, middle), (middle, len(its))):
            quantiser.find_largest(
                bands, its.start + start, part[start:stop], largest, is_finite=is_finite
            )
        all_scales.append(coding.scales(largest))
        # In the memory of the values, as a merge does it.
        out = part.view(np.uint8)[: len(its)]
        quantiser.encode(bands, its.start, part, all_scales[-1], out)
        codes.append(out.copy())
    grid = (*leading, bands.in_matrix, bands.num_scales)
    return np.concatenate(codes).reshape(values.shape), np.stack(all_scales).reshape(grid)


def check(values):
    codes, scales = coded(values)
    if HAS_KERNELS:
        by_kernel, same = coded(values, is_compiled=True)
        assert (by_kernel == codes).all()
        assert (same == scales).all()
    expected, expected_scales = quantised(values)
    assert (scales.view(np.uint32) == expected_scales.numpy().view(np.uint32)).all()
    bits = expected.view(torch.uint8).numpy().copy()
    bits[bits & 0x7F == 0x7F] = 0x7F  # torch keeps the sign of NaN
    assert (codes == bits).all()


@pytest.mark.parametrize(
    "shape",
    [(300, 272), (1, 70_000), (128, 128), (5, 3), (129, 129), (2, 130, 200), (3, 1, 1), (200, 1)],
    ids=str,
)
def test_codes_are_those_of_torch(shape):
    check(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@settings(max_examples=examples(20), deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    exponent=st.integers(-149, 127),
    spread=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_any_values_are_coded(rows, columns, exponent, spread, seed):
    """Of any magnitude, also of a wide range of them within a block."""
    g = torch.Generator().manual_seed(seed)
    powers = exponent - torch.randint(0, spread + 1, (rows, columns), generator=g)
    values = torch.ldexp(torch.rand(rows, columns, generator=g).double() * 2 - 1, powers)
    check(values.float())


def test_every_rounding_is_torchs():
    """All upper halves of float32, with lower halves at and beside the middle."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    values = (upper[:, None] | lower).reshape(-1).view(np.float32)
    finite = torch.from_numpy(values[np.isfinite(values)].copy())
    expected = finite.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    found = np.empty(len(values), np.uint8)
    encode_e4m3(values.copy(), found, np.empty((2, len(values)), np.float32))
    assert (found[np.isfinite(values)] == expected).all()
    assert (found[~np.isfinite(values)] == 0x7F).all()
    if not HAS_KERNELS:
        return
    by_kernel, one = np.empty_like(found), np.ones(6, np.float32)
    encoding_kernel().encode(values.reshape(-1, 6), one, by_kernel, np.empty(0, np.float32))
    assert (by_kernel == found).all()


def test_blocks_of_zeros_stay_zeros():
    values = torch.zeros(130, 130)
    values[129, 129] = -3.0
    values[0, 0] = -0.0
    codes, scales = coded(values)
    assert scales.tolist() == [[1, 1], [1, np.float32(3) / np.float32(448)]]
    assert (codes[0, 0], codes[129, 129]) == (0x80, 0xFE)
    assert np.count_nonzero(codes) == 2


@pytest.mark.parametrize("bits", [1, 100, 223, 224, 225, 671, 1 << 20])
def test_least_magnitudes_have_a_scale(bits):
    """If the scale is denormal, or would be 0."""
    values = torch.zeros(3, 130)
    values[1, 2] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    _, scales = coded(values)
    assert (scales > 0).all()
    check(values)


def test_infinities_spoil_no_neighbours():
    values = torch.randn(128, 256, generator=torch.Generator().manual_seed(2))
    whole, scales = coded(values)
    values[0, 0], values[5, 200], values[6, 201] = torch.nan, torch.inf, -torch.inf
    codes, same = coded(values)
    assert np.flatnonzero(codes != whole).tolist() == [0, 5 * 256 + 200, 6 * 256 + 201]
    assert set(codes[codes != whole].tolist()) == {0x7F}
    assert (same == scales).all()
    check(torch.full((2, 2), torch.inf))


def test_pieces_are_bounded():
    """A row that is longer than a piece is coded in parts."""
    columns = 3 * PIECE_NUM_ELEMENTS + 50
    check(torch.randn((2, columns), generator=torch.Generator().manual_seed(3)))
