"""The parameters that have a row for each token, and the keys of a config that count the rows.

For classes of transformers a table says it, which `tests/generators/vocabulary_tensors.py` makes by
building each class with vocabularies of two sizes. For other classes names decide.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shardmix.conventions.class_defaults import class_defaults
from shardmix.conventions.declarations import class_name, config_part
from shardmix.conventions.naming import has_vocabulary_axis

_TABLE_NAME = "vocabulary_tensors.json"
_OTHER = "!"
"""Before the name of a tensor that grows with the vocabulary in another way."""
_COUNTS = ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input")
"""Last parts of the keys that count a tokenizer's tokens."""
_NO_TOKENS = re.compile(
    r"vision|visual|image|audio|speech|codec|codebook|depth|semantic|coarse|fine|qformer|protein|"
    r"dit_config|hifi_gan|t2u|patcher|speakers|(^|\.)(\w*type|\w*entity|char|mel)_vocab_size$"
)
"""Keys that count other things: kinds of segments, entities, sounds, pictures."""
_BIAS = re.compile(
    r"(?:^|\.)(?:final_logits_bias|lm_head\.bias|embed_out\.bias|"
    r"predictions\.(?:decoder\.)?bias|lm_head\.decoder\.bias|output_bias)$"
)


class _Table(msgspec.Struct, frozen=True):
    transformers: str
    kinds: tuple[dict[str, tuple[str, ...]], ...]
    classes: dict[str, int]


@dataclass(frozen=True, slots=True)
class VocabularyTensors:
    """The parameters with a row for each token, in a model's class or by its names."""

    names: frozenset[str]
    """Their names, in the class's form."""
    others: frozenset[str]
    """Parameters that grow with the vocabulary in a way that no map of rows can follow."""
    unrelated: frozenset[str]
    """Parameters with rows for other things: segments, entities, sounds."""
    keys: tuple[str, ...]
    """Dotted keys of the config that count them."""
    is_known: bool
    """True if the table has the class; otherwise usual names decided."""


def vocabulary_tensors(config: Mapping[str, Any], names: Sequence[str]) -> VocabularyTensors:
    """Return the parameters of a model that have a row for each token.

    `names` are those of its tensors, as its class reads them.
    """
    table = _table()
    number = table.classes.get(class_name(config) or "")
    if number is None:
        found = frozenset(name for name in names if has_vocabulary_axis(name) or _BIAS.search(name))
        none: frozenset[str] = frozenset()
        return VocabularyTensors(found, none, none, tuple(_stated_keys(config)), is_known=False)
    names_of: dict[str, set[str]] = {"plain": set(), "others": set(), "unrelated": set()}
    keys = []
    for key, its in table.kinds[number].items():
        if _NO_TOKENS.search(key):
            names_of["unrelated"].update(name.removeprefix(_OTHER) for name in its)
            continue
        is_count = key.rpartition(".")[2] in _COUNTS
        keys += [key] if is_count else []
        for name in its:
            is_plain = is_count and not name.startswith(_OTHER)
            names_of["plain" if is_plain else "others"].add(name.removeprefix(_OTHER))
    return VocabularyTensors(
        frozenset(names_of["plain"]),
        frozenset(names_of["others"]),
        frozenset(names_of["unrelated"]),
        tuple(keys),
        is_known=True,
    )


def _stated_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that count tokens in a config of an unknown class."""
    if isinstance(config.get("vocab_size"), int) or not any(
        isinstance(part, Mapping) and "vocab_size" in part for part in config.values()
    ):
        yield "vocab_size"
    for key, part in config.items():
        has_size = isinstance(part, Mapping) and isinstance(part.get("vocab_size"), int)
        if has_size and not _NO_TOKENS.search(f"{key}.vocab_size"):
            yield f"{key}.vocab_size"


def stated_size(config: Mapping[str, Any], key: str) -> int | None:
    """Return the number at a dotted key, or what its class takes without one; None if unknown."""
    path, _, last = key.rpartition(".")
    part = config_part(config, path) if path else config
    value = part.get(last)
    if value is None:
        own = class_defaults(str(part.get("model_type")))
        value = None if own is None else own.fields.get(last)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


@functools.cache
def _table() -> _Table:
    content = Path(__file__).with_name(_TABLE_NAME).read_bytes()
    return msgspec.json.decode(content, type=_Table)
