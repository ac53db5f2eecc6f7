"""Readers: byte ranges of source files, in bounded memory. Know files and bytes, not tensors.

A reader belongs to one worker. `view` returns a range, either mapped or read into the caller's
buffer. The caller calls `release` when it is done, and mapped pages go back to the system at once;
otherwise resident memory would grow to the size of all sources. Bytes that `view` and `release` let
pass were in the file, whatever happens to it.

`--io auto` means pread, which surely takes less memory and needs no signal handler; neither is
always faster (docs/performance.md). A private writable mapping, which torch's buffers want, counts
against memory unless it is made with `MAP_NORESERVE`; without that no file larger than memory could
be mapped. With large folios in the page cache a fault maps up to 2 MiB, so pages are given back by
whole huge pages: by the range that was read, the process grew to 680 MB instead of 255 MB in a
merge of 6.6 GB.

A file that is replaced, or written in place at its length, gives no error in either way. So sizes
and times of modification are compared at opening and at the end, and then `ctime` as well. If
another mode, owner or number of links explains a new `ctime`, it is accepted: a backup that makes
hard links must not end a merge of hours. If nothing explains it, everything is computed again and
compared with the output.
"""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.errors import SourceError
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import MAX_MAPPED_AT_ONCE, Source
from shardmix.sources.identity import SourceFile, cut_short, reading_failed
from shardmix.sources.open_files import OpenFiles
from shardmix.sources.shared_readers import SharedReaders
from shardmix.system.buffers import HUGE_PAGE_NBYTES
from shardmix.system.files import MAX_IO_NBYTES
from shardmix.system.sigbus import GuardedRange, guard, unguard

# Alignment of the widest element.
_ELEMENT_ALIGNMENT = 8


# Private and writable, since torch wants writable buffers (none is written); without reserving
# memory for that, or no file larger than the memory could be mapped.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE


@dataclass(slots=True)
class ReadCount:
    """The bytes of sources' files that one worker has read so far."""

    num_bytes: int = 0


_COUNT: ContextVar[ReadCount | None] = ContextVar("_COUNT", default=None)


@contextmanager
def counted_reads() -> Iterator[ReadCount]:
    """Count the bytes that readers made in this context, and by this thread, read from files.

    A tensor that is decoded has other bytes than those that were read for it.
    """
    count = ReadCount()
    token = _COUNT.set(count)
    try:
        yield count
    finally:
        _COUNT.reset(token)


class Reader(Protocol):
    """Reads byte ranges of numbered files."""

    def descriptors(self, files: Sequence[int]) -> Sequence[int] | None:
        """Return files open for reading, valid until the next call; None if only views are
        possible.

        Raises `SourceError`.
        """

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return `len(into)` bytes of a file from `offset`: mapped, or read into `into`.

        Valid until `release`. Raises `SourceError`.
        """

    def release(self) -> None:
        """End the use of all views; results made from them count only after this.

        Raises `SourceError` if a mapped view had bytes that the file did not have.
        """

    def close(self) -> None:
        """Close all files."""


def open_reader(io: str, files: Sequence[SourceFile], decoders: Sequence[Source] = ()) -> Reader:
    """Return the reader for `--io` mmap or pread.

    Numbers after those of the files stand for the streams that these sources decode.
    """
    stored = MmapReader(files) if io == "mmap" else PreadReader(files)
    return DecodingReader(stored, len(files), decoders) if decoders else stored


class PreadReader:
    """Reads into the caller's buffer; works on every file system."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._open = OpenFiles(files)
        self._count = _COUNT.get() or ReadCount()

    def descriptors(self, files: Sequence[int]) -> Sequence[int] | None:
        """Return files open until the next call, or None if they are too many."""
        return self._open.descriptors(files)

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Read into `into` and return it."""
        descriptor = self._open.descriptor(file)
        self._open.evict_oldest()
        filled = 0
        while filled < len(into):
            part = into[filled : filled + MAX_IO_NBYTES]
            try:
                count = os.preadv(descriptor, [part], offset + filled)
            except OSError as error:
                raise reading_failed(self._open.path(file), error.errno) from None
            if count == 0:
                raise cut_short(self._open.path(file), offset + filled)
            filled += count
        self._count.num_bytes += filled
        return into

    def will_need(self, file: int, offset: int, nbytes: int) -> None:
        """Let the system read ahead, into its own cache, the bytes of a coming `view`.

        Returns once they are requested, which may take as long as half of the reading.
        """
        if hasattr(os, "posix_fadvise"):
            descriptor = self._open.descriptor(file)
            self._open.evict_oldest()
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def release(self) -> None:
        """Do nothing: the buffer is the caller's."""

    def close(self) -> None:
        """Close all files."""
        self._open.close()


