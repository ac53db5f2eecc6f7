"""Readers: byte ranges of source files, in bounded memory. Know files and bytes, not tensors.

A reader belongs to one worker. `view` returns a range, either mapped or read into the caller's
buffer; the caller says `release` when it is done, and mapped pages go back to the system at once.
Without that, resident memory would grow to the size of all sources.

What `view` and `release` let pass was in the file, whatever becomes of it.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from shardmix.errors import SourceError
from shardmix.sources.open_files import (
    OpenFiles,
    SizedFile,
    cut_short,
    reading_failed,
)
from shardmix.system.buffers import HUGE_PAGE_NBYTES
from shardmix.system.files import MAX_IO_NBYTES
from shardmix.system.sigbus import GuardedRange, guard, unguard

MAX_MAPPED_AT_ONCE = 3
"""Of how many sources one chunk can be mapped; of more, the others are read. Each takes memory."""

# What the widest element wants of its address.
_ELEMENT_ALIGNMENT = 8


# Private and writable, since torch wants buffers that it could write (none is written); without
# reserving memory for that, or no file larger than the memory could be mapped.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE


class Reader(Protocol):
    """Reads byte ranges of numbered files."""

    def descriptors(self, files: Sequence[int]) -> Sequence[int] | None:
        """Return files open for reading, valid until the next call; None where only views are had.

        Raises `SourceError`.
        """

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return `len(into)` bytes of a file from `offset`: mapped, or read into `into`.

        Valid until `release`. Raises `SourceError`.
        """

    def release(self) -> None:
        """End the use of all views; whatever came of them counts only after this.

        Raises `SourceError` where a mapped view held bytes that the file did not.
        """

    def close(self) -> None:
        """Close all files."""


def open_reader(io: str, files: Sequence[SizedFile]) -> Reader:
    """Return the reader for `--io` mmap or pread."""
    return MmapReader(files) if io == "mmap" else PreadReader(files)


class PreadReader:
    """Reads into the caller's buffer; right for every file system."""

    def __init__(self, files: Sequence[SizedFile]) -> None:
        self._open = OpenFiles(files)

    def descriptors(self, files: Sequence[int]) -> Sequence[int] | None:
        """Return files open for reading, valid until the next call; None: too many at a time."""
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
        return into

    def will_need(self, file: int, offset: int, nbytes: int) -> None:
        """Let the system read ahead, into its own cache, what a `view` will soon ask for.

        Returns when it is asked for, which may take as long as half of the reading.
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


@dataclass(frozen=True, slots=True)
class _View:
    """A range that is in use, and where it comes from."""

    file: int
    mapping: mmap.mmap
    content: memoryview
    offset: int
    nbytes: int


class MmapReader:
    """Maps files and gives pages back behind each chunk; saves a copy.

    A fault maps neighbours of the page it was for, up to a whole huge page: so pages are given back
    by that. The last one stays if the next view goes on in it: to map it again is most of the cost.

    A page that cannot be loaded reads as zeros and is found by `release`: see `mapped_faults`.
    """

    def __init__(self, files: Sequence[SizedFile]) -> None:
        self._open = OpenFiles(files)
        self._maps: dict[int, tuple[mmap.mmap, GuardedRange]] = {}
        self._used: list[_View] = []
        self._kept: list[tuple[int, int]] = []
        """File and beginning of each huge page in which the last views ended."""
        self._others = PreadReader(files)

    def descriptors(self, files: Sequence[int]) -> None:
        """Return None: what is mapped is not read."""

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return the mapped range; `into` gives its length."""
        if len(self._used) == MAX_MAPPED_AT_ONCE:
            return self._others.view(file, offset, into)
        mapping = self._mapping(file)
        begun = file, offset - offset % HUGE_PAGE_NBYTES
        if begun in self._kept:
            self._kept.remove(begun)
        else:
            self._give_back_kept()
        content = memoryview(mapping)[offset : offset + len(into)]
        self._used.append(_View(file, mapping, content, offset, len(into)))
        if offset % _ELEMENT_ALIGNMENT:
            # A header of odd length, or an odd tensor before this one: typed loads want alignment.
            into[:] = content
            return into
        return content

    def _mapping(self, file: int) -> mmap.mmap:
        descriptor = self._open.descriptor(file)
        if file not in self._maps:
            try:
                # The length that views count on, also where the file has just become shorter.
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
            # After the use: what was cut off before it is seen now, in the middle of a page, too,
            # where the rest of the page reads as zeros and nothing faults.
            nbytes_now = self._open.nbytes_now(used.file)
            if nbytes_now < used.offset + used.nbytes:
                raise cut_short(self._open.path(used.file), nbytes_now)
            if self._maps[used.file][1].failed:
                raise reading_failed(self._open.path(used.file), errno.EIO)
        while (evicted := self._open.evict_oldest()) is not None:  # now that none is in use
            self._give_back_kept()
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
                self._kept.append((used.file, stop))
        return given

    def _give_back_kept(self) -> None:
        for file, start in self._kept:
            mapping = self._maps[file][0]
            nbytes = min(HUGE_PAGE_NBYTES, len(mapping) - start)
            mapping.madvise(mmap.MADV_DONTNEED, start, nbytes)
        self._kept.clear()

    def _unmap(self, file: int) -> None:
        mapping, guarded = self._maps.pop(file)
        unguard(guarded)
        mapping.close()

    def close(self) -> None:
        """Unmap and close all files."""
        self._give_back()
        self._give_back_kept()
        while self._maps:
            with suppress(BufferError):
                self._unmap(next(iter(self._maps)))
        self._open.close()
        self._others.close()
