"""What the disks are like: free space, how much one call moves, when data goes to disk."""

import ctypes
import functools
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

MAX_IO_NBYTES = 0x7FFFF000
"""What one read or write call moves at most on Linux; more takes several."""


def free_nbytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, but never wait for a pipe, nor read a device. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Start to write a range of a file to disk, without waiting for it; a hint, no promise."""
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2


@functools.cache
def _sync_file_range() -> Callable[..., int] | None:
    """Return Linux's call; None on other systems."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call
