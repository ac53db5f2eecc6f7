"""Which files go along with the weights: config, tokenizer, templates, module folders.

Lists them; copies nothing and reads no weights.
"""

from pathlib import Path, PurePosixPath

from shardmix import naming
from shardmix.checkpoint import CONFIG_NAME, read_json
from shardmix.errors import SourceError
from shardmix.sentence_modules import MODULES_NAME


def find_companions(folder: Path) -> tuple[str, ...]:
    """Return the files, relative to a model's folder, that an output needs besides weights.

    None where the folder has no config and so is no model's.
    For a sentence-transformers model that includes the folder of each of its modules, whole.
    Raises `SourceError` where modules.json points outside the folder.
    """
    if not any((folder / name).exists() for name in (CONFIG_NAME, MODULES_NAME)):
        return ()  # a folder of files, such as a download folder, and no model's
    module_folders = _module_folders(folder)
    candidates = [entry.name for entry in folder.iterdir() if entry.is_file()]
    for subfolder in (*module_folders, naming.TEMPLATE_FOLDER):
        if (folder / subfolder).is_dir():
            candidates += [
                entry.relative_to(folder).as_posix()
                for entry in (folder / subfolder).rglob("*")
                if entry.is_file()
            ]
    return tuple(
        sorted(
            name
            for name in set(candidates)
            if naming.is_companion_file(name) or name.split("/")[0] in module_folders
        )
    )


def unmerged_weights(companions: tuple[str, ...]) -> tuple[str, ...]:
    """Return those companion files that hold weights themselves, such as a Dense module's."""
    return tuple(name for name in companions if name.endswith((".safetensors", ".bin", ".pt")))


def _module_folders(folder: Path) -> list[str]:
    path = folder / MODULES_NAME
    if not path.exists():
        return []
    # A list at the top, unlike every other file of a model.
    modules = read_json(path, expected=list)
    folders = []
    for module in modules:
        name = module.get("path") if isinstance(module, dict) else None
        if not isinstance(name, str):
            raise SourceError(f"{path}: has a module without a path; it must name a folder")
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise SourceError(
                f"{path}: names the folder {name!r}, which lies outside the model's folder"
            )
        if relative.parts:
            folders.append(relative.parts[0])
    return folders
