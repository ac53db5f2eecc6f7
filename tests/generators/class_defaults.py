"""Write `shardmix/conventions/class_defaults.json`: what a config means that leaves a key out.

Asks every config class of the transformers that is installed; run it again after an update:

    python -m tests.generators.class_defaults
"""

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from shardmix.conventions.config_keys import Meaning, meaning

TARGET = Path(__file__).parents[2] / "shardmix" / "conventions" / "class_defaults.json"
_LONGEST_LIST = 8
# Sorted, since some classes make their defaults from sets.
_COMPACT = {"allow_nan": False, "sort_keys": True, "separators": (",", ":")}


def class_defaults(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return model type → its fields' defaults, their other names, and its parts' model types."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    return {name: _described(CONFIG_MAPPING[name]) for name in names}


def _described(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    described: dict[str, Any] = {"fields": _fields(config_class)}
    aliases = {alias: name for alias, name in config_class.attribute_map.items() if alias != name}
    if aliases:
        described["aliases"] = aliases
    parts = {key: spec.model_type for key, spec in config_class.sub_configs_defaults.items()}
    if parts:
        described["parts"] = parts
    return described


def _fields(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    found = {}
    for field in dataclasses.fields(config_class):
        is_part = field.name in config_class.sub_configs_defaults
        if field.name in shared or is_part or meaning(field.name) is Meaning.NOTHING:
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if _is_plain(default):
            found[field.name] = list(default) if isinstance(default, tuple) else default
    if "rope_parameters" in found or hasattr(config_class, "rope_parameters"):
        try:
            found["rope_parameters"] = config_class().rope_parameters  # made of several fields
        except Exception:  # a class whose own defaults it refuses
            found["rope_parameters"] = None
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_LIST and all(map(_is_plain, value))
    if isinstance(value, float) and not math.isfinite(value):
        return False  # JSON has none
    return value is None or isinstance(value, bool | int | float | str)


def written(defaults: dict[str, dict[str, Any]]) -> str:
    """Return the file's text: a line for each model type, so that changes can be read."""
    lines = [
        f"{json.dumps(name)}: {json.dumps(described, **_COMPACT)}"
        for name, described in defaults.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TARGET.write_text(written(class_defaults(sorted(CONFIG_MAPPING.keys()))))
    sys.stdout.write(f"{TARGET}: of transformers {transformers.__version__}\n")
