"""The values of quantised tensors: codes, and the scales that blocks of them share. Pure.

    value = (code - zero point) × scale

A tensor's last two axes are rows and columns; axes before these count matrices, which lie one after
another. Each matrix is divided into blocks, the last of which may be ragged, and each block has one
scale. Products and sums are float32, each rounded once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import FLOAT_DTYPES
from shardmix.formats.matrices import WHOLE
from shardmix.formats.small_floats import (
    E4M3,
    Bytes,
    Code,
    Floats,
    decode,
    exponents,
    packed_integer,
)
from shardmix.formats.stored_floats import stored, widened

TIMES, OVER = "times", "over"


@dataclass(frozen=True, slots=True)
class Coding:
    """The way in which a tensor's values are stored, the same for many tensors."""

    code: Code
    """The kind of its codes."""
    block: tuple[int, int]
    """Rows and columns that share a scale; WHOLE for an axis that is not divided."""
    tensor_scale: str = ""
    """TIMES or OVER: a tensor's second scale multiplies the others, or divides them; "" without."""
    zero_bits: int = 0
    """Width of zero points that are packed along the rows; 0 if they are stored one by one."""
    is_transposed: bool = False
    """True if the codes lie column by column: the tensor has rows and columns exchanged."""

    def __str__(self) -> str:
        """Return a short name, which tells apart what decodes to other values."""
        rows, columns = ("all" if length == WHOLE else str(length) for length in self.block)
        more = [self.tensor_scale, f"zero{self.zero_bits}" * bool(self.zero_bits)]
        return " ".join(filter(None, (self.code.name, f"{rows}x{columns}", *more)))


def scale_values(dtype: str, raw: Bytes) -> Floats:
    """Return scales or zero points as float32, from their bytes in a safetensors dtype."""
    if dtype in FLOAT_DTYPES:
        return np.asarray(widened(stored(raw.data, dtype), dtype), np.float32)
    if dtype == "I8":
        return np.asarray(raw.view(np.int8), np.float32)
    if dtype == "F8_E4M3":
        values = np.empty(len(raw), np.float32)
        decode(E4M3, raw[None], values[None])
        return values
    return exponents(raw)  # E8M0, also as U8


SCALE_DTYPES = frozenset({"F32", "BF16", "F16", "F8_E4M3", "F8_E8M0", "U8"})
"""Dtypes of scales; U8 holds exponents."""


def with_tensor_scale(coding: Coding, scales: Floats, tensor_scale: Floats) -> Floats:
    """Return the scales of blocks, each multiplied or divided by that of the tensor."""
    with np.errstate(all="ignore"):  # what is not finite is found in the output
        combine = np.divide if coding.tensor_scale == OVER else np.multiply
        values: Floats = combine(scales, tensor_scale)
        return values


def spread(grid: Floats, block: int, first: int, num_columns: int) -> Floats:
    """Return the value of each column, from those of the blocks that these columns touch.

    Args:
        grid: rows × blocks.
        block: columns of a block, or WHOLE.
        first: the first column.
        num_columns: the number of columns.

    Returns:
        rows × columns, or rows × 1 if one block has them all.
    """
    if grid.shape[1] == 1:
        return grid
    skipped = first % block
    values: Floats = np.repeat(grid, block, axis=1)[:, skipped : skipped + num_columns]
    return values


def apply_scales(out: Floats, factors: Floats, block: int, first_row: int) -> None:
    """Multiply rows by the factors of the blocks of rows that they lie in.

    Args:
        out: rows × columns; changed in place.
        factors: blocks of rows × columns, or × 1.
        block: rows of a block, or WHOLE.
        first_row: the first row of `out` in its matrix.
    """
    with np.errstate(all="ignore"):
        if block == 1 or len(factors) == 1:
            np.multiply(out, factors, out=out)
            return
        start = 0
        for factor in factors:
            stop = start + block - (first_row + start) % block
            np.multiply(out[start:stop], factor, out=out[start:stop])
            start = stop


def subtract_zeros(out: Floats, zeros: Floats, block: int, first_row: int) -> None:
    """Subtract zero points, which lie as `apply_scales` has its factors."""
    if block == 1 or len(zeros) == 1:
        np.subtract(out, zeros, out=out)
        return
    rows = (first_row + np.arange(len(out))) // block
    np.subtract(out, zeros[rows - rows[0]], out=out)


def unpack_rows(bits: int, words: npt.NDArray[np.int32], first: int, num_rows: int) -> Floats:
    """Return integers that are packed along the rows.

    `words` has the words of each column below one another, from one on in which a row begins;
    `first` counts the rows in them before those that are wanted.
    """
    columns = np.ascontiguousarray(words.T)
    values = np.empty((len(columns), first + num_rows), np.float32)
    decode(packed_integer(bits), columns.view(np.uint8), values)
    return np.ascontiguousarray(values[:, first:].T)
