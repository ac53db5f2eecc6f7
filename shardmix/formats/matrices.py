"""Matrices whose elements lie row by row: divided into blocks, bands and rectangles. Pure.

A matrix is divided into blocks, the last of which may be ragged. All blocks of the same rows are a
band: its elements lie one after another, and so do the scales of its blocks. A range of elements is
divided into rectangles, which are whole rows or a part of one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)

WHOLE = 0
"""Length of a block that is as long as its axis."""
CODE_NBYTES = 1
"""Bytes of an element that an output has as a code."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """The shape of a tensor's codes, as stored: matrices of rows and columns."""

    count: int
    """Number of matrices."""
    rows: int
    """Rows of each."""
    columns: int
    """Columns of each."""

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Matrices":
        """Return the matrices of a shape with at least two axes."""
        *leading, rows, columns = shape
        count = 1
        for length in leading:
            count *= length
        return cls(count, rows, columns)

    def grid(self, block: tuple[int, int]) -> tuple[int, int]:
        """Return the number of blocks in each matrix: along the rows, and along the columns."""
        return num_blocks(self.rows, block[0]), num_blocks(self.columns, block[1])


def num_blocks(length: int, block: int) -> int:
    """Return the number of blocks along an axis."""
    return 1 if block == WHOLE else -(-length // block)


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


class Rectangle(NamedTuple):
    """Elements that follow one another: whole rows, or a part of one."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    @property
    def num_elements(self) -> int:
        """Number of its elements."""
        return self.num_rows * self.num_columns

    def of(self, values: npt.NDArray[T], start: int = 0) -> npt.NDArray[T]:
        """Return its elements, the first of which is at `start` of an array, as a matrix."""
        return values[start : start + self.num_elements].reshape(self.num_rows, self.num_columns)


def rectangles(start: int, stop: int, width: int, most: int) -> Iterator[Rectangle]:
    """Divide elements of a matrix with rows of this width into pieces of at most so many."""
    most_rows = max(1, most // width)
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width or width > most:
            piece = Rectangle(row, 1, column, min(width - column, stop - start, most))
        else:
            piece = Rectangle(row, min((stop - start) // width, most_rows), 0, width)
        yield piece
        start += piece.num_elements
