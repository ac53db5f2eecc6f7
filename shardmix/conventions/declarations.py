"""Declarations of transformers' model classes: shared parameters, and other names for them.

transformers leaves tied parameters out of a checkpoint. Their number, their names and the key of
the config that decides depend on the class. So a table has the declarations of all 2,000 classes:
pairs of parameters, the configs that tie them, and the names of a checkpoint that mean each
parameter. `tests/generators/transformers_declarations.py` writes it from transformers itself, a
test compares it with the installed version, and no merge has to import transformers.

For a class that is not in the table, a separate process asks the installed transformers. Without
one, models of such a class merge if they store the same names.
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
    """Dotted name of the inner model that has them, or ""."""
    of: str
    """Dotted key of the part of config.json that decides, or "" for the top."""
    pairs: tuple[tuple[str, str], ...]
    """Parameter → the one that it shares, in transformers' order.

    A first name that begins with ~ is a regex for the start of a name; the rest is the same in both
    names.
    """
    tied: str
    """Nine letters T or F, for force or not: for the top's key absent, true, false, and in each of
    these for the nested part's key absent, true, false."""
    nested: str = ""
    """Dotted key of that nested part."""
    key: str = ""
    """A key at the top that overrides `tie_word_embeddings`."""
    when: tuple[tuple[str, bool, bool], ...] = ()
    """(Key at the top, the value it must have, True if its absence means that value)."""

    def is_declared(self, config: Mapping[str, Any]) -> bool:
        """Return True if the class of a config.json declares this tie."""
        return all(
            config[key] == value if isinstance(config.get(key), bool) else is_default
            for key, value, is_default in self.when
        )

    def is_in_force(self, config: Mapping[str, Any]) -> bool:
        """Return True if a model of this config.json shares the parameters."""
        own = config.get(self.key) if self.key else None
        if isinstance(own, bool):
            return own
        state = 3 * _state(config) + _state(config_part(config, self.nested))
        return self.tied[state] == "T"


class Renaming(msgspec.Struct, frozen=True, rename={"pattern": "re", "sources": "from"}):
    """A rule that turns names of a checkpoint into names of the class."""

    pattern: str
    """A regex with a group g0, g1, ... for each alternative."""
    to: tuple[str, ...]
    """Replacements of the match."""
    scope: str | None = None
    """Dotted name of the rule's inner model: names are matched without this prefix."""
    base: str = ""
    """A prefix that may precede the scope."""
    guarded: bool = False
    """The rule holds only if a name matches the first alternative; each has its own replacement."""
    ops: tuple[tuple[str | int | bool, ...], ...] = ()
    """Operations on values; none for a mere renaming."""
    sources: tuple[str, ...] = ()
    """The patterns, as declared, of the tensors that are put together."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of its operations."""
        return tuple(str(op[0]) for op in self.ops)


class ModelClass(msgspec.Struct, frozen=True, rename={"model_type": "type"}):
    """A model class of transformers."""

    model_type: str
    """The `model_type` of its config."""
    prefix: str = ""
    """Prefix of the base model's names in it."""
    ties: tuple[int, ...] = ()
    """Indexes of its ties in the table's parts."""
    renames: tuple[int, ...] = ()
    """Indexes of its renamings."""
    own: tuple[str, ...] = ()
    """See `Declaration.own`."""
    asked: bool = False
    """Its ties depend on more of a config than the table can say: transformers must be asked."""
    scale: str = ""
    """For a class whose head's input is scaled by a key that may be the tie's: nine letters T or F,
    for that key absent, true, false, and in each of these for the scale's own key."""


class _Table(msgspec.Struct, frozen=True):
    transformers: str
    legacy: tuple[Renaming, ...]
    parts: tuple[msgspec.Raw, ...]
    classes: dict[str, ModelClass]


@dataclass(frozen=True, slots=True)
class Declaration:
    """All declarations of the class that a config.json names."""

    ties: tuple[Tie, ...]
    """Ties of the class and of its inner models."""
    renames: tuple[Renaming, ...]
    """Renamings of a checkpoint's names, in order."""
    prefix: str
    """Prefix of the base model's names; "" if nothing is known."""
    scale: str
    """See `ModelClass.scale`."""
    is_known: bool
    """True if transformers declares the class."""
    own: frozenset[str] = frozenset()
    """Names of its own parameters, with # for numbers, that a file's renamings would change. They
    stay as they are."""
    is_conventional: bool = False
    """True if there is nobody to ask: it brings its own code, or the config names no class. Then
    usual names decide what is shared."""


def declaration_of(config: Mapping[str, Any], folder: Path | None = None) -> Declaration:
    """Return the declarations of the class of a config.json.

    For a named class that the table lacks, the installed transformers is asked about the model in
    `folder`, if there is one.
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
        own=frozenset(found.own),
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
    """Return True if the head's input is scaled, for a class with this `scale`."""
    return scale[3 * _state(config) + _state(config, SCALE_KEY)] == "T"


def _state(config: Mapping[str, Any], key: str = TIE_KEY) -> int:
    """Return 0 for a config without the key, 1 for true, 2 for false."""
    value = config.get(key)
    return 0 if not isinstance(value, bool) else 1 if value else 2


def _of_model_type(table: _Table, config: Mapping[str, Any]) -> Declaration:
    """Return the declarations of all classes of a config's model type, if it names no class."""
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
    """Yield the possible ties of inner models whose kinds a nested config names."""
    for key, part in config.items():
        if not isinstance(part, Mapping) or not isinstance(part.get("model_type"), str):
            continue
        for found in table.classes.values():
            if found.model_type != part["model_type"] or found.model_type == outer.model_type:
                continue
            for tie in _parts(table, found.ties, Tie):
                if not tie.at and not tie.of:
                    # The nested config is the top of the inner model, so its letter is in the
                    # middle.
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
    """Ask the installed transformers of a class; return None if it has no answer."""
    import subprocess  # slow to import, and rarely needed

    command = [sys.executable, "-m", "shardmix.conventions.ask_transformers", name, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_ASK_SECONDS, check=True)
        pairs = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    # Asked of this very config, and of the opposite one.
    ties = tuple(Tie("", "", tuple(map(tuple, entry["pairs"])), entry["tied"]) for entry in pairs)
    return Declaration(ties, _table().legacy, "", "", is_known=True)
