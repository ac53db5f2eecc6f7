"""Defaults of transformers' config classes: the meaning of a key that a config leaves out.

A table made by `tests/generators/class_defaults.py`, loaded when it is first asked.
"""

import functools
from pathlib import Path
from typing import Any

import msgspec


class ClassDefaults(msgspec.Struct, frozen=True):
    """The config class of a model type."""

    fields: dict[str, Any]
    """Key → default; None also where the class works a value out from others."""
    aliases: dict[str, str] = {}
    """Other name of a key → its name."""
    parts: dict[str, str] = {}
    """Key of a nested config → the model type that it has unless it says so itself."""


@functools.cache
def class_defaults(model_type: str) -> ClassDefaults | None:
    """Return the class of a model type, or None if it is none of transformers'."""
    encoded = _table().get(model_type)
    return None if encoded is None else msgspec.json.decode(encoded, type=ClassDefaults)


@functools.cache
def _table() -> dict[str, msgspec.Raw]:
    content = Path(__file__).with_name("class_defaults.json").read_bytes()
    return msgspec.json.decode(content, type=dict[str, msgspec.Raw])
