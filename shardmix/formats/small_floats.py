"""The values of floats and integers of 1 to 8 bits, how they lie in bytes, and codes of E4M3.

FP8: https://arxiv.org/abs/2209.05433. FP4 (E2M1) and the scales E8M0:
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
Packed integers: bits of a row lie one after another, the lowest first, in 32-bit words.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_WORD_BITS = 32
FLOAT32_INFINITY = 0x7F800000
E4M3_SIGN = np.uint32(0x80)
# Of E4M3: float32's bits of its least normal number, 2^-6, and the bits that float32 has more; what
# rounds to nearest, and exchanges the exponents' biases, 127 and 7; its largest value and NaN.
E4M3_LEAST_NORMAL = np.uint32(121 << 23)
E4M3_LOST_BITS = 20
E4M3_HALF_STEP = np.uint32(((1 << 19) - 1 - (120 << 23)) % (1 << 32))
E4M3_LARGEST_CODE = np.uint32(0x7E)
E4M3_NAN = 0x7F
E4M3_COUNTING = np.float32(1 << 14)
"""Added to it, float32 has 2^-9 as its last bit."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of FP4 without their sign."""


@dataclass(frozen=True, slots=True)
class Code:
    """A kind of codes: the values that they stand for before any scale."""

    name: str
    """Its name in messages and in a plan's digest."""
    bits: int
    """Width of a code."""
    is_in_words: bool = False
    """True if rows are whole 32-bit words; otherwise they are whole bytes."""

    @property
    def aligned(self) -> int:
        """The number of codes at whose multiples a word begins, or without words a byte."""
        return _WORD_BITS if self.is_in_words else 8 // self.bits

    def row_nbytes(self, num_codes: int) -> int:
        """Return the bytes of a row of this many codes."""
        if self.is_in_words:
            return 4 * -(-num_codes * self.bits // _WORD_BITS)
        return -(-num_codes * self.bits // 8)


E4M3 = Code("e4m3", 8)
E4M3_LARGEST = 448
"""The largest value of E4M3."""
E5M2 = Code("e5m2", 8)
FP4 = Code("e2m1", 4)
INT8 = Code("int8", 8)


def packed_integer(bits: int) -> Code:
    """Return signed integers of 1 to 8 bits, each stored with half of their range added."""
    return Code(f"int{bits} packed", bits, is_in_words=True)


def decode(code: Code, stored: Bytes, out: Floats) -> None:
    """Fill `out` (rows × codes, contiguous) with the values of codes, before any scale.

    `stored` has the bytes of each row from an aligned code on, and at least as many codes.
    """
    num_rows, num_codes = out.shape
    if not out.size:
        return
    if 8 % code.bits:
        _unpack(code.bits, stored, out)
        return
    table = _table(code)
    per_byte = table.shape[1]
    num_bytes = -(-num_codes // per_byte)
    stored = np.ascontiguousarray(stored[:, :num_bytes])
    if num_bytes * per_byte == num_codes:
        _look_up(table, stored, out.reshape(num_rows, num_bytes, per_byte))
        return
    wider = np.empty((num_rows, num_bytes, per_byte), np.float32)
    _look_up(table, stored, wider)
    out[:] = wider.reshape(num_rows, -1)[:, :num_codes]


def encode_e4m3(values: Floats, out: Bytes, scratch: Floats) -> None:
    """Fill `out` with the codes of float32 values, rounded to nearest even.

    Beyond 448 they are 448; NaN and infinities are NaN, without a sign. `scratch` (2 × values) is
    changed, and so are the values.
    """
    bits, codes, signs = values.view(np.uint32), *scratch.view(np.uint32)
    np.right_shift(bits, 24, out=signs)
    signs &= E4M3_SIGN
    bits &= 0x7FFFFFFF
    small = np.flatnonzero(bits < E4M3_LEAST_NORMAL)
    not_finite = np.flatnonzero(bits >= FLOAT32_INFINITY)
    # Half a step is added, and a little less if the last bit that stays is 0.
    np.right_shift(bits, E4M3_LOST_BITS, out=codes)
    codes &= 1
    codes += bits
    codes += E4M3_HALF_STEP
    codes >>= E4M3_LOST_BITS
    np.minimum(codes, E4M3_LARGEST_CODE, out=codes)
    # Numbers below the least normal one are multiples of 2^-9: float32's own rounding counts them.
    codes[small] = (values[small] + E4M3_COUNTING).view(np.uint32) - E4M3_COUNTING.view(np.uint32)
    codes |= signs
    codes[not_finite] = E4M3_NAN
    np.copyto(out, codes, casting="unsafe")


def exponents(stored: Bytes) -> Floats:
    """Return the powers of two that E8M0 stands for; 255 is NaN."""
    return _exponents()[stored]


def _look_up(table: Floats, stored: Bytes, out: Floats) -> None:
    # No index is beyond the table; by "wrap" numpy writes into `out` without a copy between.
    if table.shape[1] == 1:
        np.take(table[:, 0], stored, out=out[..., 0], mode="wrap")
    elif table.shape[1] == 2:  # two values move as one
        np.take(table.view(np.uint64)[:, 0], stored, out=out.view(np.uint64)[..., 0], mode="wrap")
    else:
        np.take(table, stored, axis=0, out=out, mode="wrap")


def _unpack(bits: int, stored: Bytes, out: Floats) -> None:
    """Decode integers of which some lie in two bytes, eight at a time: `bits` bytes."""
    num_rows, num_codes = out.shape
    num_groups = -(-num_codes // 8)
    padded = np.zeros((num_rows, num_groups * bits + 1), np.uint16)
    stored = stored[:, : num_groups * bits]
    padded[:, : stored.shape[1]] = stored
    for number in range(8):
        first, shift = divmod(number * bits, 8)
        low = padded[:, first : first + num_groups * bits : bits][:, :num_groups]
        high = padded[:, first + 1 : first + 1 + num_groups * bits : bits][:, :num_groups]
        values = (low | high << 8) >> shift & ((1 << bits) - 1)
        target = out[:, number::8]
        target[:] = values[:, : target.shape[1]]
    out -= np.float32(1 << (bits - 1))


@cache
def _table(code: Code) -> Floats:
    """Return the values of each byte: 256 × codes in it."""
    stored = np.arange(256, dtype=np.uint8)
    if code == INT8:
        values = stored.view(np.int8).astype(np.float32)
    elif code == E4M3:
        values = _eight_bits(4, {0x7F: 0x7FF00000})  # this format has no infinity
    elif code == E5M2:
        nan = {0x7D: 0x7FE00000, 0x7E: 0x7FC00000, 0x7F: 0x7FE00000}
        values = _eight_bits(5, {0x7C: 0x7F800000, **nan})
    else:
        shifts = np.arange(0, 8, code.bits, dtype=np.uint8)
        codes = stored[:, None] >> shifts & np.uint8((1 << code.bits) - 1)
        signed = np.array([*E2M1, *(-value for value in E2M1)], np.float32)
        if code == FP4:
            values = signed[codes]
        else:
            values = codes.astype(np.float32) - np.float32(1 << (code.bits - 1))
    return values.reshape(256, -1)


def _eight_bits(exponent_bits: int, special: dict[int, int]) -> Floats:
    """Return the values of all FP8 codes with this many bits of exponent.

    `special` has the float32's bits of codes that are not finite; NaN has the bits that torch gives
    it. Codes from 0x80 on are negative.
    """
    mantissa_bits = 7 - exponent_bits
    stored = np.arange(256)
    exponent = stored >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = stored & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    significand = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    values = np.ldexp(significand, np.maximum(exponent, 1) - bias - mantissa_bits)
    floats: Floats = values.astype(np.float32)
    floats.view(np.uint32)[list(special)] = list(special.values())
    floats.view(np.uint32)[0x80:] = floats.view(np.uint32)[:0x80] | 0x80000000
    return floats


@cache
def _exponents() -> Floats:
    finite = np.ldexp(np.float32(1), np.arange(255) - 127, dtype=np.float32)
    values: Floats = np.append(finite, np.float32(np.nan))
    return values
