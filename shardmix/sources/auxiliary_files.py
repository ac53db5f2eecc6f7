"""The files that go along with the weights: config, tokenizer, templates, modules, the rest.

Lists them, and the files left out; copies nothing and reads no weights.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from shardmix.conventions import file_kinds
from shardmix.conventions.adapters import inner_adapter_tensor
from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import module_subfolders, read_modules
from shardmix.conventions.sentence_modules import MODULES_NAME
from shardmix.conventions.weight_names import MARKS, stem_of
from shardmix.errors import SourceError, listed, printable
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import CONFIG_NAME
from shardmix.system.files import (
    LFS_FINDING,
    LFS_REMEDY,
    is_lfs_pointer,
    open_regular,
    refuse_link_outside,
)

# Files that make a folder a model's.
_MARKS = (CONFIG_NAME, MODULES_NAME)
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack"),
    ".onnx",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MOST_LEFT_OUT = 1_000
_MOST_POINTER_NBYTES = 1_024  # by Git LFS's specification


@dataclass(frozen=True, slots=True)
class AuxiliaryFiles:
    """The files of a model's folder that go along with the weights."""

    files: tuple[str, ...] = ()
    """Paths within the folder, in order."""
    left_out: tuple[LeftOut, ...] = ()
    """Files that do not go along, except the merged weights."""


@dataclass(slots=True)
class _Found:
    """Content of a folder."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Path within the folder → bytes."""
    left_out: list[LeftOut] = field(default_factory=list)
    """Folders that were not searched, and entries that are no files."""
    num_below: dict[str, int] = field(default_factory=dict)
    """Folder → number of files and folders seen below it."""


def find_auxiliary_files(
    folder: Path, *, weights: Collection[str] = (), is_single_file: bool = False
) -> AuxiliaryFiles:
    """Return the files of a model's folder that an output needs besides weights.

    Returns nothing for a folder without a config, which is no model's. The folder of each
    sentence-transformers module goes along as a whole. `weights` are the model's own, by path
    within the folder. If a single file of the folder was named as the model, other files there may
    be anybody's: only those with names that surely are a model's go along.

    Raises `SourceError` if modules.json or a link leads outside the folder, or if an entry that
    goes along is not a file.
    """
    if not _is_a_models(folder, weights):
        return AuxiliaryFiles()
    modules = _module_folders(folder)
    found = _root_files(folder) if is_single_file else _all_files(folder, modules)
    if is_single_file:
        for subfolder in (*modules, file_kinds.TEMPLATE_FOLDER):
            _look_into(folder, subfolder, found, whole={subfolder}, depth=1)
    along, left_out = file_kinds.divide(found.sizes, weights=weights, modules=modules)
    left_out += found.left_out
    if is_single_file:
        others = [name for name in along if not _is_surely_a_models(name, modules)]
        left_out = [LeftOut(name, "beside a single file; name the folder") for name in others]
        along = [name for name in along if _is_surely_a_models(name, modules)]
    files = []
    for name in along:
        reason = None if _is_surely_a_models(name, modules) else _unfit(folder, name)
        if reason is not None:
            left_out.append(LeftOut(name, reason))
            continue
        refuse_link_outside(folder, folder / name)
        if not (folder / name).is_file():
            raise SourceError(
                "is not a regular file, and only regular files are copied with the weights",
                subject=folder / name,
                remedy="put the file there, or remove it",
            )
        if not name.isprintable():
            raise SourceError(
                "has control characters in its name",
                subject=folder / name,
                remedy="rename it, or remove it",
            )
        if found.sizes[name] <= _MOST_POINTER_NBYTES:
            _refuse_lfs_pointer(folder / name)
        files.append(name)
    return AuxiliaryFiles(tuple(sorted(files)), _shortened(left_out))


def unmerged_weights(auxiliary_files: Iterable[str]) -> list[str]:
    """Return the auxiliary files with weights of their own, such as a Dense module's."""
    return [name for name in auxiliary_files if name.endswith(_WEIGHT_SUFFIXES)]


def left_out_warning(left_out: Collection[LeftOut], model: str) -> str | None:
    """Name the files that somebody may miss in the output; return None if there are none."""
    by_reason: dict[str, list[str]] = {}
    for finding in left_out:
        if finding.is_told and finding.reason != file_kinds.ADAPTER:
            by_reason.setdefault(finding.reason, []).append(finding.name)
    if not by_reason:
        return None
    groups = "; ".join(f"{listed(names)} ({reason})" for reason, names in by_reason.items())
    return f"left out of the output, though {model} has it: {groups}; --json lists all"


def adapter_warnings(sources: Iterable[Source]) -> Iterator[str]:
    """Yield a warning for each adapter, such as LoRA, beside a model's weights or within them."""
    for source in sources:
        inner = inner_adapter_tensor(source.tensors.names)
        if inner is not None:
            yield (
                f"{source.text}: holds adapters within the model, such as {inner}; their "
                "matrices are averaged one by one, and the product of means is not the mean of "
                "products: if models differ in them, merge them into the weights first"
            )
        beside = [finding.name for finding in source.left_out]
        if not source.is_single_file:
            beside += [name for name in _ADAPTER_FILES if os.path.lexists(source.folder / name)]
        names = [name for name in beside if file_kinds.is_adapter_file(name)]
        if names:
            yield (
                f"{source.text}: has an adapter beside its weights "
                f"({listed(sorted(set(names)))}), which is left out, though transformers with "
                "PEFT applies it when it loads the folder; if it is meant to count, merge it "
                "into the weights first (PEFT's "
                "merge_and_unload() and save_pretrained())"
            )


