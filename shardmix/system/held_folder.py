"""A folder held by its descriptor: nothing in it is reached through a link.

Between two calls, anybody who may write to a folder of a path can put a link there, and the path
then leads elsewhere. A descriptor stays with the folder that it was opened for. So all that a merge
makes, opens, renames or removes goes through a `HeldFolder`. Knows folders and files, not their
content.
"""

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from shardmix.errors import OutputError, printable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# A name may be a pipe: opening it must not wait for a writer.
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PERMISSIONS = 0o777
_RENAME_EXCHANGE = 2  # Linux's renameat2
_RENAME_SWAP = 2  # macOS's renameatx_np
NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""The errors of a file system that does not know a call."""


class HeldFolder:
    """An open folder, and the operations in it.

    The name of a file may lead into subfolders, such as `2_Dense/config.json`; they are made with
    it. Methods raise OSError, and `OutputError` if an entry is not one that a merge would have
    made.
    """

    def __init__(self, path: Path, descriptor: int, *, owner: int, mode: int) -> None:
        self.path = path
        """The path it was found by; only for messages."""
        self.owner = owner
        """User id of all entries made here; an entry that is reused must have it."""
        self.mode = mode
        """Permissions of new subfolders; files have the same, without execution."""
        self._descriptor = descriptor

    def __enter__(self) -> "HeldFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; later calls raise OSError."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):  # nothing was written through it
                os.close(descriptor)

    # Looking

    def status(self) -> os.stat_result:
        """Return the folder's own status."""
        return os.fstat(self._descriptor)

    def entry(self, name: str) -> os.stat_result | None:
        """Return the status of an entry, not following a link; None if there is none."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def holds(self, name: str, folder: "HeldFolder") -> bool:
        """Return True if an open folder is the entry of this name."""
        there = self.entry(name)
        return there is not None and os.path.samestat(there, folder.status())

    def names(self) -> list[str]:
        """Return the names of all entries, sorted."""
        return [name for name, _ in self._entries()]

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield all below it that is not a folder: its path within this one, and its status."""
        for name, is_folder in self._entries():
            if is_folder:
                with self.subfolder(name) as folder:
                    for below, there in folder.files():
                        yield f"{name}/{below}", there
            elif (status := self.entry(name)) is not None:
                yield name, status

    def open_regular(self, name: str) -> BinaryIO:
        """Open a file for reading; raise `OutputError` if it is a link, or not a regular file."""
        with self._within(name) as (folder, last):
            path = folder.path / last
            there = folder.entry(last)
            if there is not None:  # a device is not even opened
                _refuse_unless_regular(path, there)
            descriptor = os.open(last, os.O_RDONLY | _FILE, dir_fd=folder._descriptor)
            with _closed_on_error(descriptor):
                _refuse_unless_regular(path, os.fstat(descriptor))
                return os.fdopen(descriptor, "rb")

    def read(self, name: str, *, max_nbytes: int) -> bytes:
        """Return the content of a small file; raise OSError (EFBIG) if it is not small."""
        with self.open_regular(name) as file:
            content = file.read(max_nbytes + 1)
        if len(content) > max_nbytes:
            raise OSError(errno.EFBIG, f"more than the {max_nbytes} bytes allowed")
        return content

    # Making entries, and reusing those of an earlier merge

    def create(self, name: str) -> BinaryIO:
        """Open a new file for writing; replaces any file or link of this name."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE
        with self._within(name, make=True) as (folder, last):
            mode, where = folder._file_mode, folder._descriptor
            try:
                descriptor = os.open(last, flags, mode, dir_fd=where)
            except FileExistsError:
                os.unlink(last, dir_fd=where)
                descriptor = os.open(last, flags, mode, dir_fd=where)
            return os.fdopen(descriptor, "wb")

    def replace(self, name: str, content: bytes) -> None:
        """Write a small file in one step; replaces any file or link of this name."""
        new = _new_name()
        try:
            with self.create(new) as file:
                file.write(content)
            self.move(new, self, name)
        except BaseException:
            with suppress(OSError):
                self.remove(new)
            raise

    def open_own(self, name: str, *, append: bool = False) -> int:
        """Return a descriptor to read and write a file, an earlier merge's or a new one.

        Raises `OutputError` if the entry cannot be a merge's own: a link, a pipe, a file with a
        second name elsewhere, or another user's.
        """
        flags = os.O_RDWR | _FILE | (os.O_APPEND if append else 0)
        with self._within(name, make=True) as (folder, last):
            where = folder._descriptor
            if folder.entry(last) is None:
                new = flags | os.O_CREAT | os.O_EXCL
                with suppress(FileExistsError):  # another process has just made it
                    return os.open(last, new, folder._file_mode, dir_fd=where)
            folder._refuse_unless_own(last, folder.entry(last))
            descriptor = os.open(last, flags, dir_fd=where)
            with _closed_on_error(descriptor):
                there = os.fstat(descriptor)
                folder._refuse_unless_own(last, there)
                _set_permissions(descriptor, there, folder._file_mode)
            return descriptor

    def is_own_file(self, name: str) -> bool:
        """Return True if `open_own` would reuse the entry of this name."""
        there = self.entry(name)
        return there is not None and _finding(there, owner=self.owner) is None

    def make_folder(self, name: str, mode: int) -> None:
        """Make a subfolder; raise FileExistsError if the name is taken, even by a link."""
        os.mkdir(name, mode, dir_fd=self._descriptor)

    def subfolder(self, name: str) -> "HeldFolder":
        """Open a subfolder, whoever made it; raise OSError if it is a link or not a folder."""
        flags = _FOLDER | os.O_NOFOLLOW
        descriptor = os.open(name, flags, dir_fd=self._descriptor)
        return HeldFolder(self.path / name, descriptor, owner=self.owner, mode=self.mode)

    def own_subfolder(self, name: str, *, mode: int | None = None) -> "HeldFolder":
        """Make a subfolder, or reuse an earlier merge's.

        `mode`: its permissions; None means this folder's. Raises `OutputError` if the entry is a
        link, not a folder, or another user's.
        """
        mode = self.mode if mode is None else mode
        with suppress(FileExistsError):
            self.make_folder(name, mode)
        there = self.entry(name)
        if there is not None and not stat.S_ISDIR(there.st_mode):
            raise _not_own(self.path / name, _kind(there.st_mode), "a folder")
        folder = self.subfolder(name)
        try:
            folder.mode, there = mode, folder.status()
            if there.st_uid != self.owner:
                raise _not_own(folder.path, f"belongs to {user_name(there.st_uid)}", "a folder")
            _set_permissions(folder._descriptor, there, mode)
        except BaseException:
            folder.close()
            raise
        return folder

    def limit_permissions(self, mode: int) -> None:
        """Take permissions away from the folder and from all that is made in it later."""
        self.mode &= mode
        _set_permissions(self._descriptor, self.status(), self.mode)

    def status_of_new_file(self) -> os.stat_result:
        """Make a file, remove it at once, and return the status that it had.

        Some disks (network, FAT) give every file to one user, or let everybody write to it.
        """
        name = _new_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE
        descriptor = os.open(name, flags, 0o600, dir_fd=self._descriptor)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(name, dir_fd=self._descriptor)

    def check_own(self) -> None:
        """Raise `OutputError` if anything below is neither a folder nor a file of this user."""
        for name, there in self.files():
            self._refuse_unless_own(name, there)

    # Removing, moving, forcing to disk

    def remove(self, name: str) -> None:
        """Remove a file, a link itself, or a folder with all its entries."""
        there = self.entry(name)
        if there is None or not stat.S_ISDIR(there.st_mode):
            os.unlink(name, dir_fd=self._descriptor)
            return
        with self.subfolder(name) as folder:
            for below in folder.names():
                folder.remove(below)
        self.remove_empty(name)

    def remove_empty(self, name: str) -> None:
        """Remove an empty folder; raise OSError if it is not empty."""
        os.rmdir(name, dir_fd=self._descriptor)

    def move(self, name: str, target: "HeldFolder", target_name: str) -> None:
        """Rename an entry into another folder of the same disk."""
        os.rename(name, target_name, src_dir_fd=self._descriptor, dst_dir_fd=target._descriptor)

    def exchange(self, name: str, other: "HeldFolder", other_name: str) -> bool:
        """Swap two entries in one step; return False if the system cannot."""
        libc = ctypes.CDLL(None, use_errno=True)
        names = (
            *(self._descriptor, os.fsencode(name)),
            *(other._descriptor, os.fsencode(other_name)),
        )
        if hasattr(libc, "renameat2"):  # Linux
            result = libc.renameat2(*names, _RENAME_EXCHANGE)
        elif hasattr(libc, "renameatx_np"):  # macOS
            result = libc.renameatx_np(*names, _RENAME_SWAP)
        else:
            return False
        if result == 0:
            return True
        error = ctypes.get_errno()
        if error in NOT_SUPPORTED:
            return False
        raise OSError(error, os.strerror(error))

    def sync(self) -> None:
        """Force the folder's entries to disk."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            # Some network and FUSE file systems do not support fsync of a folder.
            if error.errno not in NOT_SUPPORTED:
                raise

    def sync_file(self, name: str) -> None:
        """Force a file to disk."""
        descriptor = os.open(name, os.O_RDONLY | _FILE, dir_fd=self._descriptor)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_all(self) -> None:
        """Force all files and folders below to disk; files already there cost nothing."""
        for name, is_folder in self._entries():
            if is_folder:
                with self.subfolder(name) as folder:
                    folder.sync_all()
            else:
                self.sync_file(name)
        self.sync()

    # Helpers

    def _entries(self) -> list[tuple[str, bool]]:
        """Return (name, is a folder) of each entry, sorted."""
        with os.scandir(self._descriptor) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)

    @property
    def _file_mode(self) -> int:
        return self.mode & 0o666

    def _refuse_unless_own(self, name: str, there: os.stat_result | None) -> None:
        finding = None if there is None else _finding(there, owner=self.owner)
        if finding is not None:
            raise _not_own(self.path / name, finding, "a file")

    @contextmanager
    def _within(self, name: str, *, make: bool = False) -> Iterator[tuple["HeldFolder", str]]:
        """Open for a moment the folder that a name leads into; yield it and the last part of the
        name.

        `make`: make the folders on the way, or reuse an earlier merge's.
        """
        first, slash, rest = name.partition("/")
        if not slash:
            yield self, name
            return
        assert first not in ("", ".", ".."), name
        step = self.own_subfolder if make else self.subfolder
        with step(first) as folder, folder._within(rest, make=make) as found:
            yield found


