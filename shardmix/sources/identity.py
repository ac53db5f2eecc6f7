"""Identity of a source's bytes, and the check that its files are still those that were opened.

Reads sizes, times and status, never content. Files may change while they are read, so the check is
repeated at the end.
"""

import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path

from shardmix.errors import SourceChangedError, SourceError


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The status of a file that a write changes, and that nobody can set back.

    A write changes `ctime_ns`, even if the time of modification is set back afterwards; so does a
    change of permissions, owner or links. A file that replaces another has another inode.
    """

    ctime_ns: int | None
    """Time of the last change of content or status, in nanoseconds since 1970; None if unknown."""
    inode: int | None
    """Its inode's number; None if unknown."""
    status: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Mode, number of links, user and group."""

    @classmethod
    def of(cls, status: os.stat_result) -> "FileStamp":
        """Return a file's stamp; some file systems report 0 for unknown values."""
        others = status.st_mode, status.st_nlink, status.st_uid, status.st_gid
        return cls(status.st_ctime_ns or None, status.st_ino or None, others)

    def may_be_written_since(self, then: "FileStamp") -> bool:
        """Return True if a file may have been written to or replaced since then, or only touched.

        If the time is the same, another inode means nothing: network file systems number files anew
        at each mount.
        """
        if then.ctime_ns is None or self.ctime_ns is None:
            return None not in (then.inode, self.inode) and then.inode != self.inode
        return then.ctime_ns != self.ctime_ns

    def is_written_since(self, then: "FileStamp") -> bool:
        """Return the same for a file in use, whose permissions, owner and links may change.

        A hard link (by a backup) or another mode explains another time.
        """
        is_explained = then.inode == self.inode and then.status != self.status
        return self.may_be_written_since(then) and not is_explained


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source, and its expected status when it is read."""

    path: str
    """Absolute path."""
    nbytes: int
    """Its size when it was opened."""
    mtime_ns: int | None = None
    """Time of its last modification, in nanoseconds since 1970; None if not checked."""
    header_sha256: str = ""
    """SHA-256 (hex) of its header."""
    name: str = ""
    """Its path within the model's folder, with `/`."""
    stamp: FileStamp | None = None
    """Further status of its file system; None if not checked."""
    commit: str | None = None
    """Commit of its repository on the Hub; None if it is local."""

    def check_status(self, status: os.stat_result) -> None:
        """Raise `SourceChangedError` if the file has another size or time of modification now."""
        same_time = self.mtime_ns is None or self.mtime_ns == status.st_mtime_ns
        if status.st_size != self.nbytes or not same_time:
            raise has_changed(self.path)


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """An adapter that is applied to a model while it is read."""

    name: str
    """Its public name: Hub id with revision, or the name of its folder."""
    path: str
    """Absolute path of its folder."""
    hub_id: str | None = None
    """`org/name`, if it came from the Hub."""
    commit: str | None = None
    """Its commit on the Hub."""


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """The identity of a source's bytes: its commit on the Hub, or its files when it was opened."""

    files: tuple[SourceFile, ...]
    """The files that its weights are read from."""
    hub_id: str | None = None
    """`org/name`, if it came from the Hub."""
    commit: str | None = None
    """Commit of its files on the Hub."""
    decoding: str = ""
    """Way of decoding, if its elements are decoded while they are read."""
    adapters: tuple[AppliedAdapter, ...] = ()
    """The adapters that are applied, in order; their files follow the model's own."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` for the first file that changed since it was opened.

        It finds another size, another time of modification (replaced, or written in place), or a
        missing file.
        """
        for file in self.files:
            try:
                status = Path(file.path).stat()
            except OSError as error:
                raise SourceChangedError(
                    f"was there when its header was read, and is gone now ({error.strerror})",
                    subject=file.path,
                    remedy="leave sources alone while they are in use, then start again",
                ) from None
            file.check_status(status)

    def check_untouched(self) -> None:
        """Raise `SourceChangedError` also if a file may have been written to, its times set back.

        Rights, owner and links may change.
        """
        self.check_unchanged()
        path = self.renewed().written_since(self)
        if path is not None:
            raise has_changed(path)

    def renewed(self) -> "SourceIdentity":
        """Return the same files with their present stamps. Raises `SourceError` if one is gone."""
        try:
            stamps = [FileStamp.of(Path(file.path).stat()) for file in self.files]
        except OSError as error:
            raise reading_failed(error.filename, error.errno) from None
        files = zip(self.files, stamps, strict=True)
        return replace(self, files=tuple(replace(file, stamp=stamp) for file, stamp in files))

    def written_since(self, then: "SourceIdentity") -> str | None:
        """Return the first file that may have been written to, its times set back, or None."""
        for before, after in zip(then.files, self.files, strict=True):
            if before.stamp is None or after.stamp is None:
                continue
            if after.stamp.is_written_since(before.stamp):
                return after.path
        return None


def has_changed(path: str | Path) -> SourceChangedError:
    """Return the error of a file that changed since it was opened."""
    return SourceChangedError(
        "has changed since its header was read",
        subject=path,
        remedy="leave sources alone while they are in use, then start again",
    )


def cut_short(path: str | Path, end: int) -> SourceError:
    """Return the error of a file that ends at this byte."""
    return SourceError(
        f"ends at byte {end}, before its header says; it was cut short while in use",
        subject=path,
        remedy="fetch it again",
    )


def reading_failed(path: str | Path, number: int | None) -> SourceError:
    """Return the error of a read that failed with this error number."""
    return SourceError(
        f"reading failed ({os.strerror(number or errno.EIO)})",
        subject=path,
        remedy="check its disk",
    )
