"""Chunks of a tensor: boxes that must fill its shape, each element in one of them.

Pure: knows shapes, no files.
"""

import math
from collections.abc import Sequence

import numpy as np

from shardmix.errors import SourceError
from shardmix.formats.dcp_metadata import Chunk, Position

# More boxes that form no grid are not compared pair by pair; no program saves such.
_MOST_SCATTERED = 1 << 12
_REMEDY = "fetch it again, or save it again"


def check_chunks(shape: Position, chunks: Sequence[Chunk]) -> None:
    """Raise `SourceError` if chunks reach beyond a shape, overlap, or leave a gap."""
    filled = []
    for chunk in chunks:
        offsets, sizes = chunk
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise SourceError(
                f"of shape {list(shape)} has a chunk of {len(sizes)} dimensions at {list(offsets)}",
                remedy=_REMEDY,
            )
        if any(map(_is_beyond, offsets, sizes, shape)):
            raise SourceError(
                f"of shape {list(shape)} has a chunk of {list(sizes)} at {list(offsets)}, which "
                "reaches beyond it",
                remedy=_REMEDY,
            )
        if 0 not in sizes:
            filled.append(chunk)
    volume = sum(math.prod(chunk.sizes) for chunk in filled)
    if volume != math.prod(shape):
        raise SourceError(
            f"of shape {list(shape)} has {math.prod(shape)} elements, but {volume} in its "
            f"{len(chunks)} chunks",
            remedy=_REMEDY,
        )
    if len(filled) > 1 and not _are_grid(shape, filled):
        _check_disjoint(shape, filled)


def _is_beyond(offset: int, size: int, length: int) -> bool:
    return offset + size > length


def _are_grid(shape: Position, chunks: Sequence[Chunk]) -> bool:
    """Return True if chunks are all boxes of a grid, each once: then they fill the shape."""
    num_boxes = 1
    for dimension, length in enumerate(shape):
        spans = {(chunk.offsets[dimension], chunk.sizes[dimension]) for chunk in chunks}
        end = 0
        for start, size in sorted(spans):
            if start != end:
                return False
            end += size
        if end != length:
            return False
        num_boxes *= len(spans)
    return num_boxes == len(chunks) == len({chunk.offsets for chunk in chunks})


def _check_disjoint(shape: Position, chunks: Sequence[Chunk]) -> None:
    if len(chunks) > _MOST_SCATTERED:
        raise SourceError(
            f"of shape {list(shape)} has {len(chunks)} chunks that form no grid; "
            f"at most {_MOST_SCATTERED} such are read",
            remedy="save it again from fewer ranks",
        )
    starts = np.array([chunk.offsets for chunk in chunks], np.int64)
    stops = starts + np.array([chunk.sizes for chunk in chunks], np.int64)
    for number in range(len(chunks) - 1):
        others = slice(number + 1, None)
        meet = (starts[others] < stops[number]) & (starts[number] < stops[others])
        if meet.all(axis=1).any():
            raise SourceError(
                f"of shape {list(shape)} has chunks that overlap, such as the one at "
                f"{list(chunks[number].offsets)}",
                remedy=_REMEDY,
            )
