"""Tensors whose elements lie in a file in another order than their shape's: transposed, expanded.

They are gathered in pieces of bounded size, each from one range of the file.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.formats.tensor_table import TensorTable, View
from shardmix.sources.gathering import BUFFER_NBYTES, UNSIGNED, Gatherer, boxes
from shardmix.sources.identity import SourceFile
from shardmix.sources.readers import PreadReader, StoredReader


class ViewReader:
    """Reads tensors in the order of their shapes; a `TensorReader`."""

    overhead_nbytes = BUFFER_NBYTES
    """Its buffer."""

    def __init__(
        self, files: Sequence[SourceFile], tensors: TensorTable, views: Mapping[int, View]
    ) -> None:
        self._stored = StoredReader(files, tensors)
        self._gatherer = Gatherer(PreadReader(files))
        self._tensors = tensors
        self._views = views

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        view = self._views.get(row)
        if view is None:
            self._stored.read(row, start, into)
            return
        dtype, shape = DTYPES[self._tensors.dtype_ranks[row]], self._tensors.shapes[row]
        gather_view(self._gatherer, int(self._tensors.files[row]), view, shape, dtype, start, into)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Do nothing for elements that are scattered; let the system read others ahead."""
        if row not in self._views:
            self._stored.prefetch(row, start, num_elements)

    def close(self) -> None:
        """Close all files."""
        self._stored.close()
        self._gatherer.close()


def gather_view(
    gatherer: Gatherer,
    file: int,
    view: View,
    shape: tuple[int, ...],
    dtype: str,
    start: int,
    into: memoryview,
) -> None:
    """Fill `into` with elements of a view from `start` on, in the order of its shape."""
    width = element_nbytes(dtype)
    out = np.frombuffer(into, UNSIGNED[width])
    for first, last, origin, box in boxes(view.shape or shape, start, start + len(out)):
        target = out[first - start : last - start].reshape(box)
        steps = zip(origin, view.strides, strict=True)
        offset = view.offset + sum(index * stride for index, stride in steps) * width
        gatherer.gather(file, offset, view.strides, target)