def _refuse_lfs_pointer(path: Path) -> None:
    with suppress(OSError), open_regular(path) as file:  # copying reports files that cannot be read
        if is_lfs_pointer(file.read(_MOST_POINTER_NBYTES)):
            raise SourceError(LFS_FINDING, subject=path, remedy=LFS_REMEDY)


def _is_a_models(folder: Path, weights: Collection[str]) -> bool:
    marks = [*_MARKS]
    # For weights of other names another file does so, which elsewhere may be anybody's.
    marks += [mark for stem, mark in MARKS.items() if stem in map(stem_of, weights)]
    return any(os.path.lexists(folder / name) for name in marks)


def _unfit(folder: Path, name: str) -> str | None:
    """Return why a file that may be the model's cannot go along, or None if it can."""
    if not name.isprintable():
        return file_kinds.UNPRINTABLE
    return None if os.access(folder / name, os.R_OK) else "cannot be read"


def _is_surely_a_models(name: str, modules: Collection[str]) -> bool:
    return name.split("/")[0] in modules or file_kinds.is_auxiliary_file(name)


def _all_files(folder: Path, modules: Collection[str]) -> _Found:
    found = _Found()
    whole = {*modules, file_kinds.TEMPLATE_FOLDER}
    _look_into(folder, "", found, whole=whole, depth=0)
    for top, num_below in found.num_below.items():
        if num_below > file_kinds.MAX_FOLDER_FILES:
            found.left_out.append(LeftOut(f"{top}/", file_kinds.TOO_MANY_FILES))
            found.sizes = {
                path: nbytes
                for path, nbytes in found.sizes.items()
                if not path.startswith(f"{top}/")
            }
    return found


def _root_files(folder: Path) -> _Found:
    found = _Found()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not (_is_folder(entry) and _may_be_a_folder(entry.name)):
                _add(entry, entry.name, found, is_needed=file_kinds.is_auxiliary_file(entry.name))
    return found


def _may_be_a_folder(name: str) -> bool:
    # A folder of licences may have such a name; a name with a file's suffix is a file's.
    return not (file_kinds.is_auxiliary_file(name) and PurePosixPath(name).suffix)


def _look_into(
    folder: Path, subfolder: str, found: _Found, *, whole: Collection[str], depth: int
) -> None:
    """Add the entries below a subfolder ("" for all) of a model's folder.

    Links to folders are not entered: they may lead anywhere, or in circles. In folders that go
    along as a `whole` they are added, and so refused since they are no files; elsewhere they are
    left out.
    """
    top = subfolder.split("/")[0]
    is_whole = top in whole
    if subfolder in whole:
        refuse_link_outside(folder, folder / subfolder)
    try:
        with os.scandir(folder / subfolder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except PermissionError:
        if is_whole or not subfolder:
            raise
        found.left_out.append(LeftOut(f"{subfolder}/", "cannot be read"))
        return
    for entry in entries:
        path = f"{subfolder}/{entry.name}" if subfolder else entry.name
        if subfolder and not is_whole:
            found.num_below[top] = found.num_below.get(top, 0) + 1
            if found.num_below[top] > file_kinds.MAX_FOLDER_FILES:
                return  # enough to know that it does not go along
        if not _is_folder(entry) or not (subfolder or _may_be_a_folder(entry.name)):
            is_needed = is_whole or (not subfolder and file_kinds.is_auxiliary_file(entry.name))
            _add(entry, path, found, is_needed=is_needed)
        elif entry.is_symlink() and path not in whole:
            if is_whole:
                found.sizes[path] = 0
            else:
                found.left_out.append(LeftOut(f"{path}/", "a link to a folder"))
        else:
            finding = None if is_whole or path in whole else file_kinds.folder_left_out(path)
            if depth >= file_kinds.MAX_FOLDER_DEPTH and not is_whole:
                finding = LeftOut(f"{path}/", "folders nested too deeply")
            if finding is not None:
                found.left_out.append(finding)
            else:
                _look_into(folder, path, found, whole=whole, depth=depth + 1)


def _add(entry: os.DirEntry[str], path: str, found: _Found, *, is_needed: bool) -> None:
    """Add a file; add another kind of entry only if it is needed, and so refused."""
    nbytes = _file_nbytes(entry)
    if nbytes is not None:
        found.sizes[path] = nbytes
    elif is_needed:
        found.sizes[path] = 0
    else:
        reason = "a link to nothing" if entry.is_symlink() else "not a regular file"
        found.left_out.append(LeftOut(path, reason))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def _file_nbytes(entry: os.DirEntry[str]) -> int | None:
    """Return a file's size, or None if the entry is no file."""
    try:
        return entry.stat().st_size if entry.is_file() else None
    except OSError:
        return None


def _shortened(left_out: list[LeftOut]) -> tuple[LeftOut, ...]:
    more = len(left_out) - _MOST_LEFT_OUT
    # A name that is no valid Unicode cannot go into JSON.
    plain = [replace(finding, name=printable(finding.name)) for finding in left_out]
    ordered = sorted(plain, key=lambda finding: (not finding.is_told, finding.name))
    if more <= 0:
        return tuple(ordered)
    return (*ordered[:_MOST_LEFT_OUT], LeftOut("...", f"{more:,} more", is_told=False))


def _module_folders(folder: Path) -> list[str]:
    """Return the top folders of a model's modules, within the model's folder."""
    subfolders = module_subfolders(read_modules(folder))
    return list(dict.fromkeys(subfolder.split("/")[0] for subfolder in subfolders))
