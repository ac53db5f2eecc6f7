"""The swap: a filled folder becomes the output, by one rename; and a killed swap is finished.

With `--overwrite` old and new are exchanged in one step (`renameat2`), and then the old one is
removed. `placing` tells a later call on which side of the exchange a merge was killed: the
remaining folder is either the old model, to be removed, or the new one, to go on with. If a file
system cannot exchange (NFS, some FUSE), two renames do it, and a later call completes them. Before
the rename everything is checked once more, by inode; if the exchange brings out another folder than
the checked one, it is put back.
"""

import errno
import os
import stat
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.output.destination import check_is_model, check_replaceable
from shardmix.output.hidden_folder import ASIDE, MODEL, PLACING, staging_path
from shardmix.system.held_folder import HeldFolder
from shardmix.system.locks import LOCK_NAME


@dataclass(frozen=True, slots=True)
class Swap:
    """The swap of an output's old model, if any, and the new one in its hidden folder."""

    output: Path
    """Path of the output."""
    parent: HeldFolder
    """The folder of the output and of the hidden folder."""
    hidden: HeldFolder
    """The hidden folder."""

    @property
    def old_model(self) -> Path | None:
        """Path of the old model if a merge was killed during the swap, else None."""
        aside = self.hidden.entry(ASIDE)
        is_aside = aside is not None and stat.S_ISDIR(aside.st_mode)
        is_gone = is_aside and self.parent.entry(self.output.name) is None
        return staging_path(self.output) / ASIDE if is_gone else None

    def is_done(self) -> bool:
        """Return True if the folder that was to become the output has left its old path."""
        told = _marked(self.hidden)
        if told is None:
            return False
        there = self.hidden.entry(MODEL)
        # An inode's number stays with a folder through every rename.
        return there is None or (bool(told) and there.st_ino != told[0])

    def is_undisturbed(self, new: HeldFolder) -> bool:
        """Return True if the hidden folder and the new model in it still have their paths."""
        try:
            parent = self.output.parent.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (
            os.path.samestat(parent, self.parent.status())
            and self.parent.holds(staging_path(self.output).name, self.hidden)
            and self.hidden.holds(MODEL, new)
        )

    def settle(self) -> None:
        """Clean up after a merge that was killed in the midst of it."""
        if self.old_model is not None:
            self.hidden.move(ASIDE, self.parent, self.output.name)
        if self.is_done():
            self.clear()  # only the old model is left
        elif self.hidden.entry(PLACING) is not None:
            self.hidden.remove(PLACING)

    def clear(self, *, but: Collection[str] = ()) -> None:
        """Remove all entries of the hidden folder, except its lock and those in `but`."""
        models = _marked(self.hidden)
        # The marker last: as long as it is there, the other entries must not be reused.
        for name in sorted(self.hidden.names(), key=lambda name: name == PLACING):
            there = self.hidden.entry(name)
            if name in (MODEL, ASIDE) and models and there and there.st_ino not in models:
                raise OutputError(
                    "is not the model that was to be replaced, but took its place",
                    subject=self.hidden.path / name,
                    remedy="move it to where it belongs",
                )
            if name != LOCK_NAME and name not in but:
                self.hidden.remove(name)

    def run(self, new: HeldFolder, *, overwrite: bool, fsync: bool) -> None:
        """Rename the new model to the output; `confirm` must follow.

        Raises `OutputError` if something was changed meanwhile, and OSError.
        """
        if fsync:
            # The content must be on the disk before the rename.
            new.sync_all()
        # Again: much may have happened in the hours of a merge.
        name = self.output.name
        with check_replaceable(self.parent, name, overwrite=overwrite) or nullcontext() as old:
            inodes = [0 if folder is None else folder.status().st_ino for folder in (new, old)]
            with self.hidden.create(PLACING) as marker:
                marker.write(b"%d %d" % tuple(inodes))
            if fsync:
                self.hidden.sync_file(PLACING)
                self.hidden.sync()
            new.check_own()
            if not self.is_undisturbed(new):
                raise OutputError(
                    "has been moved or replaced while the merge was at work, so its output was "
                    "not put in place",
                    subject=staging_path(self.output),
                    remedy="find out who did that, then start again",
                )
            if old is None:
                self.hidden.move(MODEL, self.parent, name)
            else:
                self.exchange(old)

    def exchange(self, old: HeldFolder) -> None:
        """Swap new and old, in one step if the system can, else in two that `settle` can finish.

        The old model is checked once more now that nobody can change it: it will be removed.
        """
        hidden, parent, name = self.hidden, self.parent, self.output.name
        if hidden.exchange(MODEL, parent, name):
            try:
                _refuse_unless(hidden, MODEL, old)
            except BaseException:
                hidden.exchange(MODEL, parent, name)
                raise
            return
        parent.move(name, hidden, ASIDE)
        try:
            _refuse_unless(hidden, ASIDE, old)
            hidden.move(MODEL, parent, name)
        except BaseException:
            hidden.move(ASIDE, parent, name)
            raise

    def confirm(self, new: HeldFolder) -> None:
        """Raise `OutputError` if the output is not the new model, right after the rename."""
        if not self.parent.holds(self.output.name, new):
            raise OutputError(
                "was replaced just as it was put in place",
                subject=self.output,
                remedy="find out who did that, then start again",
            )

    def sync(self) -> None:
        """Bring the rename itself to the disk, in both folders that it changed."""
        self.parent.sync()
        self.hidden.sync()


def _marked(hidden: HeldFolder) -> tuple[int, ...] | None:
    """Return the inodes of the new and the old model (or 0) during the swap, else None.

    () stands for a marker damaged by a power cut.
    """
    try:
        words = hidden.read(PLACING, max_nbytes=50).split()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        return ()  # too long to be what was written
    is_whole = len(words) == 2 and all(word.isdigit() for word in words)
    return tuple(map(int, words)) if is_whole else ()


def _refuse_unless(hidden: HeldFolder, name: str, old: HeldFolder) -> None:
    """Raise `OutputError` unless the entry is the old model, and still nothing else."""
    if not hidden.holds(name, old):
        raise OutputError(
            "was replaced while the merge was at work", subject=old.path, remedy="start again"
        )
    with hidden.subfolder(name) as there:
        check_is_model(there, old.path)
