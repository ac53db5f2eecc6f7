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
from shardmix.units import format_size

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_output(output: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that would destroy something: an input, or what isn't a model.

    `inputs` are model folders, or single files. Raises `OutputError`.
    """
    resolved = output.resolve()
    if output.suffix == ".safetensors":
        raise OutputError(
            f"{output}: names a file; the output is a model folder: leave .safetensors off"
        )
    for source in inputs:
        source_path = source.resolve()
        if resolved == source_path or source_path in resolved.parents:
            raise OutputError(
                f"{output}: is the input {source} or lies inside it; choose a folder outside "
                "all inputs"
            )
        if resolved in source_path.parents and (source.is_dir() or overwrite):
            raise OutputError(
                f"{output}: contains the input {source}; choose a folder that holds no input"
            )
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(
            f"{output}: exists; choose another output, or replace it with --overwrite "
            "(overwrite=True)"
        )
    if not resolved.is_dir():
        raise OutputError(f"{output}: exists and is not a folder; remove it or choose another")
    names = [entry.name for entry in resolved.iterdir()]
    if names and not any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in names
    ):
        raise OutputError(
            f"{output}: holds no safetensors weights, so it isn't a model that --overwrite may "
            "replace; choose another output"
        )


def check_disk(output: Path, needed_nbytes: int) -> None:
    """Raise `OutputError` where the output's disk lacks room for it."""
    free = free_nbytes(output.absolute())
    if free < needed_nbytes:
        raise OutputError(
            f"{output}: needs {format_size(needed_nbytes)} ({needed_nbytes} bytes) but its disk "
            f"has {format_size(free)} free; free some space or write elsewhere with -o"
        )


@contextmanager
def staged_folder(output: Path, *, overwrite: bool, fsync: bool) -> Iterator[Path]:
    """Give a folder to fill; put it at `output` if the block succeeds, remove it if it doesn't."""
    target = output.resolve()
    staging = target.with_name(f".{target.name}.shardmix-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise OutputError(f"{output}: cannot be made ({error.strerror})") from None
    try:
        yield staging
        if fsync:
            _fsync_tree(staging)
        _put_in_place(staging, target, overwrite=overwrite)
        if fsync:
            _fsync(target.parent)
    finally:
        # After success this is nothing, or the model that was replaced.
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, target: Path, *, overwrite: bool) -> None:
    try:
        if not overwrite or not target.exists():
            if target.exists():
                raise OutputError(f"{target}: has appeared while merging; it is left alone")
            staging.rename(target)
            return
        _exchange(staging, target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be put in place ({error.strerror})") from None


def _exchange(staging: Path, target: Path) -> None:
    """Swap two folders, in one step where the system can (Linux), else in two."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(staging), os.fsencode(target)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
        error = ctypes.get_errno()
        if error not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise OSError(error, os.strerror(error))
    aside = staging.with_name(staging.name + "-old")
    target.rename(aside)
    staging.rename(target)
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
    finally:
        os.close(descriptor)
