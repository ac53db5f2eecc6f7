"""Which files go along with the weights: config, tokenizer, templates, module folders.

Lists them; copies nothing and reads no weights.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shardmix import naming
from shardmix.checkpoint import CONFIG_NAME
from shardmix.errors import SourceError, shown
from shardmix.filesystem import refuse_link_outside, walk
from shardmix.json_files import file_name_finding, read_json
from shardmix.sentence_modules import MODULES_NAME


def find_companions(folder: Path) -> tuple[str, ...]:
    """Return the files, relative to a model's folder, that an output needs besides weights.

    No file where the folder has no config and so is no model's.
    For a sentence-transformers model that includes the folder of each of its modules, whole.
    Raises `SourceError` where modules.json or a link points outside the folder, or where one of
    these is no file.
    """
    if not any(os.path.lexists(folder / name) for name in (CONFIG_NAME, MODULES_NAME)):
        return ()  # a folder of files, such as a download folder, and no model's
    names = [
        entry.name
        for entry in folder.iterdir()
        # A folder of licences may be called so; one that is called like a file is none.
        if naming.is_companion_file(entry.name) and not (entry.is_dir() and not entry.suffix)
    ]
    module_folders = _module_folders(folder)
    for subfolder in (*module_folders, naming.TEMPLATE_FOLDER):
        names += [
            name
            for name in _files_below(folder, subfolder)
            if subfolder in module_folders or naming.is_companion_file(name)
        ]
    for name in names:
        refuse_link_outside(folder, folder / name)
        if not (folder / name).is_file():
            raise SourceError(
                f"{folder / name}: is not a regular file, as it would have to be to go along with "
                "the weights; put the file there, or remove it"
            )
        if not name.isprintable():
            raise SourceError(
                f"{folder / name}: has control characters in its name; rename it, or remove it"
            )
    return tuple(sorted(set(names)))


def unmerged_weights(companions: tuple[str, ...]) -> tuple[str, ...]:
    """Return those companion files that hold weights themselves, such as a Dense module's."""
    return tuple(name for name in companions if name.endswith((".safetensors", ".bin", ".pt")))


def _files_below(folder: Path, subfolder: str) -> Iterator[str]:
    """Yield all that is no folder below a subfolder, by path within the model's folder.

    Links to folders are not entered: they may lead anywhere, or in circles. They are yielded, and
    so refused as what is no file.
    """
    refuse_link_outside(folder, folder / subfolder)
    for path, subfolders, files in walk(folder / subfolder):
        links = [name for name in subfolders if (path / name).is_symlink()]
        for name in (*files, *links):
            yield (path / name).relative_to(folder).as_posix()


def _module_folders(folder: Path) -> list[str]:
    path = folder / MODULES_NAME
    if not os.path.lexists(path):
        return []
    refuse_link_outside(folder, path)
    # A list at the top, unlike every other file of a model.
    modules = read_json(path, expected=list)
    folders = []
    for module in modules:
        name = module.get("path") if isinstance(module, dict) else None
        if not isinstance(name, str):
            raise SourceError(f"{path}: has a module without a path; it must name a folder")
        relative = PurePosixPath(name)
        finding = file_name_finding(name) if relative.parts else None
        if finding is not None:
            raise SourceError(f"{path}: names the folder {shown(name)}, which {finding}")
        if relative.parts:
            folders.append(relative.parts[0])
    return folders
