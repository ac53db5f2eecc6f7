"""The output folder: checked beforehand, filled out of sight, put in place by one rename.

Until the rename the output path does not exist, or still is the old model. Knows folders, not
what is in them.
"""

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.filesystem import free_nbytes
from shardmix.naming import is_companion_file
from shardmix.units import format_size

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MOST_NAME_NBYTES = 200  # of 255, and the folder that the work goes into has a longer one
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
    longest = max(len(os.fsencode(part)) for part in resolved.parts)
    if longest > _MOST_NAME_NBYTES:
        raise OutputError(
            f"{resolved}: has a name of {longest} bytes; an output's have {_MOST_NAME_NBYTES} at "
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
    """Raise `OutputError` where the output's disk lacks room for it."""
    free = free_nbytes(output)
    if free < needed_nbytes:
        raise OutputError(
            f"{output}: needs {format_size(needed_nbytes)} ({needed_nbytes} bytes) but its disk "
            f"has {format_size(free)} free; free some space or write elsewhere with -o"
        )


@contextmanager
def staged_folder(output: Path, *, overwrite: bool, fsync: bool) -> Iterator[Path]:
    """Give a folder to fill; put it at `output` if the block succeeds, remove it if it doesn't.

    Raises `OutputError`, also where something that may not be replaced has come to be at `output`.
    """
    staging = output.with_name(f".{output.name}.shardmix-{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror})") from None
    try:
        yield staging
        try:
            _put_in_place(staging, output, overwrite=overwrite, fsync=fsync)
        except OSError as error:
            raise OutputError(f"{output}: cannot be finished ({error.strerror})") from None
    finally:
        # After success this is nothing, or the model that was replaced.
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, output: Path, *, overwrite: bool, fsync: bool) -> None:
    if fsync:
        _fsync_tree(staging)
    # Again: much can have happened in the hours of a merge.
    check_output(output, overwrite=overwrite, inputs=())
    if output.exists():
        _exchange(staging, output)
    else:
        staging.rename(output)
    if fsync:
        _fsync(output.parent)


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


def _exchange(staging: Path, output: Path) -> None:
    """Swap two folders, in one step where the system can (Linux), else in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(staging), os.fsencode(output)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        error = ctypes.get_errno()
        if error not in _NOT_SUPPORTED:
            raise OSError(error, os.strerror(error))
    aside = staging.with_name(staging.name + "-old")
    output.rename(aside)
    try:
        staging.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    aside.rename(staging)


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
