"""The hidden folder beside an output: found or made, this user's own, and locked.

Its name is predictable, and in `/tmp` or a group's folder anybody may put a link there, before the
merge or during it. So folders are held by their descriptors (`held_folder`). The hidden folder has
mode 0700; one of another user, or one that others may write to, is refused, naming its owner. On
disks that give all files to one user (FAT, some network disks) that user is found by a file that is
made and removed at once.
"""

import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.system.held_folder import HeldFolder, open_folder, user_name
from shardmix.system.locks import LOCK_NAME, lock_folder, unlock

JOURNAL = "journal"
MODEL = "model"
SCORES = "scores"  # scores so far, before the merge begins
FACTORS = "factors"  # low-rank factors so far, before an adapter is laid out
PLACING = "placing"  # there while new and old are swapped: the inodes of both
ASIDE = "old"  # the old model during the swap, on systems that cannot swap in one step
_OTHERS_WRITE = 0o022
_NUM_TRIES = 100  # others may be removing it each time


def staging_path(output: Path) -> Path:
    """Return the hidden folder that belongs to an output."""
    return output.with_name(f".{output.name}.shardmix")


class LockedFolder:
    """The hidden folder of an output, locked, and the folders that had to be made around it."""

    def __init__(self, output: Path) -> None:
        self._made: list[tuple[HeldFolder, str, HeldFolder]] = []  # parent, name, folder
        self._lock: int | None = None
        self._held = ExitStack()
        self._name = staging_path(output).name
        is_new = False
        try:
            self.parent = self._open_parent(output)
            """The folder of the output and of this folder."""
            with suppress(FileExistsError):
                self.parent.make_folder(self._name, 0o700)
                is_new = True
            self.hidden = self._held.enter_context(own_hidden(self.parent, self._name))
            """The folder itself."""
            self.hidden.limit_permissions(0o700)
            self._lock = lock_folder(self.hidden)
        except BaseException:
            if is_new:
                with suppress(OSError):  # others are already at work there
                    self.parent.remove_empty(self._name)
            self.remove_made()
            self.close()
            raise

    @property
    def is_locked(self) -> bool:
        """True if it is locked and still has its path, so that others see the lock."""
        return self._lock is not None and self.parent.holds(self._name, self.hidden)

    def _open_parent(self, output: Path) -> HeldFolder:
        missing: list[str] = []
        place = output.parent
        while True:
            try:
                folder = self._held.enter_context(open_folder(place))
                break
            except FileNotFoundError:
                missing.append(place.name)
                place = place.parent
        for name in reversed(missing):
            is_new = True
            try:
                folder.make_folder(name, 0o777)
            except FileExistsError:
                is_new = False
            made = self._held.enter_context(folder.subfolder(name))
            if is_new:
                self._made.append((folder, name, made))
            folder = made
        return folder

    def remove_empty(self) -> None:
        """Remove the staging folder, empty but for its lock, and the folders made for it."""
        # The folder after the lock: a process that comes now makes a lock of its own.
        self.hidden.remove(LOCK_NAME)
        with suppress(OSError):  # not empty: others are at work there
            _remove_if_same(self.parent, self._name, self.hidden)
            self.remove_made()

    def remove_made(self) -> None:
        """Remove the folders that were made around it, if they are empty."""
        with suppress(OSError):
            for parent, name, folder in reversed(self._made):
                _remove_if_same(parent, name, folder)

    def close(self) -> None:
        """Unlock and close it."""
        if self._lock is not None:
            unlock(self._lock)
        self._held.close()


def open_locked(output: Path) -> LockedFolder:
    """Make or reuse an output's staging folder, and lock it."""
    for _ in range(_NUM_TRIES):
        try:
            opened = LockedFolder(output)
        except FileNotFoundError as error:  # just removed by its former owner
            last = error
            continue
        if opened.is_locked:
            return opened
        last = FileNotFoundError(2, "it vanishes whenever it is made")
        opened.close()
    raise last


def own_hidden(parent: HeldFolder, name: str) -> HeldFolder:
    """Open a staging folder that is this user's, and that nobody else may write to."""
    path = parent.path / name
    there = parent.entry(name)
    if there is None:
        raise FileNotFoundError(2, "No such file or directory", str(path))
    if not stat.S_ISDIR(there.st_mode):
        what = "a link" if stat.S_ISLNK(there.st_mode) else "no folder"
        raise OutputError(
            f"is {what}, where a merge has a folder of its own; it was left as it is",
            subject=path,
            remedy="find out who put it there, then remove it, or choose another output",
        )
    owner = _owner_if_private(path, parent, there)
    hidden = parent.subfolder(name)
    try:
        hidden.owner = owner
        # It may be another one by now.
        _owner_if_private(path, parent, hidden.status())
    except BaseException:
        hidden.close()
        raise
    return hidden


def _owner_if_private(path: Path, parent: HeldFolder, there: os.stat_result) -> int:
    """Return the user id of this user's files on this disk.

    Raises `OutputError` if a folder is not this user's, or others may write to it.
    """
    owner, anybody = os.geteuid(), 0
    if there.st_uid != owner or there.st_mode & _OTHERS_WRITE:
        with suppress(OSError):  # if nothing can be made there, no file there is this user's
            new = parent.status_of_new_file()
            owner, anybody = new.st_uid, new.st_mode & _OTHERS_WRITE
    if there.st_uid != owner:
        raise OutputError(
            f"belongs to {user_name(there.st_uid)}, who may have put anything into it",
            subject=path,
            remedy="choose another output, or have it removed",
        )
    if there.st_mode & _OTHERS_WRITE & ~anybody:
        raise OutputError(
            f"others may write to it (mode {there.st_mode & 0o777:04o}), and may have put "
            "anything into it",
            subject=path,
            remedy="see what is in it, then remove it, or chmod 700 it to go on from it",
        )
    return owner


def _remove_if_same(parent: HeldFolder, name: str, folder: HeldFolder) -> None:
    if parent.holds(name, folder):
        parent.remove_empty(name)
