"""Tensors stored in chunks, each a box of their elements: put together while they are read.

Chunks are held in columns, and each form of chunk once, since there may be a million.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.gathering import BUFFER_NBYTES, UNSIGNED, Gatherer, boxes
from shardmix.sources.identity import SourceFile
from shardmix.sources.readers import PreadReader, StoredReader

# Of a chunk in `_Layout`, and of two such tables while a box is filled.
_CHUNK_NBYTES, _DIMENSION_NBYTES = 200, 60


class Box(NamedTuple):
    """The form of a chunk."""

    offsets: tuple[int, ...]
    """Indexes of its first element in the tensor."""
    sizes: tuple[int, ...]
    """Its shape."""
    strides: tuple[int, ...]
    """Distance between neighbours in the file, in elements."""


@dataclass(frozen=True, slots=True)
class StoredChunks:
    """The chunks of a model's tensors."""

    firsts: npt.NDArray[np.int64]
    """For each tensor its first chunk, and then the number of all; one that is stored as it is has
    none."""
    files: npt.NDArray[np.int32]
    """Index into the source's files."""
    starts: npt.NDArray[np.int64]
    """First element's first byte in its file."""
    forms: npt.NDArray[np.int32]
    """Index into `boxes`."""
    boxes: Sequence[Box]
    """The forms."""

    @property
    def layout_nbytes(self) -> int:
        """The most memory that the chunks of one tensor take while it is read."""
        most_chunks = int(np.diff(self.firsts).max(initial=0))
        most_dimensions = max((len(box.sizes) for box in self.boxes), default=0)
        return most_chunks * (_CHUNK_NBYTES + most_dimensions * _DIMENSION_NBYTES)


class _Layout(NamedTuple):
    """The chunks of one tensor, as arrays of (chunk, dimension)."""

    row: int
    files: list[int]
    starts: list[int]
    strides: list[tuple[int, ...]]
    offsets: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


class ChunkReader:
    """Reads tensors in the order of their shapes; a `TensorReader`."""

    def __init__(
        self, files: Sequence[SourceFile], tensors: TensorTable, chunks: StoredChunks
    ) -> None:
        self._stored = StoredReader(files, tensors)
        self._gatherer = Gatherer(PreadReader(files))
        self._tensors = tensors
        self._chunks = chunks
        self._layout: _Layout | None = None
        self.overhead_nbytes = BUFFER_NBYTES + chunks.layout_nbytes

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        if not self._is_in_chunks(row):
            self._stored.read(row, start, into)
            return
        if self._layout is None or self._layout.row != row:
            self._layout = self._layout_of(row)
        layout = self._layout
        width = element_nbytes(DTYPES[self._tensors.dtype_ranks[row]])
        out = np.frombuffer(into, UNSIGNED[width])
        shape = self._tensors.shapes[row]
        for first, last, origin, box in boxes(shape, start, start + len(out)):
            target = out[first - start : last - start].reshape(box)
            self._fill(layout, width, origin, target)

    def _fill(
        self, layout: _Layout, width: int, origin: tuple[int, ...], target: npt.NDArray[Any]
    ) -> None:
        """Fill a box of a tensor's elements from all chunks that it meets."""
        starts = np.maximum(layout.offsets, origin)
        stops = np.minimum(layout.ends, np.add(origin, target.shape))
        for chunk in np.flatnonzero((starts < stops).all(axis=1)).tolist():
            low, high = starts[chunk].tolist(), stops[chunk].tolist()
            part = tuple(
                slice(begin - at, end - at)
                for begin, end, at in zip(low, high, origin, strict=True)
            )
            strides = layout.strides[chunk]
            inner = (starts[chunk] - layout.offsets[chunk]).tolist()
            offset = layout.starts[chunk] + sum(map(operator.mul, inner, strides)) * width
            self._gatherer.gather(layout.files[chunk], offset, strides, target[part])

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Do nothing for chunks; let the system read other tensors ahead."""
        if not self._is_in_chunks(row):
            self._stored.prefetch(row, start, num_elements)

    def close(self) -> None:
        """Close all files."""
        self._stored.close()
        self._gatherer.close()

    def _is_in_chunks(self, row: int) -> bool:
        return bool(self._chunks.firsts[row] < self._chunks.firsts[row + 1])

    def _layout_of(self, row: int) -> _Layout:
        chunks = self._chunks
        part = slice(int(chunks.firsts[row]), int(chunks.firsts[row + 1]))
        found = [chunks.boxes[form] for form in chunks.forms[part].tolist()]
        shape = len(found), len(self._tensors.shapes[row])
        offsets = np.array([box.offsets for box in found], np.int64).reshape(shape)
        sizes = np.array([box.sizes for box in found], np.int64).reshape(shape)
        return _Layout(
            row,
            chunks.files[part].tolist(),
            chunks.starts[part].tolist(),
            [box.strides for box in found],
            offsets,
            offsets + sizes,
        )
