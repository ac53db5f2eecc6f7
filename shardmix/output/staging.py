"""The output folder: filled in a hidden folder, put in place by one rename.

At every instant the output path is absent, or the old model, or the new one, complete. The output
grows in a hidden folder beside it, on the same file system, `.NAME.shardmix`, which a failed or
killed merge leaves for the next call:

    lock        its owner: one merge at a time to one output
    scores      scores so far, if the weights come from examples
    journal     finished leaves
    model/      the future output
    placing     only during the rename: the inode of model/

With `--overwrite` old and new are exchanged in one step (`renameat2`), and then the old one is
removed. `placing` tells a later call on which side of the exchange a merge was killed: the
remaining folder is either the old model, to be removed, or the new one, to go on with. If a file
system cannot exchange (NFS, some FUSE), two renames do it, and a later call completes them.

The hidden folder's name is predictable, and in `/tmp` or a group's folder anybody may put a link
there, before the merge or during it. So the folders are held by their descriptors (`held_folder`):
names in them are opened with `O_NOFOLLOW`, new ones with `O_EXCL`. The hidden folder has mode 0700;
one of another user, or one that others may write to, is refused, naming its owner. An earlier
merge's file is reused if it is regular, this user's, and has one name. Otherwise it is refused
(`lock`, `journal`, `model/`) or merged again (files in `model/`). Before the rename everything is
checked once more, by inode; if the exchange brings out another folder than the checked one, it is
put back. Links above the output are the user's own and are resolved once, at the start. The output
itself, a profile and its picture are never written through a link. On disks that give all files to
one user (FAT, some network disks) that user is found by a file that is made and removed at once.

Knows folders, not their content.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from shardmix.errors import OutputError, writing_failed
from shardmix.output.destination import check_is_model, check_replaceable
from shardmix.system.held_folder import HeldFolder, open_folder, user_name
from shardmix.system.locks import LOCK_NAME, lock_folder, unlock

_JOURNAL = "journal"
_MODEL = "model"
_SCORES = "scores"  # scores so far, before the merge begins
_PLACING = "placing"  # there while new and old are swapped: the inodes of both
_ASIDE = "old"  # the old model during the swap, on systems that cannot swap in one step
_FRESH = "fresh"  # made for a moment, to see the permissions of a new folder
_OTHERS_WRITE = 0o022
_NUM_TRIES = 100  # others may be removing it each time


class Staging:
    """The hidden folder beside an output in which the new model grows, locked for one process."""

    folder: HeldFolder
    """The future output."""

    def __init__(self, output: Path, parent: HeldFolder, hidden: HeldFolder) -> None:
        self.output = output
        """Path of the output."""
        self.path = staging_path(output)
        """Path of the hidden folder, for messages."""
        self.parent = parent
        """The folder of the output and of the hidden folder."""
        self.hidden = hidden
        """The hidden folder itself."""
        self.is_worth_keeping = False
        """True if a failure should leave all files for the next call; at first, if there are
        any."""
        self._is_placed = False

    @property
    def is_placed(self) -> bool:
        """True if its folder has become the output."""
        with suppress(OSError, OutputError):
            self._is_placed = self._is_placed or _is_placed(self)
        return self._is_placed

    @property
    def is_moved(self) -> bool:
        """True if its path now leads elsewhere; False if that is unknown."""
        with suppress(OSError):
            return not _is_in_its_place(self)
        return False

    @property
    def has_journal(self) -> bool:
        """True if a merge has begun its journal."""
        return self.hidden.entry(_JOURNAL) is not None

    @property
    def has_scores(self) -> bool:
        """True if scores are stored there."""
        return self.hidden.entry(_SCORES) is not None

    @property
    def may_have_scores(self) -> bool:
        """True if scores are stored there, or if the disk cannot tell."""
        try:
            return self.has_scores
        except OSError:
            return True

    @property
    def old_model(self) -> Path | None:
        """Path of the old model if a merge was killed during the swap, else None."""
        aside = self.hidden.entry(_ASIDE)
        is_aside = aside is not None and stat.S_ISDIR(aside.st_mode)
        is_gone = is_aside and self.parent.entry(self.output.name) is None
        return self.path / _ASIDE if is_gone else None

    @property
    def nbytes(self) -> int:
        """Disk space that its files and the journal already take, without an old model."""
        total = 0
        with suppress(OSError):  # its process is just removing it
            for name, there in self.hidden.files():
                if not name.startswith(f"{_ASIDE}/"):
                    total += there.st_blocks * 512
        return total

    def forget_scores(self) -> None:
        """Remove the scores of an earlier call. Raises `OutputError`."""
        try:
            if self.has_scores:
                self.hidden.remove(_SCORES)
        except OSError as error:
            raise writing_failed(self.path, error, "cannot be tidied up") from None

    def drop_all_but(self, names: Collection[str]) -> None:
        """Remove all files of its folder except some: those an earlier merge left there.

        They may be another merge's, whose journal is lost, or the replaced model. Files are named
        by their paths within it with `/`. An entry that cannot be a file of ours, such as a link,
        is always removed.
        """
        try:
            _drop_all_but(self.folder, names)
        except OSError as error:
            raise writing_failed(self.folder.path, error, "cannot be tidied up") from None

    def place(self, *, overwrite: bool, fsync: bool) -> None:
        """Make the filled folder the output: the one step that others can see.

        Raises `OutputError`, also if something that may not be replaced is now there.
        """
        try:
            _put_in_place(self, overwrite=overwrite, fsync=fsync)
        except OSError as error:
            if self.is_placed:
                raise OutputError(
                    "is complete and in place, but the disk does not confirm it "
                    f"({error.strerror})",
                    subject=self.output,
                    remedy="check the disk",
                ) from None
            raise writing_failed(self.output, error, "cannot be finished") from None
        self.is_worth_keeping = False


@contextmanager
def open_staging(output: Path, *, restart: bool = False) -> Iterator[Staging]:
    """Make or reuse an output's staging folder; remove it afterwards unless it is worth keeping.

    `restart`: remove the files of an earlier merge first. Raises `OutputError` if another process
    is at work on the same output, or if the folder is not this user's.
    """
    staging: Staging | None = None
    try:
        with ExitStack() as stack:
            try:
                opened = _open_locked(output)
            except OSError as error:
                raise writing_failed(output, error, "cannot be made") from None
            stack.callback(opened.close)
            staging = opened.staging
            try:
                staging.is_worth_keeping = True  # until its content is known
                _take_up(staging, restart=restart)
                stack.enter_context(staging.folder)
                yield staging
            finally:
                if not staging.is_worth_keeping:
                    # After success this is nothing, or the replaced model. The next call removes
                    # what cannot be removed now.
                    with suppress(OSError, OutputError):
                        _clear(staging.hidden)
                        opened.remove_empty()
    except KeyboardInterrupt as error:
        # Around all of it: the interrupt may come while the last folder is being closed.
        if staging is not None and staging.is_placed:
            error.args = (f"{output} is complete and in place",)
        raise


@contextmanager
def existing_staging(output: Path) -> Iterator[Staging | None]:
    """Open an output's staging folder to read it, without its lock; yield None if there is none.

    Raises `OutputError` if it is not this user's, and OSError.
    """
    with ExitStack() as stack:
        try:
            parent = stack.enter_context(open_folder(output.parent))
            hidden = stack.enter_context(_own_hidden(parent, staging_path(output).name))
        except (FileNotFoundError, NotADirectoryError):
            yield None
        else:
            yield Staging(output, parent, hidden)


def staged_nbytes(output: Path) -> int:
    """Return the disk space of an output's unfinished files. Raises `OutputError`."""
    try:
        with existing_staging(output) as staging:
            return 0 if staging is None else staging.nbytes
    except OSError as error:
        raise writing_failed(staging_path(output), error, "cannot be used") from None


