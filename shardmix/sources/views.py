"""Tensors whose elements lie in a file in another order than their shape's: transposed, expanded.

They are gathered in pieces of bounded size, each from one range of the file.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.formats.tensor_table import TensorTable, View
from shardmix.sources.gathering import BUFFER_NBYTES, UNSIGNED, Gatherer, boxes
from shardmix.sources.identity import SourceFile
from shardmix.sources.readers import StoredReader


class ViewReader:
    """Reads tensors in the order of their shapes; a `TensorReader`."""

    overhead_nbytes = BUFFER_NBYTES
    """Its buffer."""

    def __init__(
        self, files: Sequence[SourceFile], tensors: TensorTable, views: Mapping[int, View]
    ) -> None:
        self._stored = StoredReader(files, tensors)
        self._gatherer = Gatherer(files)
        self._tensors = tensors
        self._views = views

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        view = self._views.get(row)
        if view is None:
            self._stored.read(row, start, into)
            return
        width = element_nbytes(DTYPES[self._tensors.dtype_ranks[row]])
        out = np.frombuffer(into, UNSIGNED[width])
        file, shape = int(self._tensors.files[row]), self._tensors.shapes[row]
        for first, last, origin, box in boxes(shape, start, start + len(out)):
            target = out[first - start : last - start].reshape(box)
            steps = zip(origin, view.strides, strict=True)
            offset = view.offset + sum(index * stride for index, stride in steps) * width
            self._gatherer.gather(file, offset, view.strides, target)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Do nothing for elements that are scattered; let the system read others ahead."""
        if row not in self._views:
            self._stored.prefetch(row, start, num_elements)

    def close(self) -> None:
        """Close all files."""
        self._stored.close()
        self._gatherer.close()
