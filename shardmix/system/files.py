"""Properties of disks: free space, the limits of one call, and files that are safe to open.

A model's folder comes from a stranger. A name in it may be a pipe that nobody writes to, a device
without an end, or a link to something outside the model.
"""

import ctypes
import errno
import functools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shardmix.errors import SourceError, unreadable

MAX_IO_NBYTES = 0x7FFFF000
"""The most bytes that one read or write call moves on Linux; more takes several calls."""

LFS_FINDING = "is a Git LFS pointer, not the file that it stands for"
LFS_REMEDY = "run `git lfs pull` there"
"""The second half of an error about such a pointer."""
_CHUNK_NBYTES = 1 << 20
_LFS_START = b"version https://git-lfs.github.com/spec/"


def free_nbytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write at `path`, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading without ever waiting; raise `OSError` if it is not a regular file."""
    if not stat.S_ISREG(path.stat().st_mode):  # a device is not even opened
        raise _not_a_file(path)
    # If it became a pipe just now, a blocking open would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_file(path)
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, *, max_nbytes: int) -> bytes:
    """Return the content of a small file; raise `OSError` if it is not regular, or not small."""
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > max_nbytes:
            raise OSError(errno.EFBIG, f"{nbytes} bytes, more than the {max_nbytes} allowed")
        return file.read(max_nbytes)


def same_content(one: Path, other: Path) -> bool:
    """Return True if two files hold the same bytes. Raises `SourceError` if one cannot be read."""
    with _readable(one) as first, _readable(other) as second:
        a, b = os.fstat(first.fileno()), os.fstat(second.fileno())
        if os.path.samestat(a, b):
            return True
        if a.st_size != b.st_size:
            return False
        while True:
            chunk = first.read(_CHUNK_NBYTES)
            if chunk != second.read(_CHUNK_NBYTES):
                return False
            if not chunk:
                return True


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def is_lfs_pointer(start: bytes) -> bool:
    """Return True if a file that starts so is a Git LFS pointer in place of the file."""
    return start.startswith(_LFS_START)


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder below one, itself first: its path, its folders' names, its files' names.

    A folder that does not exist has no entries. Raises `OSError` for one that cannot be read, so
    that its content is never skipped in silence.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for path, folders, files in os.walk(folder, onerror=fail):
        yield Path(path), folders, files


def refuse_link_outside(folder: Path, path: Path) -> None:
    """Raise `SourceError` if a path in a model's folder leads outside it by a link.

    The Hub's cache is made of such links, `snapshots/<commit>/<file>` to `blobs/<etag>` beside it.
    Only these are followed.
    """
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target.is_relative_to(home):
        return
    for snapshot in (home, *home.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            if target.parent == repository / "blobs":
                return
            break
    raise SourceError(
        f"is a link to {target}, outside the model's folder; links are followed only in the "
        "Hub's cache",
        subject=path,
        remedy="put the file itself there, or name the folder that it lies in",
    )


def _not_a_file(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Start to write a range of a file to disk, without waiting; only a hint."""
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    """Return Linux's call, or None on other systems."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
