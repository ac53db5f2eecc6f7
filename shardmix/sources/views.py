"""Tensors whose elements lie in a file in another order than their shape's: transposed, expanded.

They are gathered in pieces of bounded size, each from one range of the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.formats.tensor_table import TensorTable, View
from shardmix.sources.identity import SourceFile
from shardmix.sources.readers import PreadReader, StoredReader
from shardmix.system.buffers import buffer_for_reading

_BUFFER_NBYTES = 1 << 20
# Up to here a range is read with all that lies between the wanted elements: it costs less than
# another call.
_CHEAP_NBYTES = 16 << 10
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class ViewReader:
    """Reads tensors in the order of their shapes; a `TensorReader`."""

    overhead_nbytes = _BUFFER_NBYTES
    """Its buffer."""

    def __init__(
        self, files: Sequence[SourceFile], tensors: TensorTable, views: Mapping[int, View]
    ) -> None:
        self._stored = StoredReader(files, tensors)
        self._files = PreadReader(files)
        self._tensors = tensors
        self._views = views
        self._buffer: memoryview | None = None

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        view = self._views.get(row)
        if view is None:
            self._stored.read(row, start, into)
            return
        width = element_nbytes(DTYPES[self._tensors.dtype_ranks[row]])
        out = np.frombuffer(into, _UNSIGNED[width])
        file, shape = int(self._tensors.files[row]), self._tensors.shapes[row]
        for first, last, offset, box in _boxes(shape, view.strides, start, start + len(out)):
            target = out[first - start : last - start].reshape(box)
            strides = view.strides[len(shape) - len(box) :]
            self._gather(file, view.offset + offset * width, strides, target)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Do nothing for elements that are scattered; let the system read others ahead."""
        if row not in self._views:
            self._stored.prefetch(row, start, num_elements)

    def close(self) -> None:
        """Close all files."""
        self._stored.close()
        self._files.close()

    def _gather(
        self, file: int, offset: int, strides: Sequence[int], out: npt.NDArray[Any]
    ) -> None:
        """Fill an array from elements that are `strides` apart, the first at byte `offset`."""
        if out.size == 0:
            return
        width = out.itemsize
        spans = [(size - 1) * stride for size, stride in zip(out.shape, strides, strict=True)]
        nbytes = (sum(spans) + 1) * width
        if nbytes <= max(_CHEAP_NBYTES, min(2 * out.nbytes, _BUFFER_NBYTES)):
            if self._buffer is None:
                self._buffer = buffer_for_reading(_BUFFER_NBYTES)
            raw = self._files.view(file, offset, self._buffer[:nbytes])
            steps = tuple(stride * width for stride in strides)
            out[...] = np.ndarray(out.shape, out.dtype, raw, strides=steps)
            return
        # Halves along the dimension whose elements are furthest apart.
        axis = int(np.argmax(spans))
        half = out.shape[axis] // 2
        first, second = np.split(out, [half], axis)
        self._gather(file, offset, strides, first)
        self._gather(file, offset + half * strides[axis] * width, strides, second)


def _boxes(
    shape: tuple[int, ...], strides: Sequence[int], start: int, stop: int
) -> "list[tuple[int, int, int, tuple[int, ...]]]":
    """Divide a range of a tensor's elements into boxes of whole rows.

    Returns of each box its first element and the one past its last, the first one's offset in the
    storage (in elements), and its shape, in the last dimensions.
    """
    found = []
    while start < stop:
        # The largest box that begins here: whole rows of the last dimensions.
        inner, dimensions = 1, len(shape)
        while (
            dimensions
            and start % (inner * shape[dimensions - 1]) == 0
            and inner * shape[dimensions - 1] <= stop - start
        ):
            inner *= shape[dimensions - 1]
            dimensions -= 1
        count = 1
        if dimensions:
            at = start // inner % shape[dimensions - 1]
            count = min((stop - start) // inner, shape[dimensions - 1] - at)
        box = (count, *shape[dimensions:]) if dimensions else shape
        offset, rest = 0, start
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            offset += rest % size * stride
            rest //= size
        found.append((start, start + count * inner, offset, box))
        start += count * inner
    return found
