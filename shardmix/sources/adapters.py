"""LoRA adapters, opened by their config and header. Reads no tensor data."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardmix.conventions import peft
from shardmix.conventions.adapters import CONFIG_NAME
from shardmix.conventions.peft import LoraConfig, Part
from shardmix.errors import SourceError, shown
from shardmix.formats.strict_json import MAX_JSON_NBYTES, read_json
from shardmix.sources.base import Opening, Source
from shardmix.sources.checkpoint import open_checkpoint
from shardmix.sources.identity import FileStamp, SourceFile
from shardmix.system.files import open_regular, read_regular, refuse_link_outside


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter."""

    text: str
    """The adapter as the user named it."""
    name: str
    """Its name in public: Hub id with revision, or the name of its folder."""
    config: LoraConfig = field(repr=False)
    """The meaning of its config."""
    weights: Source = field(repr=False)
    """Its tensors."""
    files: tuple[SourceFile, ...] = field(repr=False)
    """Its config and its weight file."""
    parts: tuple[Part, ...] = field(repr=False)
    """The meaning of each tensor."""

    @property
    def hub_id(self) -> str | None:
        """`org/name`, if it came from the Hub."""
        return self.weights.identity.hub_id

    @property
    def commit(self) -> str | None:
        """Its commit, if it came from the Hub."""
        return self.weights.identity.commit

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.weights.folder


def open_adapter(opening: Opening) -> Adapter:
    """Open an adapter's folder, reading its config and header.

    Raises `SourceError` if it is none that can be applied, `BudgetError` as for a checkpoint.
    """
    folder = opening.located.path
    config_path = folder / CONFIG_NAME
    try:
        path = folder / _weights_name(folder)
        refuse_link_outside(folder, config_path)
        refuse_link_outside(folder, path)
        config = peft.lora_config(read_json(config_path))
        located = replace(opening.located, path=path)
        weights = open_checkpoint(replace(opening, located=located))
        parts = tuple(map(peft.part_of, weights.tensors.names))
    except SourceError as error:
        raise error if error.subject else error.of(opening.text) from None
    is_from_hub = weights.identity.commit is not None
    name = opening.text if is_from_hub else Path(os.path.realpath(folder)).name
    files = (_config_file(config_path), *weights.identity.files)
    commit = weights.identity.commit
    named = tuple(replace(file, name=Path(file.path).name, commit=commit) for file in files)
    return Adapter(opening.text, name, config, weights, named, parts)


def _weights_name(folder: Path) -> str:
    """Return the name of an adapter's weight file; raise `SourceError` if a folder has none."""
    if not folder.is_dir():
        raise SourceError("is a file; an adapter is a folder", remedy="give its folder")
    names = (CONFIG_NAME, peft.WEIGHTS_NAME, peft.PICKLE_NAME, "config.json")
    there = {name for name in names if os.path.lexists(folder / name)}
    found = peft.weights_name(there)
    if found is None:
        raise peft.no_adapter(there)
    return found


def _config_file(path: Path) -> SourceFile:
    """Return the config as a file of the source: it decides values, so a change must be found."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
        content = read_regular(path, max_nbytes=MAX_JSON_NBYTES)
    except OSError as error:
        raise SourceError(
            f"cannot be read ({error.strerror or error})",
            subject=path,
            remedy="check its permissions and its disk",
        ) from None
    return SourceFile(
        path=str(path.absolute()),
        nbytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        header_sha256=hashlib.sha256(content).hexdigest(),
        name=path.name,
        stamp=FileStamp.of(status),
    )


def base_warning(adapter: Adapter, base: Source) -> str | None:
    """Return a warning if an adapter names another base than it is given, or None."""
    named = adapter.config.base_model
    if not named:
        return None
    own = {
        base.text.partition("@")[0],
        base.identity.hub_id or "",
        base.root.name,
        base.root.resolve().name,
        str(base.config.get("_name_or_path") or ""),
    }
    # Of a path on another machine only the last part can be known here.
    ends = {Path(text).name.lower() for text in own if text}
    ends |= {part.removeprefix("models--").split("--")[-1].lower() for part in base.root.parts}
    is_hub_id = named.count("/") == 1 and not named.startswith((".", "/", "~"))
    if base.identity.hub_id is not None and is_hub_id:
        is_same = named.lower() == base.identity.hub_id.lower()
    else:
        is_same = Path(named.rstrip("/")).name.lower() in ends
    if is_same:
        return None
    return (
        f"{adapter.text}: was trained on {shown(named)}, by its {CONFIG_NAME}, and is applied "
        f"to {base.text}; the tensors fit, so make sure that the models are the same"
    )
