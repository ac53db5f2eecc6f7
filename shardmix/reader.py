"""Readers: byte ranges of source files, in bounded memory. Know files and bytes, not tensors.

A reader belongs to one worker. `view` returns a range, either mapped or read into the caller's
buffer; the caller says `release` when it is done, and mapped pages go back to the system at once.
Without that, resident memory would grow to the size of all sources.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from shardmix.errors import SourceError
from shardmix.filesystem import MAX_IO_NBYTES

# Files that one worker keeps open (each once more where it is mapped); enough for the shards in
# use at one time, and with eight workers still far from the usual limit of 1024.
_MAX_OPEN_FILES = 32

# A fault maps neighbours of the page it was for, up to a whole huge page: give them back too.
_GIVE_BACK_ALIGNMENT = 2 << 20


# What the widest element wants of its address.
_ELEMENT_ALIGNMENT = 8


# Private and writable, since torch wants buffers that it could write (none is written); without
# reserving memory for that, or no file larger than the memory could be mapped.
_MAP_FLAGS = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
_MAP_PROTECTION = mmap.PROT_READ | mmap.PROT_WRITE


class SizedFile(Protocol):
    """A file that is to be read, and the size it must still have then."""

    @property
    def path(self) -> str | Path:
        """Where it lies."""

    @property
    def nbytes(self) -> int:
        """Its size when its header was read."""


class Reader(Protocol):
    """Reads byte ranges of numbered files."""

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return `len(into)` bytes of a file from `offset`: mapped, or read into `into`.

        Valid until `release` or the next `view`. Raises `SourceError`.
        """

    def release(self) -> None:
        """Give back what the last `view` mapped."""

    def close(self) -> None:
        """Close all files."""


def open_reader(io: str, files: Sequence[SizedFile]) -> Reader:
    """Return the reader for `--io` mmap or pread."""
    return MmapReader(files) if io == "mmap" else PreadReader(files)


class _OpenFiles:
    """Descriptors of the files last used, oldest closed first."""

    def __init__(self, files: Sequence[SizedFile]) -> None:
        self._files = files
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, file: int) -> int:
        if file in self._descriptors:
            self._descriptors.move_to_end(file)
            return self._descriptors[file]
        source = self._files[file]
        try:
            descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"{source.path}: cannot be opened ({error.strerror})") from None
        if os.fstat(descriptor).st_size != source.nbytes:
            os.close(descriptor)
            raise SourceError(
                f"{source.path}: has changed size since its header was read; "
                "leave sources alone while they are in use, then start again"
            )
        self._descriptors[file] = descriptor
        return descriptor

    def evict_oldest(self) -> int | None:
        """Close the file unused for longest if too many are open; return its number."""
        if len(self._descriptors) <= _MAX_OPEN_FILES:
            return None
        file, descriptor = self._descriptors.popitem(last=False)
        os.close(descriptor)
        return file

    def path(self, file: int) -> str | Path:
        return self._files[file].path

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class PreadReader:
    """Reads into the caller's buffer; right for every file system."""

    def __init__(self, files: Sequence[SizedFile]) -> None:
        self._open = _OpenFiles(files)

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
                raise SourceError(
                    f"{self._open.path(file)}: reading failed ({error.strerror})"
                ) from None
            if count == 0:
                raise SourceError(
                    f"{self._open.path(file)}: ends at byte {offset + filled}, before its header "
                    "says; it was cut short while in use: fetch it again"
                )
            filled += count
        return into

    def will_need(self, file: int, offset: int, nbytes: int) -> None:
        """Let the system read ahead, into its own cache, what a `view` will soon ask for."""
        if hasattr(os, "posix_fadvise"):
            descriptor = self._open.descriptor(file)
            self._open.evict_oldest()
            os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def release(self) -> None:
        """Do nothing: the buffer is the caller's."""

    def close(self) -> None:
        """Close all files."""
        self._open.close()


class MmapReader:
    """Maps files and gives pages back behind each strip; saves a copy."""

    def __init__(self, files: Sequence[SizedFile]) -> None:
        self._open = _OpenFiles(files)
        self._maps: dict[int, mmap.mmap] = {}
        self._mapped: tuple[mmap.mmap, memoryview, int, int] | None = None

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return the mapped range; `into` gives its length."""
        mapping = self._maps.get(file)
        descriptor = self._open.descriptor(file)
        if mapping is None:
            try:
                mapping = mmap.mmap(descriptor, 0, flags=_MAP_FLAGS, prot=_MAP_PROTECTION)
            except OSError as error:
                raise SourceError(
                    f"{self._open.path(file)}: cannot be mapped ({error.strerror}); use --io pread"
                ) from None
            self._maps[file] = mapping
            evicted = self._open.evict_oldest()
            if evicted is not None:
                self._maps.pop(evicted).close()
        view = memoryview(mapping)[offset : offset + len(into)]
        self._mapped = (mapping, view, offset, len(into))
        if offset % _ELEMENT_ALIGNMENT:
            # A header of odd length, or an odd tensor before this one: typed loads want alignment.
            into[:] = view
            return into
        return view

    def release(self) -> None:
        """Give the pages of the last view back to the system."""
        if self._mapped is None:
            return
        mapping, view, offset, nbytes = self._mapped
        self._mapped = None
        with suppress(BufferError):  # after an error its traceback may still hold the view
            view.release()
        start = offset - offset % _GIVE_BACK_ALIGNMENT
        stop = min(offset + nbytes + _GIVE_BACK_ALIGNMENT, len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Unmap and close all files."""
        self.release()
        while self._maps:
            with suppress(BufferError):
                self._maps.popitem()[1].close()
        self._open.close()
