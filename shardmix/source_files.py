"""Files that are read: open in bounded number, and still what they were when they were planned.

Files may change while they are read. That one is still the file whose header was read is for
`check_unchanged` to say, at the end.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from shardmix.errors import SourceChangedError, SourceError

MAX_OPEN_FILES = 32
"""Files that one worker keeps open (each once more where it is mapped); enough for the shards in
use at one time, and with eight workers still far from the usual limit of 1024."""


class SizedFile(Protocol):
    """A file that is to be read, and what it must still be like then."""

    @property
    def path(self) -> str | Path:
        """Where it lies."""

    @property
    def nbytes(self) -> int:
        """Its size when its header was read."""

    @property
    def mtime_ns(self) -> int | None:
        """When it was last modified, then; None: not known, and not looked at."""


def check_unchanged(files: Sequence[SizedFile]) -> None:
    """Raise `SourceError` for the first file that is not, at its path, what it was when planned.

    What is found: another size, another time of modification (replaced, or written in place),
    or no file at all.
    """
    for source in files:
        try:
            status = Path(source.path).stat()
        except OSError as error:
            raise SourceChangedError(
                f"{source.path}: was there when its header was read and is not now "
                f"({error.strerror}); leave sources alone while they are in use, then start again"
            ) from None
        _check_same(source, status)


def _check_same(source: SizedFile, status: os.stat_result) -> None:
    same_time = source.mtime_ns is None or source.mtime_ns == status.st_mtime_ns
    if status.st_size != source.nbytes or not same_time:
        raise SourceChangedError(
            f"{source.path}: has changed since its header was read; "
            "leave sources alone while they are in use, then start again"
        )


def cut_short(path: str | Path, end: int) -> SourceError:
    """Return what is to be said of a file that ends at this byte."""
    return SourceError(
        f"{path}: ends at byte {end}, before its header says; "
        "it was cut short while in use: fetch it again"
    )


def reading_failed(path: str | Path, number: int | None) -> SourceError:
    """Return what is to be said of a read that failed with this error number."""
    return SourceError(f"{path}: reading failed ({os.strerror(number or errno.EIO)})")


def _close(descriptor: int) -> None:
    with suppress(OSError):  # of no consequence: what was read has been read
        os.close(descriptor)


class OpenFiles:
    """Descriptors of the files last used, oldest closed first."""

    def __init__(self, files: Sequence[SizedFile]) -> None:
        self._files = files
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, file: int) -> int:
        """Return the file, open for reading, and of those in use the last to be closed."""
        if file in self._descriptors:
            self._descriptors.move_to_end(file)
            return self._descriptors[file]
        source = self._files[file]
        try:
            descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SourceError(f"{source.path}: cannot be opened ({error.strerror})") from None
        try:
            _check_same(source, os.fstat(descriptor))
        except OSError as error:
            _close(descriptor)
            raise reading_failed(source.path, error.errno) from None
        except SourceError:
            _close(descriptor)
            raise
        self._descriptors[file] = descriptor
        return descriptor

    def descriptors(self, files: Sequence[int]) -> list[int] | None:
        """Return several files, open for reading until the next call; None: too many at a time."""
        if len(files) > MAX_OPEN_FILES:
            return None
        found = [self.descriptor(file) for file in files]
        while self.evict_oldest() is not None:
            pass
        return found

    def evict_oldest(self) -> int | None:
        """Close the file unused for longest if too many are open; return its number."""
        if len(self._descriptors) <= MAX_OPEN_FILES:
            return None
        file, descriptor = self._descriptors.popitem(last=False)
        _close(descriptor)
        return file

    def path(self, file: int) -> str | Path:
        """Return where it lies."""
        return self._files[file].path

    def nbytes(self, file: int) -> int:
        """Return its size when it was planned."""
        return self._files[file].nbytes

    def nbytes_now(self, file: int) -> int:
        """Return its size now."""
        try:
            return os.fstat(self.descriptor(file)).st_size
        except OSError as error:
            raise reading_failed(self.path(file), error.errno) from None

    def close(self) -> None:
        """Close all."""
        while self._descriptors:
            _close(self._descriptors.popitem()[1])
