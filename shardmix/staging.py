"""The output folder: checked beforehand, filled out of sight, put in place by one rename.

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
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.filesystem import free_nbytes
from shardmix.locks import LOCK_NAME, lock_folder
from shardmix.naming import is_companion_file
from shardmix.units import format_size

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
_PLACING = "placing"  # there while new and old change places: the new one's inode
_ASIDE = "old"  # where the old one is meanwhile, on systems that cannot exchange in one step
_MOST_NAME_NBYTES = 240  # of 255, and the folder that the work goes into has a longer one
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def resolve_output(output: str | os.PathLike[str]) -> Path:
    """Return the one absolute path that all checks and the rename use; links and `..` resolved."""
    try:
        resolved = Path(output).expanduser().resolve()
        os.fsencode(resolved).decode()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, ~nobody, not UTF-8
        raise OutputError(
            f"{output!r}: cannot be a path ({error}); choose another output"
        ) from None
    length = len(os.fsencode(resolved.name))
    if length > _MOST_NAME_NBYTES:
        raise OutputError(
            f"{resolved}: has a name of {length} bytes; an output's have {_MOST_NAME_NBYTES} at "
            "most: choose a shorter one"
        )
    return resolved


def check_output(output: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that would destroy something: an input, or what isn't just a model.

    `output` is resolved; `inputs` are model folders and weight files. Raises `OutputError`.
    """
    if output.suffix == ".safetensors":
        raise OutputError(
            f"{output}: names a file; the output is a model folder: leave .safetensors off"
        )
    for source in inputs:
        source_path = source.resolve()
        if output == source_path or source_path in output.parents:
            raise OutputError(
                f"{output}: is the input {source} or lies inside it; choose a folder outside "
                "all inputs"
            )
        if output in source_path.parents and (source.is_dir() or overwrite):
            raise OutputError(
                f"{output}: contains the input {source}; choose a folder that holds no input"
            )
    try:
        _check_replaceable(output, overwrite=overwrite)
        parent = next(folder for folder in output.parents if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
            raise OutputError(f"{parent}: cannot be written to; choose another output")
    except OSError as error:
        raise OutputError(f"{output}: cannot be used ({error.strerror}); choose another") from None


def check_disk(output: Path, needed_nbytes: int) -> None:
    """Raise `OutputError` where the output's disk lacks room for it, staged files included."""
    free = free_nbytes(output) + Staging(output).nbytes
    if free < needed_nbytes:
        raise OutputError(
            f"{output}: needs {format_size(needed_nbytes)} ({needed_nbytes} bytes) but its disk "
            f"has {format_size(free)} free; free some space or write elsewhere with -o"
        )


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
        self.is_placed = False
        """The output is the new model."""
        self.is_worth_keeping = False
        """After a failure, leave it all for a later run; at first, whether there is anything."""

    @property
    def nbytes(self) -> int:
        """What its files take of the disk already."""
        total = 0
        with suppress(OSError):  # its process is just removing it
            total = sum(path.lstat().st_blocks * 512 for path in self.folder.rglob("*"))
        return total

    def place(self, *, overwrite: bool, fsync: bool) -> None:
        """Make the filled folder the output: the one step in which anything is seen to change.

        Raises `OutputError`, also where something that may not be replaced has come to be there.
        """
        try:
            _put_in_place(self, overwrite=overwrite, fsync=fsync)
        except OSError as error:
            raise OutputError(f"{self.output}: cannot be finished ({error.strerror})") from None
        self.is_worth_keeping = False


@contextmanager
def open_staging(output: Path, *, restart: bool = False) -> Iterator[Staging]:
    """Make or take up an output's staging folder, and remove it, but for what is worth keeping.

    With `restart` what an earlier run has left is thrown away first. Raises `OutputError` where
    another process is at work on the same output.
    """
    staging = Staging(output)
    made = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(staging.path)
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror})") from None
    try:
        try:
            _settle(staging)
            if restart:
                _clear(staging.path)
            staging.is_worth_keeping = staging.journal_path.exists()
            staging.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{staging.path}: cannot be used ({error.strerror}); remove it by hand"
            ) from None
        yield staging
    finally:
        if not staging.is_worth_keeping:
            # After success this is nothing, or the model that was replaced.
            with suppress(OSError):  # what cannot be removed now is at the next run
                _clear(staging.path)
                # Last, and the folder after it: whoever comes now makes a lock of its own.
                (staging.path / LOCK_NAME).unlink()
                for folder in (staging.path, *made):
                    folder.rmdir()
        os.close(lock)


