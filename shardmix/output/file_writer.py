"""Writes a shard in place: chunks at their offsets, in any order, into a file of its final size.

No shard is ever buffered. Knows bytes and offsets, not tensors.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

from shardmix.errors import OutputError, writing_failed
from shardmix.system.files import MAX_IO_NBYTES, start_writeback
from shardmix.system.hashing import read_range
from shardmix.system.held_folder import HeldFolder
from shardmix.system.page_cache import DROPPED_AT_ONCE_NBYTES, drop_pages


class ShardWriter:
    """One output file, new or an earlier merge's, open for chunks from several threads."""

    def __init__(
        self, folder: HeldFolder, name: str, *, file_nbytes: int, keep_cached: bool = True
    ) -> None:
        self._path = path = folder.path / name
        self._file_nbytes = file_nbytes
        self._keep_cached = keep_cached
        self._num_cached = 0  # since pages were dropped; threads may count a leaf too few
        self._lock = threading.Lock()
        self._descriptor = -1
        try:
            self._descriptor = folder.open_own(name)
            os.truncate(self._descriptor, file_nbytes)
        except OSError as error:
            self.close()
            raise writing_failed(path, error) from None

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset of the file, by as many calls as needed."""
        written = 0
        try:
            while written < len(data):
                part = data[written : written + MAX_IO_NBYTES]
                written += os.pwrite(self._descriptor, part, offset + written)
        except OSError as error:
            raise writing_failed(self._path, error) from None

    def read(self, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
        """Yield the written bytes of a range, in pieces as large as the buffer."""
        try:
            yield from read_range(self._descriptor, start, stop, buffer)
        except OSError as error:
            raise OutputError(
                f"cannot be read ({error.strerror})",
                subject=self._path,
                remedy="check its permissions and its disk",
            ) from None

    def start_writeback(self, offset: int, nbytes: int) -> None:
        """Start to write a range to disk, so that `finish` has little to wait for."""
        start_writeback(self._descriptor, offset, nbytes)
        self._num_cached += nbytes
        if self._num_cached >= DROPPED_AT_ONCE_NBYTES:
            self._drop_pages()

    def finish(self, head: Iterable[bytes], *, fsync: bool) -> None:
        """Write the file's first bytes, in pieces, force it to disk if asked, and close it.

        They come last: until then the file is not valid safetensors.
        """
        position = 0
        for piece in head:
            self.write(position, memoryview(piece))
            position += len(piece)
        try:
            if fsync:
                os.fsync(self._descriptor)
                self._drop_pages()
            self._close()  # network disks may only now report that they are full
        except OSError as error:
            raise writing_failed(self._path, error) from None

    def _drop_pages(self) -> None:
        """Drop the pages that are on the disk by now; the rest follows later."""
        self._num_cached = 0
        if not self._keep_cached:
            drop_pages(self._descriptor, 0, self._file_nbytes)

    def close(self) -> None:
        """Close the file, finished or not."""
        # Each leaf of an unfinished file is hashed again before it counts.
        with suppress(OSError):
            self._close()

    def _close(self) -> None:
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
