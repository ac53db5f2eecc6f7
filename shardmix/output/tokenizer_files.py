"""The tokenizer's files of an output with further tokens. Pure, but for reading a file.

Added tokens are added anew by every loader, which numbers them by itself; that gives them the ids
that their rows have. Other tokens get an entry in the vocabulary and no merges: they have an id,
and no text is split into them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shardmix.conventions.vocabularies import (
    ADDED_NAME,
    CONFIG_NAME,
    TOKENIZER_JSON,
    AddedToken,
)
from shardmix.errors import SourceError, one_line, unreadable
from shardmix.plan.merge_plan import OutputVocabulary
from shardmix.sources.identity import has_changed
from shardmix.system.files import read_regular

_MAX_NBYTES = 150_000_000


def tokenizer_file(path: Path, digest: str) -> bytes:
    """Return a tokenizer's file. Raises `SourceChangedError` if its XXH3 is another."""
    try:
        content = read_regular(path, max_nbytes=_MAX_NBYTES)
    except OSError as error:
        raise unreadable(path, error) from None
    if xxhash.xxh3_128_hexdigest(content) != digest:
        raise has_changed(path)
    return content


def with_new_tokens(name: str, content: bytes, vocabulary: OutputVocabulary) -> bytes | None:
    """Return a file of a tokenizer with the vocabulary's new tokens; None if it stays as it is."""
    edit = _EDITS.get(name)
    if edit is None or not (vocabulary.added or vocabulary.entries):
        return None
    try:
        read = json.loads(content)
        edit(read, vocabulary)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"is not a tokenizer's ({one_line(error)})", subject=name, remedy="fetch it again"
        ) from None
    return json.dumps(read, ensure_ascii=False, indent=2).encode() + b"\n"


def _edit_tokenizer(content: dict[str, Any], vocabulary: OutputVocabulary) -> None:
    added = content.setdefault("added_tokens", [])
    if vocabulary.entries:
        entries = content["model"]["vocab"]
        # A loader numbers added tokens after the vocabulary, unless they are in it.
        entries.update({token["content"]: token["id"] for token in added})
        entries.update({text: number for number, text in vocabulary.entries})
        entries.update({token.content: token.id for token in vocabulary.added})
    added += [msgspec.to_builtins(token) for token in vocabulary.added]


def _edit_config(content: dict[str, Any], vocabulary: OutputVocabulary) -> None:
    decoder = content.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        decoder.update({str(token.id): _decoder_entry(token) for token in vocabulary.added})


def _decoder_entry(token: AddedToken) -> dict[str, Any]:
    entry: dict[str, Any] = msgspec.to_builtins(token)
    del entry["id"]
    return entry


def _edit_added(content: dict[str, Any], vocabulary: OutputVocabulary) -> None:
    content.update({token.content: token.id for token in vocabulary.added})


def _edit_entries(content: dict[str, Any], vocabulary: OutputVocabulary) -> None:
    content.update({text: number for number, text in vocabulary.entries})


_EDITS: dict[str, Callable[[dict[str, Any], OutputVocabulary], None]] = {
    TOKENIZER_JSON: _edit_tokenizer,
    CONFIG_NAME: _edit_config,
    ADDED_NAME: _edit_added,
    "vocab.json": _edit_entries,
}
