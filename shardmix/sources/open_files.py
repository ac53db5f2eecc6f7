"""Files that are read: open in bounded number, and still what they were when they were planned.

Files may change while they are read. That one is still the file whose header was read is for
`check_unchanged` to say, at the end.
"""

import errno
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardmix.errors import SourceChangedError, SourceError

MAX_OPEN_FILES = 32
"""Files that one worker keeps open (each once more where it is mapped); enough for the shards in
use at one time, and with eight workers still far from the usual limit of 1024."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The status of a file that a write changes, and that nobody can set back.

    A file that is written to gets another `ctime_ns`, also if its time of modification is set back
    afterwards; so does one whose rights, owner or links change. A file that takes another's place
    has another inode.
    """

    ctime_ns: int | None
    """When its content or status last changed, in nanoseconds since 1970; None: not known."""
    inode: int | None
    """Its inode's number; None: not known."""
    status: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Mode, number of links, user and group."""

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        """Return a file's stamp; some file systems tell 0 for what they don't know."""
        others = status.st_mode, status.st_nlink, status.st_uid, status.st_gid
        return cls(status.st_ctime_ns or None, status.st_ino or None, others)

    def may_be_written_since(self, then: "FileStamp") -> bool:
        """Tell whether a file may have been written to or replaced since then, or only touched.

        Where the time is the same, another inode means nothing: network file systems number files
        anew each time they are mounted.
        """
        if then.ctime_ns is None or self.ctime_ns is None:
            return None not in (then.inode, self.inode) and then.inode != self.inode
        return then.ctime_ns != self.ctime_ns

    def is_written_since(self, then: "FileStamp") -> bool:
        """Tell the same of a file in use, of which rights, owner and links may change.

        A hard link (by a backup) or another mode explains another time.
        """
        is_explained = then.inode == self.inode and then.status != self.status
        return self.may_be_written_since(then) and not is_explained


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

    @property
    def stamp(self) -> FileStamp | None:
        """What else its file system told of it, then; None: not looked at."""


def check_unchanged(files: Sequence[SizedFile]) -> None:
    """Raise `SourceError` for the first file that is not, at its path, what it was when planned.

    What is found: another size, another time of modification (replaced, or written in place), or no
    file at all.
    """
    for source in files:
        try:
            status = Path(source.path).stat()
        except OSError as error:
            raise SourceChangedError(
                f"was there when its header was read and is not now ({error.strerror})",
                subject=source.path,
                remedy="leave sources alone while they are in use, then start again",
            ) from None
        _check_same(source, status)


def stamps(files: Sequence[SizedFile]) -> list[FileStamp]:
    """Return what file systems tell of files now. Raises `SourceError` if they are unreadable."""
    try:
        return [FileStamp.of(Path(source.path).stat()) for source in files]
    except OSError as error:
        raise reading_failed(error.filename, error.errno) from None


def touched(
    files: Sequence[SizedFile], then: Sequence[FileStamp | None], now: Sequence[FileStamp]
) -> str | Path | None:
    """Return the first file that may have been written to, its times set back; None if none was."""
    for source, before, after in zip(files, then, now, strict=True):
        if before is not None and after.is_written_since(before):
            return source.path
    return None


def _check_same(source: SizedFile, status: os.stat_result) -> None:
    same_time = source.mtime_ns is None or source.mtime_ns == status.st_mtime_ns
    if status.st_size != source.nbytes or not same_time:
        raise has_changed(source.path)


def has_changed(path: str | Path) -> SourceChangedError:
    """Return what is to be said of a file that is not what it was when planned."""
    return SourceChangedError(
        "has changed since its header was read",
        subject=path,
        remedy="leave sources alone while they are in use, then start again",
    )


def cut_short(path: str | Path, end: int) -> SourceError:
    """Return what is to be said of a file that ends at this byte."""
    return SourceError(
        f"ends at byte {end}, before its header says; it was cut short while in use",
        subject=path,
        remedy="fetch it again",
    )


def reading_failed(path: str | Path, number: int | None) -> SourceError:
    """Return what is to be said of a read that failed with this error number."""
    return SourceError(
        f"reading failed ({os.strerror(number or errno.EIO)})",
        subject=path,
        remedy="check its disk",
    )


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
            raise SourceError(
                f"cannot be opened ({error.strerror})",
                subject=source.path,
                remedy="check its permissions and its disk",
            ) from None
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
