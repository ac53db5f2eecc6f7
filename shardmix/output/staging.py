"""The output folder: filled out of sight, put in place by one rename.

Until the rename the output path does not exist, or still is the old model. It grows in a hidden
folder beside the output, `.NAME.shardmix`, which a failed or killed run leaves behind for the next:

    lock        whose it is
    scores      what scoring has found, if the weights come from examples
    journal     what is done
    model/      what becomes the output
    placing     there for the moment of the rename

Its name is known to everybody, and others may be able to write where it lies. So it and the folder
around it are held by their descriptors, and what is found in it must be this user's own. Knows
folders, not what is in them.
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
_SCORES = "scores"  # what scoring has found, before the merge begins
_PLACING = "placing"  # there while new and old change places: the inodes of both
_ASIDE = "old"  # where the old one is meanwhile, on systems that cannot exchange in one step
_FRESH = "fresh"  # made for a moment, to see what permissions a new folder gets
_OTHERS_WRITE = 0o022
_NUM_TRIES = 100  # others may be removing it each time


class Staging:
    """The hidden folder beside an output in which the new model grows, locked for one process."""

    folder: HeldFolder
    """What becomes the output."""

    def __init__(self, output: Path, parent: HeldFolder, hidden: HeldFolder) -> None:
        self.output = output
        """Where the model is to be."""
        self.path = staging_path(output)
        """The hidden folder, for messages."""
        self.parent = parent
        """The folder that the output and the hidden folder lie in."""
        self.hidden = hidden
        """The hidden folder itself."""
        self.is_worth_keeping = False
        """After a failure, leave it all for a later run; at first, whether there is anything."""
        self._is_placed = False

    @property
    def is_placed(self) -> bool:
        """Whether its folder has become the output."""
        with suppress(OSError, OutputError):
            self._is_placed = self._is_placed or _is_placed(self)
        return self._is_placed

    @property
    def is_moved(self) -> bool:
        """Whether its path leads elsewhere by now; False if that cannot be told."""
        with suppress(OSError):
            return not _is_in_its_place(self)
        return False

    @property
    def has_journal(self) -> bool:
        """Whether a run has begun to say what it has done."""
        return self.hidden.entry(_JOURNAL) is not None

    @property
    def has_scores(self) -> bool:
        """Whether what scoring has found is kept there."""
        return self.hidden.entry(_SCORES) is not None

    @property
    def old_model(self) -> Path | None:
        """Where the old model lies, if a run was killed with it out of its place."""
        aside = self.hidden.entry(_ASIDE)
        is_aside = aside is not None and stat.S_ISDIR(aside.st_mode)
        is_gone = is_aside and self.parent.entry(self.output.name) is None
        return self.path / _ASIDE if is_gone else None

    @property
    def nbytes(self) -> int:
        """What its files, and the journal, take of the disk already; not an old model."""
        total = 0
        with suppress(OSError):  # its process is just removing it
            for name, there in self.hidden.files():
                if not name.startswith(f"{_ASIDE}/"):
                    total += there.st_blocks * 512
        return total

    def forget_scores(self) -> None:
        """Remove what scoring has found in an earlier run. Raises `OutputError`."""
        try:
            if self.has_scores:
                self.hidden.remove(_SCORES)
        except OSError as error:
            raise writing_failed(self.path, error, "cannot be tidied up") from None

    def drop_all_but(self, names: Collection[str]) -> None:
        """Remove what is in its folder besides some files: what an earlier run left there.

        That may be another merge's, whose journal is lost, or the model that was replaced. Files
        are named by their paths within it with `/`. What cannot be a file of ours, such as a link,
        goes in any case.
        """
        try:
            _drop_all_but(self.folder, names)
        except OSError as error:
            raise writing_failed(self.folder.path, error, "cannot be tidied up") from None

    def place(self, *, overwrite: bool, fsync: bool) -> None:
        """Make the filled folder the output: the one step in which anything is seen to change.

        Raises `OutputError`, also if something that may not be replaced has come to be there.
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

    With `restart` what an earlier run has left is thrown away first. Raises `OutputError` if
    another process is at work on the same output, or if the folder there is not this user's.
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
                staging.is_worth_keeping = True  # until it is known what there is
                _take_up(staging, restart=restart)
                stack.enter_context(staging.folder)
                yield staging
            finally:
                if not staging.is_worth_keeping:
                    # After success this is nothing, or the model that was replaced.
                    # What cannot be removed now is at the next run.
                    with suppress(OSError, OutputError):
                        _clear(staging.hidden)
                        opened.remove_empty()
    except KeyboardInterrupt as error:
        # Around all of it: it may come while the last folder is being closed.
        if staging is not None and staging.is_placed:
            error.args = (f"{output} is complete and in place",)
        raise


