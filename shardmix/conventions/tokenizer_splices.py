"""New tokens in a tokenizer's files, as texts to put at offsets of the files. Pure.

The files are not written anew: one with 260,000 tokens takes ten times its size once it is decoded.
Added tokens are added by every loader, which numbers them by itself; that gives them the ids that
their rows have. Other tokens get an entry in the vocabulary and no merges: they have an id, and no
text is split into them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from shardmix.conventions.vocabularies import ADDED_NAME, CONFIG_NAME, TOKENIZER_JSON, AddedToken
from shardmix.errors import SourceError, one_line

_Object = dict[str, msgspec.Raw]
EDITED_NAMES = (TOKENIZER_JSON, CONFIG_NAME, ADDED_NAME, "vocab.json")
"""The files that name tokens and can be given further ones."""


@dataclass(frozen=True, slots=True)
class Splice:
    """A text to put into a file."""

    name: str
    """The file's name."""
    offset: int
    """Offset in the file, in bytes, before which it is put."""
    text: str
    """The text."""


def splices(
    name: str,
    content: bytes,
    added: Sequence[AddedToken],
    entries: Mapping[str, int],
) -> tuple[Splice, ...]:
    """Return the splices that give one of `EDITED_NAMES` further tokens, in order of offsets.

    `entries` are tokens and ids for the vocabulary; if there are some, all added tokens are among
    them: a loader numbers added tokens after the vocabulary, unless they are in it. Raises
    `SourceError`.
    """
    try:
        found = [splice for splice in _splices(name, content, added, entries) if splice.text]
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError) as error:
        raise SourceError(
            f"is not a tokenizer's ({one_line(error)})", subject=name, remedy="fetch it again"
        ) from None
    return tuple(sorted(found, key=lambda splice: splice.offset))


def _splices(
    name: str, content: bytes, added: Sequence[AddedToken], entries: Mapping[str, int]
) -> Iterator[Splice]:
    whole = msgspec.json.decode(content, type=_Object)
    if name == TOKENIZER_JSON:
        texts = [json.dumps(msgspec.to_builtins(token)) for token in added]
        yield _appended(name, content, whole["added_tokens"], texts)
        if entries:
            model = msgspec.json.decode(whole["model"], type=_Object)
            yield _appended(name, content, model["vocab"], _pairs(entries))
    elif name == CONFIG_NAME:
        decoder = whole.get("added_tokens_decoder")
        if decoder is not None:
            flags = {str(token.id): _flags(token) for token in added}
            yield _appended(name, content, decoder, _pairs(flags))
    elif name == ADDED_NAME:
        ids = {token.content: token.id for token in added}
        yield _appended(name, content, msgspec.Raw(content), _pairs(ids))
    else:
        own = {token.content for token in added}
        others = {text: number for text, number in entries.items() if text not in own}
        yield _appended(name, content, msgspec.Raw(content), _pairs(others))


def _flags(token: AddedToken) -> dict[str, object]:
    flags: dict[str, object] = msgspec.to_builtins(token)
    del flags["id"]
    return flags


def _pairs(entries: Mapping[str, object]) -> list[str]:
    return [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]


def _appended(name: str, content: bytes, inner: msgspec.Raw, texts: Sequence[str]) -> Splice:
    """Return the splice that puts items at the end of a list or object within a file's content."""
    items = bytes(inner).rstrip()
    if items[:1] + items[-1:] not in (b"[]", b"{}"):
        raise ValueError("it has no list of tokens where one is")
    before = items[:-1].rstrip()
    offset = _address(inner) - _address(content) + len(before)
    comma = "" if len(before) == 1 else ", "
    return Splice(name, offset, comma + ", ".join(texts) if texts else "")


def _address(content: bytes | msgspec.Raw) -> int:
    """Return the address of a part of the content: a raw part is no copy."""
    array = np.frombuffer(memoryview(content), np.uint8)
    address: int = array.__array_interface__["data"][0]
    return address
