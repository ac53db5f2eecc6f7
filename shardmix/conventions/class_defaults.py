"""Defaults of transformers' config classes: the meaning of a key that a config leaves out.

The table is made by `tests/generators/class_defaults.py`, and loaded when it is first used.
"""

import functools
from pathlib import Path
from typing import Any

import msgspec


class ClassDefaults(msgspec.Struct, frozen=True):
    """The config class of a model type."""

    fields: dict[str, Any]
    """Key → default; None also if the class computes the value from others."""
    aliases: dict[str, str] = {}
    """Other name of a key → its name."""
    parts: dict[str, str] = {}
    """Key of a nested config → the model type of that part if it names none."""


@functools.cache
def class_defaults(model_type: str) -> ClassDefaults | None:
    """Return the config class of a model type, or None if transformers has none."""
    encoded = _table().get(model_type)
    return None if encoded is None else msgspec.json.decode(encoded, type=ClassDefaults)


@functools.cache
def _table() -> dict[str, msgspec.Raw]:
    content = Path(__file__).with_name("class_defaults.json").read_bytes()
    return msgspec.json.decode(content, type=dict[str, msgspec.Raw])
