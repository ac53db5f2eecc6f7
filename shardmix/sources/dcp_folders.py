"""The folder of a distributed checkpoint, and the one with its model's config and tokenizer."""

import os
from pathlib import Path

from shardmix.conventions.weight_names import DCP_METADATA, is_fsdp_folder
from shardmix.errors import SourceError, listed
from shardmix.sources.base import ModelFolder
from shardmix.sources.checkpoint import CONFIG_NAME, stored_weights_in
from shardmix.sources.located import LocalSource


def dcp_folder(located: LocalSource) -> ModelFolder | None:
    """Return the model's folder, with the checkpoint's files if they lie in it."""
    folders = dcp_folders(located)
    if folders is None:
        return None
    stored, folder = folders
    names = (path.name for path in folder.glob("*.distcp"))
    return ModelFolder(folder, (DCP_METADATA, *sorted(names)) if stored == folder else ())


def dcp_folders(located: LocalSource) -> tuple[Path, Path] | None:
    """Return the folder of a distributed checkpoint, and the model's; None for another model.

    The checkpoint is the named folder, or one in it that accelerate made. The model's folder is the
    named one; if only the folder around it has a config.json, that. Weights in another format come
    first. Raises `SourceError` if there are several.
    """
    path = located.path
    if not path.is_dir() or stored_weights_in(path) is not None:
        return None
    if not _is_described(path):
        found = sorted(inner.name for inner in path.iterdir() if is_fsdp_folder(inner.name))
        found = [name for name in found if _is_described(path / name)]
        if len(found) > 1:
            raise SourceError(
                f"holds several distributed checkpoints: {listed(found)}",
                subject=path,
                remedy=f"give one of them, such as {path / found[0]}",
            )
        return (path / found[0], path) if found else None
    around = path.absolute().parent
    is_within = (
        located.hub_id is None
        and not os.path.lexists(path / CONFIG_NAME)
        and os.path.lexists(around / CONFIG_NAME)
    )
    return (path.absolute(), around) if is_within else (path, path)


def _is_described(folder: Path) -> bool:
    path = folder / DCP_METADATA
    return os.path.lexists(path) and not path.is_dir()  # a folder so named is another program's
