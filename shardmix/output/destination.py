"""Checks of an output's path: it destroys nothing, and its disk has room. Writes nothing."""

import itertools
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from shardmix.conventions.file_kinds import has_given_name
from shardmix.conventions.module_tree import module_subfolders, read_modules
from shardmix.conventions.weight_names import is_loaded_name
from shardmix.errors import OutputError, SourceError, writing_failed
from shardmix.errors.redaction import is_url
from shardmix.output.provenance import PROVENANCE_NAME, parse_provenance
from shardmix.system.files import free_nbytes
from shardmix.system.held_folder import HeldFolder, open_folder
from shardmix.system.units import format_size

_BESIDE_A_MODEL = ("README.md", PROVENANCE_NAME, ".gitattributes")
_HUB_LEFTOVERS = ".cache/huggingface/"  # left by a download into a folder
_MOST_NAME_NBYTES = 240  # of 255; the staging folder's name is longer


def resolve_output(output: str | os.PathLike[str]) -> Path:
    """Return the one absolute path that all checks and the rename use.

    Links and `..` in its parents are resolved. A link in its last part is not.
    """
    if is_url(os.fspath(output)):
        raise OutputError(
            "is a URL, and an output is a folder on this machine",
            subject=os.fspath(output),
            remedy="name one, and upload it afterwards",
        )
    try:
        path = Path(output).expanduser()
        is_named = path.name not in ("", "..")
        resolved = path.parent.resolve() / path.name if is_named else path.resolve()
        os.fsencode(resolved).decode()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, ~nobody, not UTF-8
        raise OutputError(
            f"cannot be a path ({error})",
            subject=repr(output),
            remedy="choose another output",
        ) from None
    if not resolved.name:
        raise OutputError(
            "is the root of the file system", subject=resolved, remedy="name a folder in it"
        )
    length = len(os.fsencode(resolved.name))
    if length > _MOST_NAME_NBYTES:
        raise OutputError(
            f"has a name of {length} bytes; an output's have {_MOST_NAME_NBYTES} at most",
            subject=resolved,
            remedy="choose a shorter one",
        )
    return resolved


def check_output(output: Path, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that would destroy an input, or anything besides a model.

    `output` is resolved; `inputs` are model folders and weight files. Raises `OutputError`.
    """
    if output.suffix == ".safetensors":
        raise OutputError(
            "names a file; the output is a model folder",
            subject=output,
            remedy="leave .safetensors off",
        )
    for source in inputs:
        source_path = source.resolve()
        if output == source_path or source_path in output.parents:
            raise OutputError(
                f"is the input {source} or lies inside it",
                subject=output,
                remedy="choose a folder outside all inputs",
            )
        if output in source_path.parents and (source.is_dir() or overwrite):
            raise OutputError(
                f"contains the input {source}",
                subject=output,
                remedy="choose a folder that holds no input",
            )
    try:
        parent = next(folder for folder in output.parents if folder.exists())
        if parent == output.parent:
            with open_folder(parent) as held:
                if old := check_replaceable(held, output.name, overwrite=overwrite):
                    old.close()
        if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
            raise OutputError(
                "cannot be written to", subject=parent, remedy="choose another output"
            )
    except OSError as error:
        raise writing_failed(output, error, "cannot be used") from None


def check_disk(output: Path, needed_nbytes: int, *, staged_nbytes: int = 0) -> None:
    """Raise `OutputError` if the disk lacks room for an output, of which `staged_nbytes` exist."""
    try:
        free = free_nbytes(output) + staged_nbytes
    except OSError as error:
        raise OutputError(
            f"the free space of its disk cannot be read ({error.strerror})",
            subject=output,
            remedy="check its permissions and its disk",
        ) from None
    if free < needed_nbytes:
        raise OutputError(
            f"needs {format_size(needed_nbytes)} ({needed_nbytes} bytes) but its disk has "
            f"{format_size(free)} free",
            subject=output,
            remedy="free some space or write elsewhere with -o",
        )


def check_replaceable(parent: HeldFolder, name: str, *, overwrite: bool) -> HeldFolder | None:
    """Return the opened model that an output replaces, or None if nothing has its name.

    Raises OSError, and `OutputError` if the entry may not be replaced.
    """
    there = parent.entry(name)
    if there is None:
        return None
    output = parent.path / name
    if stat.S_ISLNK(there.st_mode):
        raise OutputError(
            "is a link, which an output never replaces or follows",
            subject=output,
            remedy="name the folder that it leads to, remove it, or choose another output",
        )
    if not overwrite:
        raise OutputError(
            "exists",
            subject=output,
            remedy="choose another output, or replace it with --overwrite (overwrite=True)",
        )
    if not stat.S_ISDIR(there.st_mode):
        raise OutputError(
            "exists and is not a folder", subject=output, remedy="remove it or choose another"
        )
    if there.st_dev != parent.status().st_dev:
        raise OutputError("is a mount point", subject=output, remedy="name a folder in it")
    folder = parent.subfolder(name)
    try:
        check_is_model(folder, output)
    except BaseException:
        folder.close()
        raise
    return folder


def check_is_model(folder: HeldFolder, output: Path) -> None:
    """Raise `OutputError` unless a folder is empty, or holds a model and nothing else.

    `output` is its name in messages: the folder itself may have moved since.
    """
    names = folder.names()
    subfolders = tuple(f"{subfolder}/" for subfolder in _module_subfolders(folder.path))
    weights = (name for name, _ in folder.files() if name.endswith(".safetensors"))
    if names and not any("/" not in name or name.startswith(subfolders) for name in weights):
        raise OutputError(
            "holds no safetensors weights, so it isn't a model that --overwrite may replace",
            subject=output,
            remedy="choose another output",
        )
    others = list(itertools.islice(_not_the_models(folder), 4))
    if others:
        named = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
        raise OutputError(
            f"holds {named} besides a model, which --overwrite would delete",
            subject=output,
            remedy="move that elsewhere, or choose another output",
        )


def _not_the_models(folder: HeldFolder) -> Iterator[str]:
    """Yield the files below a folder that do not belong to its model: somebody's work.

    Files that shardmix wrote are known by name. In a model from elsewhere, files with names that
    loaders and other programs give are the model's: weights, and files that go along with weights.
    """
    written: Collection[str] = ()
    with (
        suppress(SourceError, OutputError, OSError),
        folder.open_regular(PROVENANCE_NAME) as provenance,
    ):
        written = parse_provenance(provenance, folder.path)[0].digests.files
    subfolders = _module_subfolders(folder.path)
    for file, _ in folder.files():
        is_own = file in written if written else _may_be_a_models(file, subfolders)
        if not is_own and file not in _BESIDE_A_MODEL and not file.startswith(_HUB_LEFTOVERS):
            yield file


def _module_subfolders(folder: Path) -> tuple[str, ...]:
    with suppress(SourceError):  # it is no model of sentence-transformers
        return module_subfolders(read_modules(folder))
    return ()


def _may_be_a_models(file: str, subfolders: Sequence[str]) -> bool:
    is_weights = "/" not in file and is_loaded_name(file)
    is_modules = file.startswith(tuple(f"{subfolder}/" for subfolder in subfolders))
    return is_weights or is_modules or has_given_name(file)