@contextmanager
def existing_staging(output: Path) -> Iterator[Staging | None]:
    """Open an output's staging folder to look at it, without its lock; None if there is none.

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
    """Return what an output's unfinished files take of the disk already. Raises `OutputError`."""
    try:
        with existing_staging(output) as staging:
            return 0 if staging is None else staging.nbytes
    except OSError as error:
        raise writing_failed(staging_path(output), error, "cannot be used") from None


def settle(output: Path) -> None:
    """Finish what a run had begun that was killed in the moment of putting its output in place."""
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
    """A staging folder that is locked, and the folders that had to be made around it."""

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
                with suppress(OSError):  # others are at work there already
                    self._parent.remove_empty(self._name)
            self.remove_made()
            self.close()
            raise

    @property
    def is_locked(self) -> bool:
        """Whether it is, and still is where everybody else would look for it."""
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
        """Remove the staging folder, which is empty but for its lock, and what was made for it."""
        # The folder after the lock: whoever comes now makes a lock of its own.
        self.staging.hidden.remove(LOCK_NAME)
        with suppress(OSError):  # it is not empty: others are at work there
            _remove_if_same(self._parent, self._name, self.staging.hidden)
            self.remove_made()

    def remove_made(self) -> None:
        """Remove the folders that were made around it, if they are empty."""
        with suppress(OSError):
            for parent, name, folder in reversed(self._made):
                _remove_if_same(parent, name, folder)

    def close(self) -> None:
        """Unlock it, and let it go."""
        if self._lock is not None:
            unlock(self._lock)
        self._held.close()


def _open_locked(output: Path) -> _Opened:
    """Make or take up an output's staging folder, and lock it."""
    for _ in range(_NUM_TRIES):
        try:
            opened = _Opened(output)
        except FileNotFoundError as error:  # whoever had it has just removed it, or what is around
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
            f"{path}: is {what}, where a merge has a folder of its own; it was left as it is: see "
            "who has put it there, then remove it, or choose another output"
        )
    owner = _owner_if_private(path, parent, there)
    hidden = parent.subfolder(name)
    try:
        hidden.owner = owner
        # By now it may be another one.
        _owner_if_private(path, parent, hidden.status())
    except BaseException:
        hidden.close()
        raise
    return hidden


def _owner_if_private(path: Path, parent: HeldFolder, there: os.stat_result) -> int:
    """Return whose files are this user's on this disk; raise `OutputError` if a folder is not."""
    owner, anybody = os.geteuid(), 0
    if there.st_uid != owner or there.st_mode & _OTHERS_WRITE:
        with suppress(OSError):  # where nothing can be made, nothing there is this user's
            new = parent.status_of_new_file()
            owner, anybody = new.st_uid, new.st_mode & _OTHERS_WRITE
    if there.st_uid != owner:
        raise OutputError(
            f"{path}: belongs to {user_name(there.st_uid)}, who may have put anything into it; "
            "choose another output, or have it removed"
        )
    if there.st_mode & _OTHERS_WRITE & ~anybody:
        raise OutputError(
            f"{path}: others may write to it (mode {there.st_mode & 0o777:04o}), and may have put "
            "anything into it; see what is in it, then remove it, or chmod 700 it to go on from it"
        )
    return owner