def settle(output: Path) -> None:
    """Finish the work of a merge that was killed during the rename."""
    try:
        with existing_staging(output) as staging:
            if staging is None:
                return
            if staging.has_journal and staging.hidden.entry(_PLACING) is None:
                return
        opened = _open_locked(output)
        try:
            _settle(opened.staging)
            if opened.staging.hidden.names() == [LOCK_NAME]:
                opened.remove_empty()
        finally:
            opened.close()
    except OSError as error:
        raise writing_failed(staging_path(output), error, "cannot be used") from None


def staging_path(output: Path) -> Path:
    """Return the hidden folder that belongs to an output."""
    return output.with_name(f".{output.name}.shardmix")


class _Opened:
    """A locked staging folder, and the folders that had to be made around it."""

    def __init__(self, output: Path) -> None:
        self._made: list[tuple[HeldFolder, str, HeldFolder]] = []  # parent, name, folder
        self._lock: int | None = None
        self._held = ExitStack()
        self._name = staging_path(output).name
        is_new = False
        try:
            self._parent = self._open_parent(output)
            with suppress(FileExistsError):
                self._parent.make_folder(self._name, 0o700)
                is_new = True
            hidden = self._held.enter_context(_own_hidden(self._parent, self._name))
            hidden.limit_permissions(0o700)
            self.staging = Staging(output, self._parent, hidden)
            self._lock = lock_folder(hidden)
        except BaseException:
            if is_new:
                with suppress(OSError):  # others are already at work there
                    self._parent.remove_empty(self._name)
            self.remove_made()
            self.close()
            raise

    @property
    def is_locked(self) -> bool:
        """True if it is locked and still has its path, so that others see the lock."""
        return self._lock is not None and self._parent.holds(self._name, self.staging.hidden)

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
        self.staging.hidden.remove(LOCK_NAME)
        with suppress(OSError):  # not empty: others are at work there
            _remove_if_same(self._parent, self._name, self.staging.hidden)
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