class StoredReader:
    """Reads tensors that files store as they are; a `TensorReader`."""

    overhead_nbytes = 0
    """It reads directly into the caller's buffer."""

    def __init__(self, files: Sequence[SourceFile], tensors: TensorTable) -> None:
        self._files = PreadReader(files)
        self._tensors = tensors

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        if into:
            self._files.view(int(self._tensors.files[row]), self._position(row, start), into)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Let the system read elements ahead, into its own cache."""
        first, stop = self._position(row, start), self._position(row, start + num_elements)
        if first < stop:
            self._files.will_need(int(self._tensors.files[row]), first, stop - first)

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def _position(self, row: int, element: int) -> int:
        width = element_nbytes(DTYPES[self._tensors.dtype_ranks[row]])
        return int(self._tensors.starts[row]) + element * width


class _DecodedStream:
    """All tensors that a source decodes, as one stream of bytes."""

    def __init__(self, source: Source, shared: SharedReaders) -> None:
        tensors = source.tensors
        if tensors.decoded is None:
            raise AssertionError(f"{source.text}: decodes nothing")
        self._rows = np.flatnonzero(tensors.decoded)
        self._starts = tensors.starts[self._rows]
        self._tensors = tensors
        self.reader = source.open_shared_reader(shared)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the stream's bytes from `offset` on, the start of an element."""
        number = int(self._starts.searchsorted(offset, side="right")) - 1
        while into:
            row = int(self._rows[number])
            first = offset - int(self._starts[number])
            part = into[: int(self._tensors.nbytes[row]) - first]
            if part:
                width = element_nbytes(DTYPES[self._tensors.dtype_ranks[row]])
                self.reader.read(row, first // width, part)
            offset, into, number = offset + len(part), into[len(part) :], number + 1


class DecodingReader:
    """Reads files with another reader, and decoded tensors with their sources' readers."""

    def __init__(self, stored: Reader, num_files: int, decoders: Sequence[Source]) -> None:
        self._stored = stored
        self._num_files = num_files
        self._shared = SharedReaders()
        self._streams = [_DecodedStream(decoder, self._shared) for decoder in decoders]

    def descriptors(self, files: Sequence[int]) -> Sequence[int] | None:
        """Return files open for reading, or None if one of them is a stream."""
        if any(file >= self._num_files for file in files):
            return None
        return self._stored.descriptors(files)

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return bytes of a file or of a stream from `offset`."""
        if file < self._num_files:
            return self._stored.view(file, offset, into)
        self._shared.keep_at_most(len(into))  # decoded, a base's elements are no narrower
        self._streams[file - self._num_files].read(offset, into)
        return into

    def release(self) -> None:
        """End the use of all views."""
        self._stored.release()

    def close(self) -> None:
        """Close all files."""
        for stream in self._streams:
            stream.reader.close()
        self._stored.close()


@dataclass(frozen=True, slots=True)
class _View:
    """A range in use, and its mapping."""

    file: int
    mapping: mmap.mmap
    content: memoryview
    offset: int
    nbytes: int


class MmapReader:
    """Maps files and gives pages back after each chunk; saves a copy.

    A fault maps neighbours of its page, up to a whole huge page, so pages are given back by huge
    pages. The last one stays if the next view continues in it: mapping it again would be most of
    the cost.

    A page that cannot be loaded reads as zeros, and `release` finds it: see `system.sigbus`.
    """

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._open = OpenFiles(files)
        self._maps: dict[int, tuple[mmap.mmap, GuardedRange]] = {}
        self._used: list[_View] = []
        self._stay_mapped: list[tuple[int, int]] = []
        """File and start of each huge page in which the last views ended."""
        self._others = PreadReader(files)
        self._count = _COUNT.get() or ReadCount()

    def descriptors(self, files: Sequence[int]) -> None:
        """Return None: mapped files are not read."""

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return the mapped range; `into` gives its length."""
        if len(self._used) == MAX_MAPPED_AT_ONCE:
            return self._others.view(file, offset, into)
        mapping = self._mapping(file)
        begun = file, offset - offset % HUGE_PAGE_NBYTES
        if begun in self._stay_mapped:
            self._stay_mapped.remove(begun)
        else:
            self._give_back_mapped()
        content = memoryview(mapping)[offset : offset + len(into)]
        self._count.num_bytes += len(into)
        self._used.append(_View(file, mapping, content, offset, len(into)))
        if offset % _ELEMENT_ALIGNMENT:
            # A header of odd length, or an odd tensor before this one: typed loads want
            # alignment.
            into[:] = content
            return into
        return content

    def _mapping(self, file: int) -> mmap.mmap:
        descriptor = self._open.descriptor(file)
        if file not in self._maps:
            try:
                # The length that views rely on, even if the file has just become shorter.
                nbytes = self._open.nbytes(file)
                mapping = mmap.mmap(descriptor, nbytes, flags=_MAP_FLAGS, prot=_MAP_PROTECTION)
                self._maps[file] = mapping, guard(mapping)
            except ValueError:  # it has
                raise cut_short(self._open.path(file), self._open.nbytes_now(file)) from None
            except OSError as error:
                raise SourceError(
                    f"cannot be mapped ({error.strerror})",
                    subject=self._open.path(file),
                    remedy="use --io pread",
                ) from None
        return self._maps[file][0]

    def release(self) -> None:
        """Give the views' pages back to the system; raise if they were not the files'."""
        for used in self._give_back():
            # After the use: a cut before it shows now, also one in the middle of a page, where
            # the rest of the page reads as zeros and nothing faults.
            nbytes_now = self._open.nbytes_now(used.file)
            if nbytes_now < used.offset + used.nbytes:
                raise cut_short(self._open.path(used.file), nbytes_now)
            if self._maps[used.file][1].failed:
                raise reading_failed(self._open.path(used.file), errno.EIO)
        while (evicted := self._open.evict_oldest()) is not None:  # now that none is in use
            self._give_back_mapped()
            self._unmap(evicted)

    def _give_back(self) -> list[_View]:
        given, self._used = self._used, []
        for used in given:
            with suppress(BufferError):  # after an error its traceback may still hold the view
                used.content.release()
            start, end = used.offset, used.offset + used.nbytes
            start, stop = start - start % HUGE_PAGE_NBYTES, end - end % HUGE_PAGE_NBYTES
            if start < stop:
                used.mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)
            if stop < end:
                self._stay_mapped.append((used.file, stop))
        return given

    def _give_back_mapped(self) -> None:
        for file, start in self._stay_mapped:
            mapping = self._maps[file][0]
            nbytes = min(HUGE_PAGE_NBYTES, len(mapping) - start)
            mapping.madvise(mmap.MADV_DONTNEED, start, nbytes)
        self._stay_mapped.clear()

    def _unmap(self, file: int) -> None:
        mapping, guarded = self._maps.pop(file)
        unguard(guarded)
        mapping.close()

    def close(self) -> None:
        """Unmap and close all files."""
        self._give_back()
        self._give_back_mapped()
        while self._maps:
            with suppress(BufferError):
                self._unmap(next(iter(self._maps)))
        self._open.close()
        self._others.close()
