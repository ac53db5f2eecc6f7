"""The modules of a sentence-transformers folder: their kinds, their folders, their order.

Read from `modules.json`, and from `router_config.json` for a module that chooses among routes.
Knows no weights.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from shardmix.conventions.sentence_modules import MODULES_NAME, TRANSFORMER_CONFIG_NAMES
from shardmix.errors import SourceError, shown
from shardmix.formats.strict_json import file_name_finding, read_json
from shardmix.system.files import refuse_link_outside

ROUTER_CONFIGS = ("router_config.json", "config.json")
"""Names of a Router's config file, by version of sentence-transformers."""
_CONFIG_NAMES = {
    "Transformer": TRANSFORMER_CONFIG_NAMES,
    "CLIPModel": (),
    "StaticEmbedding": (),
    "Router": ROUTER_CONFIGS,
    "LSTM": ("lstm_config.json",),
    "CNN": ("cnn_config.json",),
    "WordEmbeddings": ("wordembedding_config.json",),
}
_MOST_MODULES = 1_000
_MOST_NESTED = 8  # routes within routes; no known model has any
# Names that one class had in other versions of sentence-transformers.
_KINDS = {"MLMTransformer": "Transformer", "Asym": "Router"}


@dataclass(frozen=True, slots=True)
class Module:
    """One module: a step from text to vector."""

    subfolder: str
    """Its folder within the model's, with `/`; empty for the model's folder itself."""
    kind: str
    """Its class, without the package: Transformer, Pooling, Dense, ..."""
    key: str
    """Key of the same module in another model: route, kind, and number among those of the kind."""
    class_name: str = ""
    """Its class as modules.json names it, with the package."""


def read_modules(folder: Path) -> tuple[Module, ...]:
    """Return a model folder's modules in the order of their use, one route after another.

    Empty without a modules.json. Raises `SourceError` if that is damaged, or names a folder outside
    the model's.
    """
    path = folder / MODULES_NAME
    if not os.path.lexists(path):
        return ()
    refuse_link_outside(folder, path)
    # A list at the top, unlike every other file of a model.
    content = read_json(path, expected=list)
    listed = []
    for module in content:
        subfolder = module.get("path") if isinstance(module, dict) else None
        if not isinstance(subfolder, str):
            raise SourceError(
                "has a module without a path; it must name a folder",
                subject=path,
                remedy="fetch it again",
            )
        listed.append((_subfolder(path, "", subfolder), module.get("type")))
    walk = _Walk(folder)
    walk.add(listed, route="")
    return tuple(walk.modules.values())


def config_names(module: Module) -> tuple[str, ...]:
    """Return the possible names of a module's config in its folder, the likeliest first."""
    return _CONFIG_NAMES.get(module.kind, ("config.json",))


def module_subfolders(modules: Iterable[Module]) -> tuple[str, ...]:
    """Return the folders of modules below the model's own, each once."""
    return tuple(dict.fromkeys(module.subfolder for module in modules if module.subfolder))


def inner_path(subfolder: str, name: str) -> str:
    """Return the path within the model of a file in a module's folder ("": the model's own)."""
    return f"{subfolder}/{name}" if subfolder else name


class _Walk:
    """Walks through a model's modules, and once into the routes of each Router."""

    def __init__(self, folder: Path) -> None:
        self.modules: dict[tuple[str, str], Module] = {}
        """By folder and kind: a module that several routes share counts once."""
        self._folder = folder
        self._counts: Counter[str] = Counter()
        self._num_named = 0

    def add(self, listed: Iterable[tuple[str, Any]], *, route: str) -> None:
        """Add modules, given by folder and class, and after a Router those of its routes."""
        for subfolder, class_name in listed:
            self._num_named += 1
            if self._num_named > _MOST_MODULES or route.count("/") > _MOST_NESTED:
                raise SourceError(
                    f"names more than {_MOST_MODULES} modules, or routes within routes; no model "
                    "has so many",
                    subject=self._folder / MODULES_NAME,
                    remedy="fetch it again",
                )
            name = str(class_name).rpartition(".")[2] if class_name else ""
            kind = _KINDS.get(name, name)
            if (subfolder, kind) in self.modules:
                continue
            self._counts[route + kind] += 1
            key = f"{route}{kind} {self._counts[route + kind]}"
            self.modules[subfolder, kind] = Module(subfolder, kind, key, str(class_name or ""))
            if kind == "Router":
                path, structure, types = _routes(self._folder, subfolder)
                for own, members in structure.items():
                    inner = [
                        (_subfolder(path, subfolder, member), types.get(member))
                        for member in members
                    ]
                    self.add(inner, route=f"{route}{own}/")


def _routes(folder: Path, subfolder: str) -> tuple[Path, dict[str, list[str]], dict[str, Any]]:
    """Return a Router's config file, route → modules by folder, and folder → class."""
    for name in ROUTER_CONFIGS:
        path = folder / subfolder / name
        if not os.path.lexists(path):
            continue
        refuse_link_outside(folder, path)
        content = read_json(path)
        structure, types = content.get("structure"), content.get("types")
        if not (isinstance(structure, dict) and isinstance(types, dict)):
            continue
        for members in structure.values():
            if not isinstance(members, list) or not all(isinstance(name, str) for name in members):
                raise SourceError(
                    "has a route that is not a list of modules",
                    subject=path,
                    remedy="fetch it again",
                )
        return path, structure, types
    raise SourceError(
        "a Router needs it, since it names the modules of each route, and it is missing or names "
        "none",
        subject=folder / subfolder / ROUTER_CONFIGS[0],
        remedy="fetch the model again",
    )


def _subfolder(path: Path, parent: str, name: str) -> str:
    """Return a module's folder within the model's; raise `SourceError` if it lies outside."""
    relative = PurePosixPath(parent, name)
    finding = file_name_finding(name) if PurePosixPath(name).parts else None
    if finding is not None:
        raise SourceError(
            f"names the folder {shown(name)}, which {finding}",
            subject=path,
            remedy="fetch it again",
        )
    return "" if not relative.parts else relative.as_posix()