def _remove_if_same(parent: HeldFolder, name: str, folder: HeldFolder) -> None:
    if parent.holds(name, folder):
        parent.remove_empty(name)


def _take_up(staging: Staging, *, restart: bool) -> None:
    try:
        _settle(staging)
        if restart:
            # Scores may be of this very run, which found them before it began to merge.
            _clear(staging.hidden, but=(_SCORES,))
        is_begun = staging.has_journal or staging.has_scores
        mode = _mode_of_new_folder(staging.hidden)
        staging.folder = staging.hidden.own_subfolder(_MODEL, mode=mode)
        staging.is_worth_keeping = is_begun
    except OSError as error:
        raise writing_failed(staging.path, error, "cannot be used") from None


def _mode_of_new_folder(hidden: HeldFolder) -> int:
    """Return the permissions that the umask, or the disk, gives to a folder made now.

    What an earlier run has left may have been made with another umask.
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
    """Tidy up after a run that was killed while old and new changed places."""
    hidden = staging.hidden
    if staging.old_model is not None:
        hidden.move(_ASIDE, staging.parent, staging.output.name)
    if _is_placed(staging):
        _clear(hidden)  # what is left is the old model
    elif hidden.entry(_PLACING) is not None:
        hidden.remove(_PLACING)


def _is_placed(staging: Staging) -> bool:
    """Tell whether the folder that was about to become the output is no longer in its old place."""
    told = _marked(staging.hidden)
    if told is None:
        return False
    there = staging.hidden.entry(_MODEL)
    # An inode's number stays with a folder through every rename.
    return there is None or (bool(told) and there.st_ino != told[0])


def _marked(hidden: HeldFolder) -> tuple[int, ...] | None:
    """Return the inodes of the new and the old model (or 0) while they change places, else None.

    () is whatever a power cut has left of the marker.
    """
    try:
        words = hidden.read(_PLACING, max_nbytes=50).split()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        return ()  # nor is that what was written
    is_whole = len(words) == 2 and all(word.isdigit() for word in words)
    return tuple(map(int, words)) if is_whole else ()


def _clear(hidden: HeldFolder, *, but: Collection[str] = ()) -> None:
    """Remove what is in a staging folder, but for its lock and what else is named."""
    models = _marked(hidden)
    # The marker last: as long as anything is there, it says that it is not to be gone on with.
    for name in sorted(hidden.names(), key=lambda name: name == _PLACING):
        there = hidden.entry(name)
        if name in (_MODEL, _ASIDE) and models and there and there.st_ino not in models:
            raise OutputError(
                f"{hidden.path / name}: is not the model that was to be replaced, but got here in "
                "its place; move it to where it belongs"
            )
        if name != LOCK_NAME and name not in but:
            hidden.remove(name)


def _put_in_place(staging: Staging, *, overwrite: bool, fsync: bool) -> None:
    hidden, parent, name = staging.hidden, staging.parent, staging.output.name
    if fsync:
        # What is renamed is on the disk before it is renamed.
        staging.folder.sync_all()
    # Again: much can have happened in the hours of a merge.
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
                f"{staging.path}: has been moved or replaced while the merge was at work, so its "
                "output was not put in place; see who has done that, then start again"
            )
        if old is None:
            hidden.move(_MODEL, parent, name)
        else:
            _exchange(staging, old)
    if not parent.holds(name, staging.folder):
        raise OutputError(
            f"{staging.output}: has been replaced in the moment when it was put in place; see who "
            "has done that, then start again"
        )
    staging._is_placed = True  # the marker tells it to whom this is not told, such as a later run
    if fsync:
        # And the rename is, before anyone is told of it, in both folders that it changed.
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
    """Swap new and old, in one step if the system can, else in two that `settle` knows of.

    What comes out is looked at once more, now that nobody can change it: it will be removed.
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
    """Raise `OutputError` unless what has come out is the old model, and still nothing else."""
    if not hidden.holds(name, old):
        raise OutputError(f"{old.path}: was replaced while the merge was at work; start again")
    with hidden.subfolder(name) as there:
        check_is_model(there, old.path)