def settle(output: Path) -> None:
    """Finish what a run had begun that was killed in the moment of putting its output in place."""
    staging = Staging(output)
    if not (staging.path / _PLACING).exists():
        return
    try:
        lock = lock_folder(staging.path)
    except OSError as error:
        raise OutputError(f"{staging.path}: cannot be used ({error.strerror})") from None
    try:
        _settle(staging)
    finally:
        os.close(lock)


def staging_path(output: Path) -> Path:
    """Return the hidden folder that belongs to an output."""
    return output.with_name(f".{output.name}.shardmix")


def _settle(staging: Staging) -> None:
    """Tidy up after a run that was killed while old and new changed places."""
    aside, marker = staging.path / _ASIDE, staging.path / _PLACING
    if aside.exists() and not staging.output.exists():
        aside.rename(staging.output)
    if marker.exists() and staging.output.exists():
        # An inode's number stays with a folder through every rename.
        if marker.read_text() == str(staging.output.stat().st_ino):
            _clear(staging.path)  # the output is the new model: what is left is the old one
        else:
            marker.unlink()


def _clear(folder: Path) -> None:
    """Remove what is in a staging folder, but for its lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_NAME:
            entry.unlink()


def _put_in_place(staging: Staging, *, overwrite: bool, fsync: bool) -> None:
    folder, output = staging.folder, staging.output
    marker = staging.path / _PLACING
    marker.write_text(str(folder.stat().st_ino))
    if fsync:
        # What is renamed is on the disk before it is renamed.
        _fsync_tree(staging.path)
    # Again: much can have happened in the hours of a merge.
    check_output(output, overwrite=overwrite, inputs=())
    if output.exists():
        _exchange(folder, output, aside=staging.path / _ASIDE)
    else:
        folder.rename(output)
    staging.is_placed = True
    if fsync:
        # And the rename is, before anyone is told of it, in both folders that it changed.
        _fsync(output.parent)
        _fsync(staging.path)


def _check_replaceable(output: Path, *, overwrite: bool) -> None:
    try:
        output.lstat()
    except FileNotFoundError:
        return
    if not overwrite:
        raise OutputError(
            f"{output}: exists; choose another output, or replace it with --overwrite "
            "(overwrite=True)"
        )
    if not output.is_dir():
        raise OutputError(f"{output}: exists and is not a folder; remove it or choose another")
    if output.is_mount():
        raise OutputError(f"{output}: is a mount point; name a folder in it")
    entries = list(output.iterdir())
    is_model = any(entry.suffix == ".safetensors" for entry in entries)
    if entries and not is_model:
        raise OutputError(
            f"{output}: holds no safetensors weights, so it isn't a model that --overwrite may "
            "replace; choose another output"
        )
    # Where there are checkpoints below, or a whole collection of models, it is more than a model.
    kept = [entry.name for entry in entries if entry.is_dir() and _is_a_model(entry)]
    kept += [entry.name for entry in entries if entry.name == ".git" or entry.suffix == ".pt"]
    if kept:
        raise OutputError(
            f"{output}: holds {', '.join(sorted(kept)[:3])} besides a model, which --overwrite "
            "would delete; choose another output"
        )


def _is_a_model(folder: Path) -> bool:
    """Tell whether a folder is a model of its own, and not a module of the one around it."""
    if is_companion_file(f"{folder.name}/config.json"):
        return False
    marks = ("tokenizer_config.json", "trainer_state.json", ".git", "optimizer.pt")
    return any((folder / name).exists() for name in marks) or any(folder.glob("*.safetensors"))


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
    for path, _, names in os.walk(folder):
        for name in names:
            _fsync(Path(path) / name)
        _fsync(Path(path))


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
