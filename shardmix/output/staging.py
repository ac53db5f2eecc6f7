"""The output folder: filled in a hidden folder, put in place by one rename.

At every instant the output path is absent, or the old model, or the new one, complete. The output
grows in a hidden folder beside it, on the same file system, `.NAME.shardmix`, which a failed or
killed merge leaves for the next call:

    lock        its owner: one merge at a time to one output
    scores      scores so far, if the weights come from examples
    journal     finished leaves
    model/      the future output
    placing     only during the rename: the inode of model/

Anybody may plant links there (`hidden_folder`): names in held folders are opened with `O_NOFOLLOW`,
new ones with `O_EXCL`. An earlier merge's file is reused if it is regular, this user's, and has one
name. Otherwise it is refused (`lock`, `journal`, `model/`) or merged again (files in `model/`).
Links above the output are the user's own and are resolved once, at the start. The output itself, a
profile and its picture are never written through a link.

Knows folders, not their content.
"""

import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from shardmix.errors import OutputError, writing_failed
from shardmix.output.hidden_folder import (
    ASIDE,
    FACTORS,
    JOURNAL,
    MODEL,
    PLACING,
    SCORES,
    open_locked,
    own_hidden,
    staging_path,
)
from shardmix.output.swap import Swap
from shardmix.system.held_folder import HeldFolder, open_folder
from shardmix.system.locks import LOCK_NAME

_FRESH = "fresh"  # made for a moment, to see the permissions of a new folder


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
        self._swap = Swap(output, parent, hidden)
        self._is_placed = False

    @property
    def is_placed(self) -> bool:
        """True if its folder has become the output."""
        with suppress(OSError, OutputError):
            self._is_placed = self._is_placed or self._swap.is_done()
        return self._is_placed

    @property
    def is_moved(self) -> bool:
        """True if its path now leads elsewhere; False if that is unknown."""
        with suppress(OSError):
            return not self._swap.is_undisturbed(self.folder)
        return False

    @property
    def has_journal(self) -> bool:
        """True if a merge has begun its journal."""
        return self.hidden.entry(JOURNAL) is not None

    @property
    def has_factors(self) -> bool:
        """True if low-rank factors are stored there."""
        return self.hidden.entry(FACTORS) is not None

    @property
    def has_scores(self) -> bool:
        """True if scores are stored there."""
        return self.hidden.entry(SCORES) is not None

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
        return self._swap.old_model

    @property
    def nbytes(self) -> int:
        """Disk space that its files and the journal already take, without an old model."""
        total = 0
        with suppress(OSError):  # its process is just removing it
            for name, there in self.hidden.files():
                if not name.startswith(f"{ASIDE}/"):
                    total += there.st_blocks * 512
        return total

    def take_up(self, *, restart: bool) -> None:
        """Settle what an earlier merge left there, and open the future output.

        `restart`: begin anew. Raises `OutputError`.
        """
        try:
            self._swap.settle()
            if restart:
                # This very call may have stored the scores, before it began to merge.
                self._swap.clear(but=(SCORES,))
            is_begun = self.has_journal or self.has_scores or self.has_factors
            mode = _mode_of_new_folder(self.hidden)
            self.folder = self.hidden.own_subfolder(MODEL, mode=mode)
            self.is_worth_keeping = is_begun
        except OSError as error:
            raise writing_failed(self.path, error, "cannot be used") from None

    def clear(self) -> None:
        """Remove all that is in the hidden folder, except its lock."""
        self._swap.clear()

    def forget_scores(self) -> None:
        """Remove the scores of an earlier call. Raises `OutputError`."""
        try:
            if self.has_scores:
                self.hidden.remove(SCORES)
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
            self._swap.run(self.folder, overwrite=overwrite, fsync=fsync)
            # Known from now on, even if the disk cannot be looked at any more; later processes
            # read the marker.
            self._is_placed = True
            try:
                self._swap.confirm(self.folder)
            except OutputError:
                self._is_placed = False
                raise
            if fsync:
                # Before anyone is told.
                self._swap.sync()
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
                opened = open_locked(output)
            except OSError as error:
                raise writing_failed(output, error, "cannot be made") from None
            stack.callback(opened.close)
            staging = Staging(output, opened.parent, opened.hidden)
            try:
                staging.is_worth_keeping = True  # until its content is known
                staging.take_up(restart=restart)
                stack.enter_context(staging.folder)
                yield staging
            finally:
                if not staging.is_worth_keeping:
                    # After success this is nothing, or the replaced model. The next call removes
                    # what cannot be removed now.
                    with suppress(OSError, OutputError):
                        staging.clear()
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
            hidden = stack.enter_context(own_hidden(parent, staging_path(output).name))
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
            if staging.has_journal and staging.hidden.entry(PLACING) is None:
                return
        opened = open_locked(output)
        try:
            Swap(output, opened.parent, opened.hidden).settle()
            if opened.hidden.names() == [LOCK_NAME]:
                opened.remove_empty()
        finally:
            opened.close()
    except OSError as error:
        raise writing_failed(staging_path(output), error, "cannot be used") from None


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