def open_folder(path: Path) -> HeldFolder:
    """Open a folder by a resolved absolute path; raise OSError if a part of it is now a link."""
    flags, within = _FOLDER | os.O_NOFOLLOW, None
    if not hasattr(os, "O_PATH"):  # not Linux
        return HeldFolder(path, os.open(path, flags), owner=os.geteuid(), mode=_PERMISSIONS)
    descriptors = []
    try:
        for part in path.parts[:-1]:
            # Passing through a folder needs no right to list it.
            within = os.open(part, flags | os.O_PATH, dir_fd=within)
            descriptors.append(within)
        descriptor = os.open(path.parts[-1], flags, dir_fd=within)
    finally:
        for within in descriptors:
            os.close(within)
    return HeldFolder(path, descriptor, owner=os.geteuid(), mode=_PERMISSIONS)


def _new_name() -> str:
    """Return a temporary name that nobody can have used before."""
    return f".{os.urandom(8).hex()}.shardmix"


def user_name(number: int) -> str:
    """Return a user's name and number for a message, or only the number if there is no name."""
    import pwd

    try:
        return f"{printable(pwd.getpwuid(number).pw_name)} (user {number})"
    except KeyError:
        return f"user {number}"


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _set_permissions(descriptor: int, there: os.stat_result, mode: int) -> None:
    if there.st_mode & _PERMISSIONS == mode:
        return
    # A disk without permissions has fixed ones from its mount.
    with suppress(PermissionError):
        os.fchmod(descriptor, there.st_mode & ~_PERMISSIONS & 0o7777 | mode)


def _kind(mode: int) -> str:
    """Describe an entry that is not of the kind a merge makes."""
    if stat.S_ISLNK(mode):
        return "is a link"
    if stat.S_ISDIR(mode):
        return "is a folder"
    return "is a file" if stat.S_ISREG(mode) else "is a pipe, socket or device"


def _finding(there: os.stat_result, *, owner: int) -> str | None:
    """Return why a file cannot be a merge's own, or None if it can."""
    if not stat.S_ISREG(there.st_mode):
        return _kind(there.st_mode)
    if there.st_nlink > 1:
        return "has a second name elsewhere (a hard link)"
    if there.st_uid != owner:
        return f"belongs to {user_name(there.st_uid)}"
    return None


def _refuse_unless_regular(path: Path, there: os.stat_result) -> None:
    if not stat.S_ISREG(there.st_mode):
        raise _not_own(path, _kind(there.st_mode), "a file")


def _not_own(path: Path, finding: str, own: str) -> OutputError:
    return OutputError(
        f"{finding}, and a merge has {own} of its own there; it was left as it is",
        subject=path,
        remedy="find out who put it there, then remove it",
    )
