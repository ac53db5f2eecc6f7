"""A quantised tensor: the tensors that store it, and the check that their shapes fit."""

from dataclasses import dataclass

from shardmix.errors import SourceError
from shardmix.formats.coded_tensors import SCALE_DTYPES, Coding
from shardmix.formats.matrices import WHOLE, Matrices
from shardmix.sources.quantisation.stored import Declared, Stored

FETCH = "fetch the checkpoint again, or merge the unquantised one"
NONE = -1
"""The row of a tensor that is not there."""


@dataclass(frozen=True, slots=True)
class CodedTensor:
    """A tensor that is decoded, and the rows of the tensors that store it."""

    name: str
    """Its name in the unquantised model."""
    shape: tuple[int, ...]
    """Its shape once decoded."""
    coding: Coding
    """The way it is stored."""
    codes: int
    """Row of its codes."""
    scales: int
    """Row of its scales."""
    tensor_scale: int = NONE
    """Row of the scale of the whole tensor."""
    zeros: int = NONE
    """Row of its zero points."""
    order: int = NONE
    """Row of the group that each column belongs to."""
    others: tuple[int, ...] = ()
    """Rows of tensors that only describe it."""

    @property
    def rows(self) -> tuple[int, ...]:
        """All rows that store it."""
        found = (self.codes, self.scales, self.tensor_scale, self.zeros, self.order, *self.others)
        return tuple(row for row in found if row != NONE)


def no_scales(stored: Stored, codes: int, wanted: str) -> SourceError:
    """Return the error of codes without scales."""
    return SourceError(
        f"{stored.told(codes)} are codes, and their scales, {wanted}, are not there", remedy=FETCH
    )


def check_matrix(stored: Stored, codes: int) -> None:
    """Raise `SourceError` if codes have fewer than two axes."""
    if len(stored.shape(codes)) < 2:
        raise SourceError(f"{stored.told(codes)} are codes with fewer than two axes", remedy=FETCH)


def block_of(
    stored: Stored, shape: tuple[int, ...], codes: int, scales: int, declared: Declared
) -> tuple[int, int]:
    """Return the rows and columns that share a scale, by the shape of the scales.

    `shape` is that of the codes as a matrix. Raises `SourceError` if no way to share them gives the
    scales' shape.
    """
    if stored.dtype(scales) not in SCALE_DTYPES:
        raise SourceError(
            f"{stored.told(scales)} has scales of a dtype that is not known",
            remedy="merge the unquantised checkpoint",
        )
    given, matrices = stored.shape(scales), Matrices.of(shape)
    num_scales = 1
    for length in given:
        num_scales *= length
    *leading, rows, columns = shape
    if num_scales == 1:
        return WHOLE, WHOLE
    if given == tuple(leading) or given == (*leading, 1, 1):
        return WHOLE, WHOLE
    if given == (*leading, rows, 1) or (not leading and given == (rows,)):
        return 1, WHOLE
    candidates = [*declared.blocks, *((1, size) for size in declared.group_sizes)]
    for block in candidates:
        if given == (*leading, *matrices.grid(block)):
            return block
    if given == (*leading, 1, columns):
        return WHOLE, 1
    if stored.dtype(scales) in ("F8_E8M0", "U8") and given == (*leading, *matrices.grid((1, 32))):
        return 1, 32
    told = " and ".join(f"{block[0]} × {block[1]}" for block in candidates)
    rule = (
        f"a scale for blocks of {told} has another shape"
        if candidates
        else "config.json has no weight_block_size that would explain them"
    )
    raise SourceError(
        f"{stored.told(scales)} does not fit the codes {stored.told(codes)}: {rule}", remedy=FETCH
    )
