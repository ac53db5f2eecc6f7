"""Readers of one worker for sources that are made of one base: its bytes are read once.

A worker reads a chunk source by source. Eight adapters on one base would read the same piece of it
eight times; here the first reader's bytes are kept for the others, as long as a chunk lasts.
"""

from collections import OrderedDict
from collections.abc import Hashable

from shardmix.sources.base import Source, TensorReader


class SharedReaders:
    """The readers of bases that one worker has; a base is known by its identity."""

    def __init__(self) -> None:
        self._readers: dict[Hashable, _SharedReader] = {}

    def reader_of(self, source: Source) -> TensorReader:
        """Return the reader of a base, the same one to all who ask."""
        reader = self._readers.get(source.identity)
        if reader is None:
            reader = _SharedReader(source.open_shared_reader(self))
            self._readers[source.identity] = reader
        reader.num_users += 1
        return reader

    @property
    def num_shared(self) -> int:
        """Number of bases that several sources share: of each, a chunk's bytes are kept."""
        return sum(reader.num_users > 1 for reader in self._readers.values())

    def keep_at_most(self, chunk_nbytes: int) -> None:
        """Keep as many bytes of each base as a chunk of this size takes."""
        for reader in self._readers.values():
            reader.capacity_nbytes = max(reader.capacity_nbytes, chunk_nbytes)


class _SharedReader:
    """Reads a base for several readers, and keeps the bytes of the last chunk; a `TensorReader`."""

    def __init__(self, inner: TensorReader) -> None:
        self._inner = inner
        self._kept: OrderedDict[tuple[int, int, int], bytearray] = OrderedDict()
        self._num_kept_bytes = 0
        self._num_closed = 0
        self.num_users = 0
        self.capacity_nbytes = 0
        self.overhead_nbytes = inner.overhead_nbytes

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor, from memory if another user has just read them."""
        if self.num_users == 1 or len(into) > self.capacity_nbytes:
            self._inner.read(row, start, into)
            return
        key = row, start, len(into)
        kept = self._kept.get(key)
        if kept is not None:
            into[:] = kept
            return
        self._inner.read(row, start, into)
        spare = None
        while self._num_kept_bytes + len(into) > self.capacity_nbytes:
            _, spare = self._kept.popitem(last=False)
            self._num_kept_bytes -= len(spare)
        if spare is None or len(spare) != len(into):
            spare = bytearray(len(into))
        spare[:] = into
        self._kept[key] = spare
        self._num_kept_bytes += len(into)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon."""
        self._inner.prefetch(row, start, num_elements)

    def close(self) -> None:
        """Close the inner reader with its last user."""
        self._num_closed += 1
        if self._num_closed == self.num_users:
            self._kept.clear()
            self._inner.close()
