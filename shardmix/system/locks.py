"""One process at a time in a folder, by a lock that ends with its process.

It is the system's own lock on a file in the folder (`flock`), which no crash leaves behind. The
file holds the process id of its owner. On a file system without locks that id takes the lock's
part.
"""

import errno
import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.system.held_folder import HeldFolder

LOCK_NAME = "lock"
_NUM_TRIES = 5
_PAUSE_SECONDS = 0.02
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)


def lock_folder(folder: HeldFolder) -> int | None:
    """Lock a folder; return the descriptor whose closing unlocks it.

    Returns None if its former owner removed the lock in the meantime. Raises OSError, and
    `OutputError` if another process has the lock or the entry is not a lock.
    """
    descriptor = folder.open_own(LOCK_NAME)
    try:
        _lock(descriptor, folder.path)
        there = folder.entry(LOCK_NAME)
        if there is not None and os.path.samestat(os.fstat(descriptor), there):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)  # removed before we locked it: another process would not see our lock
    return None


def unlock(lock: int) -> None:
    """Unlock a folder."""
    with suppress(OSError):  # closing reports failed writes; a lock has none
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child process may hold a copy of the descriptor
    with suppress(OSError):
        os.close(lock)


def lock_owner(folder: HeldFolder) -> int | None:
    """Return the id of the process that has a folder locked; None if unlocked, 0 if unknown."""
    try:
        file = folder.open_regular(LOCK_NAME)
    except (FileNotFoundError, OutputError):  # an entry that is not a lock has no owner
        return None
    except OSError:
        return 0
    with file:
        descriptor = file.fileno()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _told(descriptor)
        except OSError:
            told = _told(descriptor)
            return told if _is_alive(told) else None
    return None


def _lock(descriptor: int, folder: Path) -> None:
    try:
        for _ in range(_NUM_TRIES - 1):  # `lock_owner` holds it for a moment
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
        f"{who} is at work on this output",
        subject=folder,
        remedy="wait for it, stop it, or choose another output",
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
