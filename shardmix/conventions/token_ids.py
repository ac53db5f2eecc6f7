"""Ids of tokens in config.json and generation_config.json, and their change to other ids. Pure."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GENERATION_NAME = "generation_config.json"
"""The file of settings for generating texts, which names ids of tokens."""
_ID_KEY = re.compile(r"(?:^|_)tokens?_(?:ids?|index|idx)$")
_ID_KEYS = frozenset(
    (
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids"),
        *("forced_decoder_ids", "lang_to_id", "task_to_id"),
    )
)
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|codec|talker|code2wav|depth|qformer")
"""Parts of a config with vocabularies of their own."""


@dataclass(frozen=True, slots=True)
class LostId:
    """An id whose token is not in the other vocabulary."""

    key: str
    """Dotted key."""
    id: int
    """The id."""


def with_ids(
    content: Mapping[str, Any], new_id: Callable[[int], int | None]
) -> tuple[dict[str, Any], list[LostId]]:
    """Return a config with other ids of tokens, and those that `new_id` has no other for.

    A lost id becomes null, and in a list it is left out. Negative numbers stand for no token.
    """
    changed = copy.deepcopy(dict(content))
    lost: list[LostId] = []
    for path, part in _parts(changed, ""):
        for key, value in part.items():
            if _ID_KEY.search(key) or key in _ID_KEYS:
                part[key] = _mapped(value, key, new_id, f"{path}{key}", lost)
    return changed, lost


def _parts(part: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a config and its nested ones, with the text that their dotted keys begin with."""
    yield path, part
    for key, value in part.items():
        if isinstance(value, dict) and key not in _ID_KEYS and not _OTHER_SENSES.search(key):
            yield from _parts(value, f"{path}{key}.")


def _mapped(
    value: Any, key: str, new_id: Callable[[int], int | None], path: str, lost: list[LostId]
) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value < 0:
            return value
        found = new_id(value)
        if found is None:
            lost.append(LostId(path, value))
        return found
    if isinstance(value, dict):
        return {name: _mapped(each, key, new_id, path, lost) for name, each in value.items()}
    if isinstance(value, list):
        if key == "forced_decoder_ids":
            return [_forced(pair, key, new_id, path, lost) for pair in value]
        found_all = [_mapped(each, key, new_id, path, lost) for each in value]
        return [
            new for new, old in zip(found_all, value, strict=True) if new is not None or old is None
        ]
    return value


def _forced(
    pair: Any, key: str, new_id: Callable[[int], int | None], path: str, lost: list[LostId]
) -> Any:
    """Return a pair of a position and an id, with another id."""
    if not (isinstance(pair, list) and len(pair) == 2):
        return pair
    return [pair[0], _mapped(pair[1], key, new_id, path, lost)]


def with_sizes(
    config: Mapping[str, Any], keys: Sequence[str], old: int | None, new: int
) -> dict[str, Any]:
    """Return a config with another number of tokens at these dotted keys.

    Other spellings of the number are changed if they have the old one, which may be unknown.
    """
    changed = copy.deepcopy(dict(config))
    for key in keys:
        path, _, last = key.rpartition(".")
        part = changed
        for name in filter(None, path.split(".")):
            inner = part.get(name)
            if not isinstance(inner, dict):
                inner = part[name] = {}
            part = inner
        part[last] = new
    for _, part in _parts(changed, ""):
        for name in ("vocab_size", "decoder_vocab_size", "padded_vocab_size", "n_vocab", "n_words"):
            if old is not None and part.get(name) == old and not isinstance(part[name], bool):
                part[name] = new
    return changed
