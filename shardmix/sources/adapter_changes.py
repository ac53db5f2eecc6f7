"""The changes that an adapter makes to a base's tensors, as values."""

from dataclasses import dataclass
from typing import NamedTuple

ONES = -1
"""The row of a `View` of a matrix of ones."""


class View(NamedTuple):
    """A matrix within one of an adapter's tensors: element (i, j) is at start + i·row + j·column.

    Plans have very many of them.
    """

    tensor: int
    """Row of the tensor in the adapter's table, or `ONES`."""
    start: int = 0
    """Its first element in the tensor."""
    row_step: int = 0
    """Elements from one row to the next."""
    column_step: int = 0
    """Elements from one column to the next."""


class Patch(NamedTuple):
    """A low-rank change of some rows of a tensor: they become W + scaling · left·right."""

    first_row: int
    """First row; a tensor's rows are all but its last axes, as `Change.num_columns` says."""
    num_rows: int
    """Number of rows."""
    rank: int
    """Columns of `left`, and rows of `right`."""
    left: View
    """Matrix (rows, rank)."""
    right: View
    """Matrix (rank, columns)."""
    scaling: float
    """Factor of their product, in double precision."""


@dataclass(frozen=True, slots=True)
class Change:
    """All that an adapter does to one tensor of its base, in the order of the fields."""

    num_columns: int
    """The tensor is changed as a matrix of this many columns."""
    value: int | None = None
    """Row of the adapter's tensor that replaces it."""
    patches: tuple[Patch, ...] = ()
    """Low-rank changes, in the order of rows; none overlap."""
    magnitude: int | None = None
    """Row of DoRA's magnitudes: each row is scaled to have such a norm."""
    is_by_column: bool = False
    """True if each column is scaled, not each row."""
    tokens: int | None = None
    """Row of the adapter's tensor of single rows that replace the tensor's own."""
    token_rows: tuple[int, ...] = ()
    """The rows that they replace."""

    @property
    def is_low_rank(self) -> bool:
        """True if it only adds a low-rank matrix."""
        return self.value is None and self.magnitude is None and self.tokens is None

    @property
    def is_value(self) -> bool:
        """True if the tensor is only replaced."""
        return not self.patches and self.magnitude is None and self.tokens is None


class LowRankPair(NamedTuple):
    """Matrices A and B of one parameter as an adapter stores them: B·A, times the scaling."""

    name: str
    """The parameter's name as the adapter means it: a module's weight, or stacked experts."""
    module: str
    """The module whose name the matrices have."""
    depth: int
    """Number of `base_layer`s in their names."""
    a: int
    """Row of A in the adapter's table."""
    b: int
    """Row of B."""
    is_embedding: bool
    """True if they are an embedding's, with names of their own."""
    num_stacked: int
    """Number of matrices that the parameter stacks: A has their ranks one after the other, and B
    the columns of one rank together. 1 for most."""
    rank: int
    """Rank of each."""
    scaling: float
    """Factor of B·A."""
    places: tuple[tuple[int, int, int], ...]
    """Row of the base's table, the first of its rows that change, and their number."""
    bias: int | None = None
    """Row of what is added to the module's bias."""


@dataclass(frozen=True, slots=True)
class MatchedAdapter:
    """All that an adapter does to its base."""

    changes: dict[int, Change]
    """Row of the base's table → what it does to that tensor."""
    pairs: tuple[LowRankPair, ...]
    """Its matrices, as it stores them."""
