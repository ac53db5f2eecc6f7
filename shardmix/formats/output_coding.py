"""The codings that an output's matrices can be written in: codes, and a scale for each block. Pure.

A matrix is divided into blocks, the last of which may be ragged. All blocks of the same rows are a
band: its elements lie one after another, and so do its scales. A coding knows one block's scale and
one element's code; bands, and the pieces of them that are in memory, are the same for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from shardmix.formats.coded_tensors import num_blocks
from shardmix.formats.small_floats import Bytes, Floats

PIECE_NUM_ELEMENTS = 1 << 16
"""The most elements that are coded at once: their scratch stays in the caches."""
CODE_NBYTES = 1
"""Bytes of a code."""
SCRATCH_NBYTES = 16 * PIECE_NUM_ELEMENTS
"""Memory of a quantiser: of each element of a piece four words of 32 bits."""


class OutputCoding(Protocol):
    """A way to store matrices as codes of one byte and scales of blocks."""

    code_dtype: str
    """Safetensors dtype of the codes."""
    scale_dtype: str
    """Safetensors dtype of the scales; 32 bits."""
    block: tuple[int, int]
    """Rows and columns of a block."""

    def scales(self, largest: Floats) -> Floats:
        """Return the scales of blocks, from the largest finite magnitude in each."""

    def encode(self, values: Floats, factors: Floats, out: Bytes, scratch: Floats) -> None:
        """Fill `out` with the codes of values (rows × columns) over the columns' scales.

        `out` may lie in the memory of the values, if not behind their start. The `scratch`, three
        rows of as many elements, is changed.
        """

    def compiled(self) -> "Encode":
        """Return `encode` as machine code of the same bits; llvmlite must be there."""


Encode = Callable[[Floats, Floats, Bytes, Floats], None]
"""`OutputCoding.encode`."""


class _Rectangle(NamedTuple):
    """Whole rows of a band, or a part of one row."""

    offset: int
    """Its first element, counted from the piece's first."""
    num_rows: int
    first_column: int
    num_columns: int


@dataclass(frozen=True, slots=True)
class Bands:
    """The bands of a tensor, matrix by matrix."""

    num_matrices: int
    """Number of matrices, which lie one after another."""
    rows: int
    """Rows of each."""
    columns: int
    """Columns of each."""
    block: tuple[int, int]
    """Rows and columns of a block."""

    @property
    def in_matrix(self) -> int:
        """Number of bands of a matrix."""
        return num_blocks(self.rows, self.block[0])

    @property
    def num_bands(self) -> int:
        """Number of bands of all matrices."""
        return self.num_matrices * self.in_matrix

    @property
    def num_scales(self) -> int:
        """Number of scales of a band."""
        return num_blocks(self.columns, self.block[1])

    @property
    def largest_num_elements(self) -> int:
        """Number of elements of the largest band."""
        return min(self.block[0], self.rows) * self.columns

    def of(self, element: int) -> int:
        """Return the number of the band that an element lies in."""
        matrix, rest = divmod(element, self.rows * self.columns)
        return matrix * self.in_matrix + rest // (self.block[0] * self.columns)

    def elements(self, band: int) -> range:
        """Return the elements of a band."""
        matrix, number = divmod(band, self.in_matrix)
        first_row = number * self.block[0]
        stop_row = min(first_row + self.block[0], self.rows)
        start = matrix * self.rows * self.columns
        return range(start + first_row * self.columns, start + stop_row * self.columns)

    def rectangles(self, start: int, stop: int) -> Iterator[_Rectangle]:
        """Divide a range of one band's elements into pieces of whole rows, or parts of rows."""
        position = start
        while position < stop:
            column = position % self.columns
            num_rows = min(stop - position, PIECE_NUM_ELEMENTS) // self.columns
            if column or not num_rows:
                length = min(self.columns - column, stop - position, PIECE_NUM_ELEMENTS)
                yield _Rectangle(position - start, 1, column, length)
            else:
                length = num_rows * self.columns
                yield _Rectangle(position - start, num_rows, 0, self.columns)
            position += length


class Quantiser:
    """Codes the values of bands for one worker."""

    def __init__(self, coding: OutputCoding, *, is_compiled: bool = False) -> None:
        self._encode = coding.compiled() if is_compiled else coding.encode
        self._scratch = np.empty((3, PIECE_NUM_ELEMENTS), np.float32)

    def find_largest(
        self, bands: Bands, start: int, values: Floats, largest: Floats, *, is_finite: bool
    ) -> None:
        """Raise `largest` to the largest finite magnitude in each block of a band.

        Args:
            bands: the tensor's bands.
            start: the first element; all lie in one band.
            values: the elements' values.
            largest: one entry for each block of the band; changed in place.
            is_finite: True if no value is NaN or infinite.
        """
        width = bands.block[1]
        for piece in bands.rectangles(start, start + len(values)):
            shape = piece.num_rows, piece.num_columns
            part = _part(values, piece.offset, shape)
            magnitudes = _part(self._scratch[0], 0, shape)
            np.abs(part, out=magnitudes)
            if not is_finite:
                magnitudes[~np.isfinite(magnitudes)] = 0
            by_column = np.maximum.reduce(magnitudes, axis=0)
            first = piece.first_column // width
            skipped = piece.first_column % width
            starts = np.arange(0, skipped + len(by_column), width) - skipped
            starts[0] = 0
            found = np.maximum.reduceat(by_column, starts)
            target = largest[first : first + len(found)]
            np.maximum(target, found, out=target)

    def encode(self, bands: Bands, start: int, values: Floats, scales: Floats, out: Bytes) -> None:
        """Fill `out` with the codes of elements from `start` on, which lie in one band.

        `scales` are the band's. `out` may lie in the memory of `values`, if not behind its start.
        """
        width = bands.block[1]
        for piece in bands.rectangles(start, start + len(values)):
            shape = piece.num_rows, piece.num_columns
            first, skipped = divmod(piece.first_column, width)
            stop = num_blocks(piece.first_column + piece.num_columns, width)
            factors = np.repeat(scales[first:stop], width)[skipped : skipped + piece.num_columns]
            flat = piece.num_rows * piece.num_columns
            codes = out[piece.offset : piece.offset + flat]
            part = _part(values, piece.offset, shape)
            self._encode(part, factors, codes, self._scratch[:, :flat])


def _part(values: Floats, offset: int, shape: tuple[int, int]) -> Floats:
    return values[offset : offset + shape[0] * shape[1]].reshape(shape)
