"""One process at a time in a folder: a lock that ends with its process, however that ends.

The system's own lock on a file in the folder (`flock`), which no crash can leave behind; the file
tells whose it is. Where a file system knows no locks, that telling has to do.
"""

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from shardmix.errors import OutputError

LOCK_NAME = "lock"
_NUM_TRIES = 5
_PAUSE_SECONDS = 0.02
_NOT_A_LOCK = (errno.ELOOP, errno.ENXIO, errno.ENOTDIR)  # a link, a socket; nobody has it
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


def lock_folder(folder: Path) -> int:
    """Make a folder if need be and lock it; return the descriptor whose closing unlocks it.

    Raises `OutputError` where another process has it, or where it is a link; and OSError.
    """
    path = folder / LOCK_NAME
    while True:
        if folder.is_symlink():
            raise OutputError(f"{folder}: is a link where a folder should be; remove it")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except (FileNotFoundError, FileExistsError):
            if folder.exists() and not folder.is_dir():
                raise
            continue  # whoever had it has just removed the folder
        try:
            _lock(descriptor, folder)
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed between opening and locking: nobody else would see it


def lock_owner(folder: Path) -> int | None:
    """Return the process that has a folder locked, or None; 0 where it cannot be told."""
    try:
        descriptor = os.open(
            # A pipe must not keep the call that opens it waiting for a writer.
            folder / LOCK_NAME,
            os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        return None if error.errno in _NOT_A_LOCK else 0
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _told(descriptor)
    except OSError:
        told = _told(descriptor)
        return told if _is_alive(told) else None
    else:
        return None
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        for _ in range(_NUM_TRIES - 1):  # who only looks whose it is has it for a moment
            with suppress(BlockingIOError):
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(_PAUSE_SECONDS)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(folder, _told(descriptor)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = _told(descriptor)
        if owner != os.getpid() and _is_alive(owner):
            raise _taken(folder, owner) from None


def _taken(folder: Path, owner: int) -> OutputError:
    who = f"process {owner}" if owner else "another process"
    if owner == os.getpid():
        who += " (this one)"
    return OutputError(
        f"{folder}: {who} is at work on this output; wait for it, stop it, or choose another output"
    )


def _told(descriptor: int) -> int:
    told = os.pread(descriptor, 20, 0)
    return int(told) if told.isdigit() else 0


def _is_alive(process: int) -> bool:
    if not process:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
