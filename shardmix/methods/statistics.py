"""Statistics of whole tensors, such as norms: in float64, and independent of who computes them.

A tensor is cut into pieces of a fixed number of elements, counted from its first. Each piece is
added up in one fixed order, and the total of pieces is exactly rounded, whatever their order. So
the result depends only on the values, not on chunks, workers or a resume.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PIECE_NUM_ELEMENTS = 1 << 15
"""Elements of a piece: their products in float64 stay in the caches."""

Partial = tuple[float, ...]
"""The contribution of a piece, one number for each entry of a statistic."""


class Statistic(Protocol):
    """A statistic over all values of a tensor, of the base model (if any) and each contributor."""

    def of_piece(self, values: Sequence[Any]) -> Partial:
        """Return a piece's contribution; `values` are float64 arrays, which it may change."""

    def total(self, partials: Iterable[Partial]) -> Partial:
        """Return the whole tensor's statistic."""


@dataclass(frozen=True, slots=True)
class Gram:
    """The scalar products of all pairs of values: <x0, x0>, <x0, x1>, ..., <x1, x1>, ..."""

    def of_piece(self, values: Sequence[Any]) -> Partial:
        """Return the products' sums, row by row of the upper triangle."""
        return tuple(
            sum_of_piece(values[row] * values[column])
            for row in range(len(values))
            for column in range(row, len(values))
        )

    def total(self, partials: Iterable[Partial]) -> Partial:
        """Return the products of the whole tensor."""
        return totals(partials)


def sum_of_piece(values: Any) -> float:
    """Add up a float64 array of numpy or torch, by halves; changes the array.

    Additions of whole halves give the same bits on every machine and device, unlike a library's
    own sum, and are as accurate as pairwise summation.
    """
    length = len(values)
    while length > 1:
        half = 1 << ((length - 1).bit_length() - 1)
        values[: length - half] += values[half:length]
        length = half
    return float(values[0]) if length else 0.0


def totals(partials: Iterable[Partial]) -> Partial:
    """Return the sums of each entry, each rounded once; not finite if any part isn't."""
    return tuple(map(_fsum, zip(*partials, strict=True)))


def _fsum(parts: Sequence[float]) -> float:
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):  # of finite parts too large, or of infinities of both signs
        return sum(parts)
