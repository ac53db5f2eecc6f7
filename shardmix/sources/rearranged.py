"""A source whose tensors are parts of another one's: some of them, or pieces of them.

Most pieces lie in one stretch. The elements of others, of a matrix that one program stores
transposed, lie apart: they are gathered while they are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.formats.tensor_table import TensorTable, View
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource
from shardmix.sources.gathering import BUFFER_NBYTES, Gatherer
from shardmix.sources.identity import SourceIdentity
from shardmix.sources.views import gather_view


class RearrangedSource(WrappedSource):
    """A source with tables of its own, read from the inner source's tensors.

    `rows` has for each tensor the inner one that it is a part of, `firsts` its first element there.
    `views` has the tensors, by row, whose elements lie apart; offsets are within the inner tensor.
    """

    def __init__(
        self,
        inner: Source,
        tensors: TensorTable,
        rows: Sequence[int],
        firsts: Sequence[int],
        views: Mapping[int, View] | None = None,
    ) -> None:
        self._views = views or {}
        if self._views:
            tensors = tensors.with_decoded(sorted(self._views))
        super().__init__(inner, tensors)
        self._rows, self._firsts = rows, firsts

    @property
    def identity(self) -> SourceIdentity:
        """Identity of the inner source, which says if tensors are read in another order."""
        inner = super().identity
        if not self._views:
            return inner
        ways = (inner.decoding, f"{len(self._views)} tensors in the order of their class")
        return replace(inner, decoding="; ".join(filter(None, ways)))

    def open_reader(self) -> TensorReader:
        """Return a reader that knows these tensors by their own rows."""
        return self._reader(self._inner.open_reader())

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return such a reader; the inner source reads its base by `shared`."""
        return self._reader(self._inner.open_shared_reader(shared))

    def _reader(self, inner: TensorReader) -> TensorReader:
        return _PartReader(inner, self.tensors, self._rows, self._firsts, self._views)


class _PartReader:
    """Reads a tensor as a part of the inner source's; a `TensorReader`."""

    def __init__(
        self,
        inner: TensorReader,
        tensors: TensorTable,
        rows: Sequence[int],
        firsts: Sequence[int],
        views: Mapping[int, View],
    ) -> None:
        self._inner, self._tensors = inner, tensors
        self._rows, self._firsts, self._views = rows, firsts, views
        self._gatherer = Gatherer(_Ranges(inner, tensors, rows))
        self.overhead_nbytes = inner.overhead_nbytes + (BUFFER_NBYTES if views else 0)

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor, from `start` on. Raises `SourceError`."""
        view = self._views.get(row)
        if view is None:
            self._inner.read(self._rows[row], self._firsts[row] + start, into)
            return
        shape, dtype = self._tensors.shapes[row], DTYPES[self._tensors.dtype_ranks[row]]
        gather_view(self._gatherer, row, view, shape, dtype, start, into)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon, if they lie in one stretch."""
        if row not in self._views:
            self._inner.prefetch(self._rows[row], self._firsts[row] + start, num_elements)

    def close(self) -> None:
        """Close the inner reader."""
        self._gatherer.close()


class _Ranges:
    """The inner source's tensors by ranges of bytes, known by the rows of their parts."""

    def __init__(self, inner: TensorReader, tensors: TensorTable, rows: Sequence[int]) -> None:
        self._inner, self._tensors, self._rows = inner, tensors, rows

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        width = element_nbytes(DTYPES[self._tensors.dtype_ranks[file]])
        self._inner.read(self._rows[file], offset // width, into)
        return into

    def close(self) -> None:
        self._inner.close()