def _open_locked(output: Path) -> _Opened:
    """Make or reuse an output's staging folder, and lock it."""
    for _ in range(_NUM_TRIES):
        try:
            opened = _Opened(output)
        except FileNotFoundError as error:  # just removed by its former owner
            last = error
            continue
        if opened.is_locked:
            return opened
        last = FileNotFoundError(2, "it vanishes whenever it is made")
        opened.close()
    raise last


def _own_hidden(parent: HeldFolder, name: str) -> HeldFolder:
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


def _take_up(staging: Staging, *, restart: bool) -> None:
    try:
        _settle(staging)
        if restart:
            # This very call may have stored the scores, before it began to merge.
            _clear(staging.hidden, but=(_SCORES,))
        is_begun = staging.has_journal or staging.has_scores
        mode = _mode_of_new_folder(staging.hidden)
        staging.folder = staging.hidden.own_subfolder(_MODEL, mode=mode)
        staging.is_worth_keeping = is_begun
    except OSError as error:
        raise writing_failed(staging.path, error, "cannot be used") from None


def _mode_of_new_folder(hidden: HeldFolder) -> int:
    """Return the permissions that the umask, or the disk, gives to a folder made now.

    An earlier merge's folder may have been made with another umask.
    """
    if hidden.entry(_FRESH) is not None:
        hidden.remove(_FRESH)
    hidden.make_folder(_FRESH, 0o777)
    there = hidden.entry(_FRESH)
    hidden.remove_empty(_FRESH)
    return 0o777 if there is None else there.st_mode & 0o777


def _drop_all_but(folder: HeldFolder, names: Collection[str]) -> None:
    for name in folder.names():
        below = [other.removeprefix(f"{name}/") for other in names if other.startswith(f"{name}/")]
        there = folder.entry(name)
        if below and there is not None and stat.S_ISDIR(there.st_mode):
            with folder.own_subfolder(name) as subfolder:
                _drop_all_but(subfolder, below)
        elif name not in names or not folder.is_own_file(name):
            folder.remove(name)


def _settle(staging: Staging) -> None:
    """Clean up after a merge that was killed while old and new were swapped."""
    hidden = staging.hidden
    if staging.old_model is not None:
        hidden.move(_ASIDE, staging.parent, staging.output.name)
    if _is_placed(staging):
        _clear(hidden)  # only the old model is left
    elif hidden.entry(_PLACING) is not None:
        hidden.remove(_PLACING)


def _is_placed(staging: Staging) -> bool:
    """Return True if the folder that was to become the output has left its old path."""
    told = _marked(staging.hidden)
    if told is None:
        return False
    there = staging.hidden.entry(_MODEL)
    # An inode's number stays with a folder through every rename.
    return there is None or (bool(told) and there.st_ino != told[0])


