"""The output folder: filled out of sight, put in place by one rename.

Until the rename the output path does not exist, or still is the old model. It grows in a hidden
folder beside the output, `.NAME.shardmix`, which a failed or killed run leaves behind for the next:

    lock        whose it is
    journal     what is done
    model/      what becomes the output
    placing     there for the moment of the rename

Knows folders, not what is in them.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardmix.errors import OutputError, writing_failed
from shardmix.filesystem import read_regular, walk
from shardmix.locks import LOCK_NAME, lock_folder
from shardmix.output_path import check_output

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
_PLACING = "placing"  # there while new and old change places: the new one's inode
_ASIDE = "old"  # where the old one is meanwhile, on systems that cannot exchange in one step
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


class Staging:
    """The hidden folder beside an output in which the new model grows, locked for one process."""

    def __init__(self, output: Path) -> None:
        self.output = output
        """Where the model is to be."""
        self.path = staging_path(output)
        """The hidden folder."""
        self.folder = self.path / "model"
        """What becomes the output."""
        self.journal_path = self.path / "journal"
        """What is done already; whoever writes it keeps it."""
        self.marker = self.path / _PLACING
        """There while old and new change places."""
        self.is_worth_keeping = False
        """After a failure, leave it all for a later run; at first, whether there is anything."""
        self._is_placed = False

    @property
    def is_placed(self) -> bool:
        """Whether its folder has become the output."""
        with suppress(OSError):
            self._is_placed = self._is_placed or _is_placed(self)
        return self._is_placed

    @property
    def old_model(self) -> Path | None:
        """Where the old model lies, if a run was killed with it out of its place."""
        aside = self.path / _ASIDE
        return aside if aside.exists() and not self.output.exists() else None

    @property
    def nbytes(self) -> int:
        """What its files take of the disk already."""
        total = 0
        with suppress(OSError):  # its process is just removing it
            total = sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*"))
        return total

    def drop_all_but(self, names: Collection[str]) -> None:
        """Remove what is in its folder besides some files: what an earlier run left there.

        That may be another merge's, whose journal is lost, or the model that was replaced. Makes
        the folders that these files, named by their paths within it with `/`, are to be in.
        """
        try:
            _drop_all_but(self.folder, names)
            for name in names:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise writing_failed(self.folder, error, "cannot be tidied up") from None

    def place(self, *, overwrite: bool, fsync: bool) -> None:
        """Make the filled folder the output: the one step in which anything is seen to change.

        Raises `OutputError`, also where something that may not be replaced has come to be there.
        """
        try:
            _put_in_place(self, overwrite=overwrite, fsync=fsync)
        except OSError as error:
            if self.is_placed:
                raise OutputError(
                    f"{self.output}: is complete and in place, but the disk does not confirm it "
                    f"({error.strerror}); check the disk"
                ) from None
            raise writing_failed(self.output, error, "cannot be finished") from None
        self.is_worth_keeping = False


@contextmanager
def open_staging(output: Path, *, restart: bool = False) -> Iterator[Staging]:
    """Make or take up an output's staging folder, and remove it, but for what is worth keeping.

    With `restart` what an earlier run has left is thrown away first. Raises `OutputError` where
    another process is at work on the same output.
    """
    staging = Staging(output)
    made: list[Path] = []
    try:
        made += [folder for folder in output.parents if not folder.exists()]
        lock = lock_folder(staging.path)
    except OSError as error:
        _remove_empty(staging.path, *made)
        raise writing_failed(output, error, "cannot be made") from None
    try:
        try:
            staging.is_worth_keeping = True  # until it is known what there is
            _take_up(staging, restart=restart)
            yield staging
        finally:
            if not staging.is_worth_keeping:
                # After success this is nothing, or the model that was replaced.
                with suppress(OSError):  # what cannot be removed now is at the next run
                    _clear(staging.path)
                    _remove_lock(staging.path, *made)
            _unlock(lock)
    except KeyboardInterrupt as error:
        if staging.is_placed:
            error.args = (f"{output} is complete and in place",)
        raise


def settle(output: Path) -> None:
    """Finish what a run had begun that was killed in the moment of putting its output in place."""
    staging = Staging(output)
    try:
        is_waiting = staging.journal_path.exists() and not staging.marker.exists()
        if is_waiting or not staging.path.exists():
            return
        lock = lock_folder(staging.path)
        try:
            _settle(staging)
            if [entry.name for entry in staging.path.iterdir()] == [LOCK_NAME]:
                _remove_lock(staging.path)
        finally:
            _unlock(lock)
    except OSError as error:
        raise writing_failed(staging.path, error, "cannot be used") from None


def staging_path(output: Path) -> Path:
    """Return the hidden folder that belongs to an output."""
    return output.with_name(f".{output.name}.shardmix")


def _take_up(staging: Staging, *, restart: bool) -> None:
    try:
        _settle(staging)
        if restart:
            _clear(staging.path)
        staging.is_worth_keeping = staging.journal_path.exists()
        staging.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise writing_failed(staging.path, error, "cannot be used") from None


def _settle(staging: Staging) -> None:
    """Tidy up after a run that was killed while old and new changed places."""
    aside = staging.old_model
    if aside is not None:
        aside.rename(staging.output)
    if _is_placed(staging):
        _clear(staging.path)  # what is left is the old model
    else:
        staging.marker.unlink(missing_ok=True)


def _is_placed(staging: Staging) -> bool:
    """Tell whether the folder that was about to become the output is no longer in its old place."""
    try:
        told = read_regular(staging.marker, max_nbytes=20)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        told = b""  # nor is that what was written
    try:
        inode = staging.folder.stat().st_ino
    except FileNotFoundError:
        return True  # whatever a power cut has left of the marker
    # An inode's number stays with a folder through every rename.
    return told.isdigit() and int(told) != inode


def _clear(folder: Path) -> None:
    """Remove what is in a staging folder, but for its lock."""
    # The marker last: as long as anything is there, it says that it is not to be gone on with.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == _PLACING):
        if entry.name != LOCK_NAME:
            _remove(entry)


def _drop_all_but(folder: Path, names: Collection[str]) -> None:
    for entry in folder.iterdir():
        inside = [name.removeprefix(f"{entry.name}/") for name in names]
        inside = [name for name, whole in zip(inside, names, strict=True) if name != whole]
        if inside and entry.is_dir() and not entry.is_symlink():
            _drop_all_but(entry, inside)
        elif entry.name not in names or entry.is_dir():
            _remove(entry)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _remove_lock(folder: Path, *made: Path) -> None:
    """Remove a staging folder that is empty but for its lock, and folders made around it."""
    # The folder after the lock: whoever comes now makes a lock of its own.
    (folder / LOCK_NAME).unlink()
    _remove_empty(folder, *made)


def _remove_empty(*folders: Path) -> None:
    with suppress(OSError):  # it is not empty: others are at work there
        for folder in folders:
            folder.rmdir()


def _unlock(lock: int) -> None:
    with suppress(OSError):  # the system says how the last write went; a lock has none
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child process may hold a copy of the descriptor
    with suppress(OSError):
        os.close(lock)


def _put_in_place(staging: Staging, *, overwrite: bool, fsync: bool) -> None:
    folder, output = staging.folder, staging.output
    staging.marker.write_text(str(folder.stat().st_ino))
    if fsync:
        # What is renamed is on the disk before it is renamed.
        _fsync_tree(staging.path)
    # Again: much can have happened in the hours of a merge.
    check_output(output, overwrite=overwrite, inputs=())
    if output.exists():
        _exchange(folder, output, aside=staging.path / _ASIDE)
    else:
        folder.rename(output)
    staging._is_placed = True  # the marker tells it to whom this is not told, such as a later run
    if fsync:
        # And the rename is, before anyone is told of it, in both folders that it changed.
        _fsync(output.parent)
        _fsync(staging.path)


def _exchange(folder: Path, output: Path, *, aside: Path) -> None:
    """Swap two folders, in one step where the system can, else in two that `settle` knows of."""
    names = os.fsencode(folder), os.fsencode(output)
    libc = ctypes.CDLL(None, use_errno=True)
    result = None
    if hasattr(libc, "renameat2"):  # Linux
        result = libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):  # macOS
        result = libc.renamex_np(*names, _RENAME_SWAP)
    if result == 0:
        return
    if result is not None and (error := ctypes.get_errno()) not in _NOT_SUPPORTED:
        raise OSError(error, os.strerror(error))
    output.rename(aside)
    try:
        folder.rename(output)
    except BaseException:
        aside.rename(output)
        raise


def _fsync_tree(folder: Path) -> None:
    """Force a tree's files and folders to disk; for shards, which were, that costs nothing."""
    for path, _, names in walk(folder):
        for name in names:
            _fsync(path / name)
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems know no fsync of a folder; that is no reason to fail.
        if not path.is_dir() or error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)
