"""A source whose tensors are parts of another one's: some of them, or pieces of them."""

from collections.abc import Sequence

from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource


class RearrangedSource(WrappedSource):
    """A source with tables of its own, read from the inner source's tensors.

    `rows` has for each tensor the inner one that it is a part of, `firsts` its first element there.
    """

    def __init__(
        self, inner: Source, tensors: TensorTable, rows: Sequence[int], firsts: Sequence[int]
    ) -> None:
        super().__init__(inner, tensors)
        self._rows, self._firsts = rows, firsts

    def open_reader(self) -> TensorReader:
        """Return a reader that knows these tensors by their own rows."""
        return _PartReader(self._inner.open_reader(), self._rows, self._firsts)

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return such a reader; the inner source reads its base by `shared`."""
        return _PartReader(self._inner.open_shared_reader(shared), self._rows, self._firsts)


class _PartReader:
    """Reads a tensor as a part of the inner source's; a `TensorReader`."""

    def __init__(self, inner: TensorReader, rows: Sequence[int], firsts: Sequence[int]) -> None:
        self._inner, self._rows, self._firsts = inner, rows, firsts
        self.overhead_nbytes = inner.overhead_nbytes

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor, from `start` on. Raises `SourceError`."""
        self._inner.read(self._rows[row], self._firsts[row] + start, into)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon."""
        self._inner.prefetch(self._rows[row], self._firsts[row] + start, num_elements)

    def close(self) -> None:
        """Close the inner reader."""
        self._inner.close()
