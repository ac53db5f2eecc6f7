"""Declarations of transformers' model classes: shared parameters, and other names for them.

Reads a table that `tests/generators/transformers_declarations.py` writes from transformers itself,
so that no merge has to import it. A class that is not in the table is asked of an installed
transformers, by a process of its own.
"""

import functools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shardmix.conventions.naming import SCALE_KEY, TIE_KEY

_TABLE_NAME = "transformers_declarations.json"
_ASK_SECONDS = 60


class Tie(msgspec.Struct, frozen=True):
    """Parameters of a model, or of a model in it, that share one tensor by a key of a config."""

    at: str
    """The model in the model that has them: "" or a dotted name."""
    of: str
    """The part of config.json that decides: "" for the top, or a dotted key."""
    pairs: tuple[tuple[str, str], ...]
    """Parameter → the one that it shares, in the order in which transformers goes through them.

    A first name that begins with ~ is a regex of how a name begins; what follows is the same in
    both names.
    """
    tied: str
    """Nine letters T or F: is it in force, for the top saying nothing, true, false, in each for the
    nested part saying nothing, true, false."""
    nested: str = ""
    """That nested part."""
    key: str = ""
    """A key at the top that goes before `tie_word_embeddings`."""
    when: tuple[tuple[str, bool, bool], ...] = ()
    """Keys at the top, the value that each must have, and whether silence means that value."""

    def is_declared(self, config: Mapping[str, Any]) -> bool:
        """Tell whether the class of a config.json declares it at all."""
        return all(
            config[key] == value if isinstance(config.get(key), bool) else is_default
            for key, value, is_default in self.when
        )

    def is_in_force(self, config: Mapping[str, Any]) -> bool:
        """Tell whether a model of this config.json shares the parameters."""
        own = config.get(self.key) if self.key else None
        if isinstance(own, bool):
            return own
        place = 3 * _state(config) + _state(config_part(config, self.nested))
        return self.tied[place] == "T"


class Renaming(msgspec.Struct, frozen=True, rename={"pattern": "re", "sources": "from"}):
    """A rule by which names of a checkpoint become names of the class."""

    pattern: str
    """A regex with a group g0, g1, ... for each alternative."""
    to: tuple[str, ...]
    """What the match is replaced by."""
    scope: str | None = None
    """The model in the model that it is for: its names are matched without this prefix."""
    base: str = ""
    """A prefix that may stand before the scope or not."""
    guarded: bool = False
    """It holds only if a name matches the first alternative; each has its own replacement."""
    ops: tuple[tuple[str | int | bool, ...], ...] = ()
    """What is done to values; a mere renaming does nothing to them."""
    sources: tuple[str, ...] = ()
    """The patterns, as declared, of what is put together."""


class ModelClass(msgspec.Struct, frozen=True, rename={"model_type": "type"}):
    """A model class of transformers."""

    model_type: str
    """Of its config."""
    prefix: str = ""
    """What stands before the names of the base model in it."""
    ties: tuple[int, ...] = ()
    """Which entries of the table's parts are its ties."""
    renames: tuple[int, ...] = ()
    """Which entries are its renamings."""
    asked: bool = False
    """Its ties depend on more of a config than the table can say: transformers is asked."""
    scale: str = ""
    """For a class whose head's input is scaled by a key that may be the tie's: nine letters T or F,
    for that one saying nothing, true, false, in each for the scale's own key."""


class _Table(msgspec.Struct, frozen=True):
    transformers: str
    legacy: tuple[Renaming, ...]
    parts: tuple[msgspec.Raw, ...]
    classes: dict[str, ModelClass]


@dataclass(frozen=True, slots=True)
class Declaration:
    """All that is declared of the class that a config.json names."""

    ties: tuple[Tie, ...]
    """Of the class and of the models in it."""
    renames: tuple[Renaming, ...]
    """Of a checkpoint's names, in order."""
    prefix: str
    """What stands before the names of the base model; "" if nothing is known."""
    scale: str
    """See `ModelClass.scale`."""
    is_known: bool
    """Whether transformers declares the class at all."""
    is_conventional: bool = False
    """Nobody can be asked of it: it brings its own code, or the config names no class. Then the
    usual names tell what is shared."""


