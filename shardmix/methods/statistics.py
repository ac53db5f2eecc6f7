"""Statistics of whole tensors, such as norms: in float64, with the same bits on every machine.

A tensor is cut into pieces of a fixed number of elements, counted from its first, and pieces into
groups. Each piece is added up in one fixed order, then the pieces of each group, then the groups.
So the result depends on the values only: not on chunks, workers, machines or a resume.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PIECE_NUM_ELEMENTS = 1 << 14
"""Elements of a piece: in float64 the pieces of several models fit into the caches."""
GROUP_NUM_ELEMENTS = 128 * PIECE_NUM_ELEMENTS
"""Elements of a group: the part of a tensor that one task gathers into one total."""

Partial = tuple[float, ...]
"""The entries of a statistic over a part of a tensor."""


class Statistic(Protocol):
    """A statistic over all values of a tensor, in the base model (if any) and each other model."""

    def num_entries(self, num_values: int) -> int:
        """Return its number of entries for so many models, the base model among them."""

    def of_piece(self, values: Sequence[Any]) -> Partial:
        """Return a piece's part. `values` are float64 arrays, which it must not change.

        It may make one array of a piece's size at a time; the memory budget counts that one.
        """

    def total(self, partials: Sequence[Partial]) -> Partial:
        """Return the statistic of several parts, or of several totals, together."""


@dataclass(frozen=True, slots=True)
class Gram:
    """The scalar products of all pairs of values: <x0, x0>, <x0, x1>, ..., <x1, x1>, ..."""

    def num_entries(self, num_values: int) -> int:
        """Return the number of pairs."""
        return num_values * (num_values + 1) // 2

    def of_piece(self, values: Sequence[Any]) -> Partial:
        """Return the products' sums, row by row of the upper triangle."""
        return tuple(
            sum_of_piece(values[row] * values[column])
            for row in range(len(values))
            for column in range(row, len(values))
        )

    def total(self, partials: Sequence[Partial]) -> Partial:
        """Return the products of several parts together."""
        return tuple(map(_exact_sum, zip(*partials, strict=True)))


def num_entries(statistics: Sequence[Statistic], num_values: int) -> int:
    """Return the number of entries of several statistics of a tensor."""
    return sum(statistic.num_entries(num_values) for statistic in statistics)


def num_groups(num_elements: int) -> int:
    """Return the number of groups of a tensor."""
    return -(-num_elements // GROUP_NUM_ELEMENTS)


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


def gathered(statistics: Sequence[Statistic], pieces: Iterable[Sequence[Any]]) -> list[Partial]:
    """Return each statistic of a group of pieces, or of a tensor of one group."""
    parts = [[statistic.of_piece(values) for statistic in statistics] for values in pieces]
    return [
        statistic.total([part[number] for part in parts])
        for number, statistic in enumerate(statistics)
    ]


def _exact_sum(parts: Sequence[float]) -> float:
    """Return a sum that is rounded once."""
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):  # finite parts too large, or infinities of both signs
        return sum(parts)