def _marked(hidden: HeldFolder) -> tuple[int, ...] | None:
    """Return the inodes of the new and the old model (or 0) during the swap, else None.

    () stands for a marker damaged by a power cut.
    """
    try:
        words = hidden.read(_PLACING, max_nbytes=50).split()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        return ()  # too long to be what was written
    is_whole = len(words) == 2 and all(word.isdigit() for word in words)
    return tuple(map(int, words)) if is_whole else ()


def _clear(hidden: HeldFolder, *, but: Collection[str] = ()) -> None:
    """Remove all entries of a staging folder, except its lock and those in `but`."""
    models = _marked(hidden)
    # The marker last: as long as it is there, the other entries must not be reused.
    for name in sorted(hidden.names(), key=lambda name: name == _PLACING):
        there = hidden.entry(name)
        if name in (_MODEL, _ASIDE) and models and there and there.st_ino not in models:
            raise OutputError(
                "is not the model that was to be replaced, but took its place",
                subject=hidden.path / name,
                remedy="move it to where it belongs",
            )
        if name != LOCK_NAME and name not in but:
            hidden.remove(name)


def _put_in_place(staging: Staging, *, overwrite: bool, fsync: bool) -> None:
    hidden, parent, name = staging.hidden, staging.parent, staging.output.name
    if fsync:
        # The content must be on the disk before the rename.
        staging.folder.sync_all()
    # Again: much may have happened in the hours of a merge.
    with check_replaceable(parent, name, overwrite=overwrite) or nullcontext() as old:
        inodes = [
            0 if folder is None else folder.status().st_ino for folder in (staging.folder, old)
        ]
        with hidden.create(_PLACING) as marker:
            marker.write(b"%d %d" % tuple(inodes))
        if fsync:
            hidden.sync_file(_PLACING)
            hidden.sync()
        staging.folder.check_own()
        if not _is_in_its_place(staging):
            raise OutputError(
                "has been moved or replaced while the merge was at work, so its output was not "
                "put in place",
                subject=staging.path,
                remedy="find out who did that, then start again",
            )
        if old is None:
            hidden.move(_MODEL, parent, name)
        else:
            _exchange(staging, old)
    # Known from now on, even if the disk cannot be looked at any more; later processes read the
    # marker.
    staging._is_placed = True
    if not parent.holds(name, staging.folder):
        staging._is_placed = False
        raise OutputError(
            "was replaced just as it was put in place",
            subject=staging.output,
            remedy="find out who did that, then start again",
        )
    if fsync:
        # The rename, too, must be on the disk before anyone is told, in both folders that it
        # changed.
        parent.sync()
        hidden.sync()


def _is_in_its_place(staging: Staging) -> bool:
    try:
        parent = staging.output.parent.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (
        os.path.samestat(parent, staging.parent.status())
        and staging.parent.holds(staging.path.name, staging.hidden)
        and staging.hidden.holds(_MODEL, staging.folder)
    )


def _exchange(staging: Staging, old: HeldFolder) -> None:
    """Swap new and old, in one step if the system can, else in two that `settle` can finish.

    The old model is checked once more now that nobody can change it: it will be removed.
    """
    hidden, parent, name = staging.hidden, staging.parent, staging.output.name
    if hidden.exchange(_MODEL, parent, name):
        try:
            _refuse_unless(hidden, _MODEL, old)
        except BaseException:
            hidden.exchange(_MODEL, parent, name)
            raise
        return
    parent.move(name, hidden, _ASIDE)
    try:
        _refuse_unless(hidden, _ASIDE, old)
        hidden.move(_MODEL, parent, name)
    except BaseException:
        hidden.move(_ASIDE, parent, name)
        raise


def _refuse_unless(hidden: HeldFolder, name: str, old: HeldFolder) -> None:
    """Raise `OutputError` unless the entry is the old model, and still nothing else."""
    if not hidden.holds(name, old):
        raise OutputError(
            "was replaced while the merge was at work", subject=old.path, remedy="start again"
        )
    with hidden.subfolder(name) as there:
        check_is_model(there, old.path)