def declaration_of(config: Mapping[str, Any], folder: Path | None = None) -> Declaration:
    """Return what is declared of the class of a config.json.

    If the table does not know the class it is named by, transformers is asked, if it is installed,
    of the model in `folder`.
    """
    table = _table()
    name = class_name(config)
    found = table.classes.get(name or "")
    if name is None:
        return _of_model_type(table, config)
    if found is None or found.asked:
        asked = None if folder is None else _asked(name, folder)
        if asked is not None:
            return asked
        has_code = isinstance(config.get("auto_map"), Mapping)
        return Declaration((), table.legacy, "", "", is_known=False, is_conventional=has_code)
    return Declaration(
        ties=(
            *(tie for tie in _parts(table, found.ties, Tie) if tie.is_declared(config)),
            *_nested_ties(table, config, found),
        ),
        renames=(*_parts(table, found.renames, Renaming), *table.legacy),
        prefix=found.prefix,
        scale=found.scale,
        is_known=True,
    )


def class_name(config: Mapping[str, Any]) -> str | None:
    """Return the model class that a config.json names, or None."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    return None


def config_part(config: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return a nested part of a config by its dotted key; empty if there is none."""
    part: object = config if path else {}
    for key in filter(None, path.split(".")):
        part = part.get(key) if isinstance(part, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def scales_output(scale: str, config: Mapping[str, Any]) -> bool:
    """Tell, for a class whose `scale` that is, whether its head's input is scaled."""
    return scale[3 * _state(config) + _state(config, SCALE_KEY)] == "T"


def _state(config: Mapping[str, Any], key: str = TIE_KEY) -> int:
    """Return 0 for a config that says nothing, 1 for true, 2 for false."""
    value = config.get(key)
    return 0 if not isinstance(value, bool) else 1 if value else 2


def _of_model_type(table: _Table, config: Mapping[str, Any]) -> Declaration:
    """Return what all classes of a config's model type declare: it names no class."""
    model_type = config.get("model_type")
    ties: dict[Tie, None] = {}
    renames: tuple[Renaming, ...] = ()
    prefix = ""
    for found in table.classes.values():
        if found.model_type == model_type and model_type:
            own = (tie for tie in _parts(table, found.ties, Tie) if tie.is_declared(config))
            ties |= dict.fromkeys(own)
            renames = renames or _parts(table, found.renames, Renaming)
            prefix = prefix or found.prefix
    renames = (*renames, *table.legacy)
    is_known = bool(ties)
    return Declaration(tuple(ties), renames, prefix, "", is_known, is_conventional=not is_known)


def _nested_ties(table: _Table, config: Mapping[str, Any], outer: ModelClass) -> Iterator[Tie]:
    """Yield what may be declared of the models in a model whose kinds a nested config tells."""
    for key, part in config.items():
        if not isinstance(part, Mapping) or not isinstance(part.get("model_type"), str):
            continue
        for found in table.classes.values():
            if found.model_type != part["model_type"] or found.model_type == outer.model_type:
                continue
            for tie in _parts(table, found.ties, Tie):
                if not tie.at and not tie.of:
                    # The nested config is the top of what is nested: what it says is in the middle.
                    letters = "".join(tie.tied[3 * state] for state in range(3)) * 3
                    yield Tie("*", key, tie.pairs, letters, nested=key)


def _parts(table: _Table, numbers: tuple[int, ...], kind: type) -> tuple[Any, ...]:
    return tuple(msgspec.json.decode(table.parts[number], type=kind) for number in numbers)


@functools.cache
def _table() -> _Table:
    content = Path(__file__).with_name(_TABLE_NAME).read_bytes()
    return msgspec.json.decode(content, type=_Table)


@functools.cache
def _asked(name: str, folder: Path) -> Declaration | None:
    """Ask an installed transformers of a class; None if it is not installed or does not know it."""
    import subprocess  # few merges need it

    command = [sys.executable, "-m", "shardmix.conventions.ask_transformers", name, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ASK_SECONDS, check=True)
        pairs = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    # Asked of this very config, and of one that says the contrary.
    ties = tuple(Tie("", "", tuple(map(tuple, entry["pairs"])), entry["tied"]) for entry in pairs)
    return Declaration(ties, _table().legacy, "", "", is_known=True)
