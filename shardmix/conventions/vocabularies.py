"""Tokens by id, read from the files of a tokenizer without running one.

Knows tokenizer.json, vocab.txt, vocab.json, SentencePiece's models, tiktoken's ranks and
tekken.json. Holds two columns, not the tokens: a vocabulary may have 260,000.
"""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shardmix.errors import SourceError, one_line, unreadable
from shardmix.system.files import (
    LFS_FINDING,
    LFS_REMEDY,
    is_lfs_pointer,
    read_regular,
    refuse_link_outside,
)
from shardmix.system.memory import check_room

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_NAMES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
)
TIKTOKEN_SUFFIX = ".tiktoken"
VOCABULARY_NAMES = (
    TOKENIZER_JSON,
    "vocab.txt",
    "vocab.json",
    *SENTENCEPIECE_NAMES,
    "tekken.json",
)
"""Files that hold a vocabulary; the first one present is read."""
CONFIG_NAME = "tokenizer_config.json"
ADDED_NAME = "added_tokens.json"
SPECIAL_NAME = "special_tokens_map.json"
SIDE_NAMES = (CONFIG_NAME, ADDED_NAME, SPECIAL_NAME)
"""Small files beside a vocabulary: settings, added tokens."""
CUTTING_NAMES = ("merges.txt", "vocab.bpe", "bpe.codes", "source.spm", "target.spm")
"""Files that define how text is split, beside a vocabulary that does not."""
TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json")
"""Files that hold a chat template."""

_OTHER_TOKENIZER_FILES = re.compile(
    r"chat_template.*|additional_chat_templates/.*|vocab\..*|.*\.(?:tiktoken|spm|bpe)|"
    r"tokenizer\.model\.v\w+|tokenization_\w+\.py"
)


def is_tokenizer_file(name: str) -> bool:
    """Return True if a file, by its path within the model's folder, is part of its tokenizer."""
    known = (*VOCABULARY_NAMES, *SIDE_NAMES, *CUTTING_NAMES, *TEMPLATE_NAMES)
    return name in known or _OTHER_TOKENIZER_FILES.fullmatch(name) is not None


_MAX_NBYTES = 150_000_000
# Memory for each byte: the file, its tokens as a dict, their hashes; 3 measured.
_MEMORY_PER_BYTE = 4
# More or longer than in any real tokenizer; a stranger's file may try.
_MOST_TOKENS = 4_000_000
_LONGEST_TOKEN_NBYTES = 1_000_000
_MAX_STEP_NBYTES = 4_000_000
_END_OF_IDS = 1 << 31


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, in columns; row i is one id."""

    ids: npt.NDArray[np.int64]
    """Ids in order, each once."""
    hashes: npt.NDArray[np.int64]
    """Hashes of the tokens; valid only within this process."""

    def with_added(self, added: Mapping[int, str]) -> "Vocabulary":
        """Return the vocabulary with more tokens, which replace those of the same ids."""
        if not added:
            return self
        kept = ~np.isin(self.ids, np.fromiter(added, dtype=np.int64, count=len(added)))
        other = vocabulary((token.encode(), number) for number, token in added.items())
        ids = np.concatenate([self.ids[kept], other.ids])
        order = np.argsort(ids, kind="stable")
        return Vocabulary(ids[order], np.concatenate([self.hashes[kept], other.hashes])[order])


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """All parts of a tokenizer.json that decide the ids of a text."""

    vocabulary: Vocabulary
    """The model's own, without added tokens."""
    num_entries: int
    """Number of its entries: more than it has ids if two share one, or if one is no number."""
    added: dict[int, str]
    """Id → added token."""
    added_tokens: tuple["AddedToken", ...]
    """The added tokens, in the file's order."""
    merges: str
    """Digest of the merges, or of a unigram model's scores."""
    kind: str
    """Type of the model: BPE, WordPiece, Unigram or WordLevel."""
    needs_merges: bool
    """True if tokens of several characters occur in texts only by merges."""
    steps: dict[str, str]
    """Step (`normalizer`, ...) → its settings in canonical form."""


class _Model(msgspec.Struct):
    type: str | None = None
    vocab: msgspec.Raw = msgspec.Raw(b"null")
    merges: msgspec.Raw = msgspec.Raw(b"null")
    ignore_merges: bool | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool | None = None


class AddedToken(msgspec.Struct, frozen=True):
    """A token that is found in a text before the text is split."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[AddedToken] | None = None
    normalizer: msgspec.Raw = msgspec.Raw(b"null")
    pre_tokenizer: msgspec.Raw = msgspec.Raw(b"null")
    post_processor: msgspec.Raw = msgspec.Raw(b"null")


class _Rank(msgspec.Struct):
    rank: int
    token_bytes: str


class _TekkenConfig(msgspec.Struct):
    default_num_special_tokens: int = 0


class _TekkenSpecial(msgspec.Struct):
    rank: int
    token_str: str


class _TekkenFile(msgspec.Struct):
    vocab: list[_Rank]
    config: _TekkenConfig = msgspec.field(default_factory=_TekkenConfig)
    special_tokens: list[_TekkenSpecial] | None = None


def vocabulary(pairs: Iterable[tuple[bytes, int]]) -> Vocabulary:
    """Return a vocabulary from UTF-8 tokens and ids; of two tokens of one id the last counts."""
    hashes, ids = array("q"), array("q")
    for token, number in pairs:
        if len(ids) == _MOST_TOKENS or len(token) > _LONGEST_TOKEN_NBYTES:
            raise ValueError(
                f"more than {_MOST_TOKENS} tokens, or one longer than {_LONGEST_TOKEN_NBYTES} bytes"
            )
        hashes.append(hash(token))
        ids.append(number)
    return _in_order(np.array(ids, dtype=np.int64), np.array(hashes, dtype=np.int64))


def read_vocabulary(folder: Path, name: str, *, max_memory: int | None) -> Vocabulary:
    """Return the vocabulary in one of a model's files.

    Raises `SourceError` if the file cannot be read or is not of its kind, `BudgetError` if it might
    take the process beyond `max_memory` (bytes).
    """
    with _named(folder / name):
        return vocabulary(_pairs(folder, name, max_memory))


def read_tokens(
    folder: Path, name: str, ids: Iterable[int], *, max_memory: int | None
) -> dict[int, str]:
    """Return id → token of some ids, read once more. Raises as `read_vocabulary` does."""
    wanted = set(ids)
    with _named(folder / name):
        pairs = _pairs(folder, name, max_memory)
        return {
            number: token.decode(errors="replace") for token, number in pairs if number in wanted
        }


def read_tokenizer_json(folder: Path, *, max_memory: int | None) -> TokenizerJson:
    """Read a tokenizer.json. Raises as `read_vocabulary` does."""
    with _named(folder / TOKENIZER_JSON):
        file = _tokenizer_file(folder, max_memory)
        model = file.model
        steps = {
            name: _canonical(getattr(file, name))
            for name in ("normalizer", "pre_tokenizer", "post_processor")
        }
        steps["model"] = repr((model.type, bool(model.ignore_merges), bool(model.byte_fallback)))
        vocab, merges = _compact(model.vocab), _compact(model.merges)
        # A unigram model has scores instead of merges.
        decisive = vocab if vocab[:1] == b"[" else merges
        return TokenizerJson(
            vocabulary=vocabulary(_json_pairs(vocab)),
            num_entries=vocab.count(b'"') // 2,
            added_tokens=tuple(file.added_tokens or ()),
            added={token.id: token.content for token in file.added_tokens or () if is_id(token.id)},
            kind=model.type or "BPE",
            needs_merges=not (
                model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix
            ),
            merges=xxhash.xxh3_128_hexdigest(decisive),
            steps=steps,
        )


def merges_digest(folder: Path, *, max_memory: int | None) -> str:
    """Return a digest of the meaning of a tokenizer.json's merges, or of a unigram model's scores.

    Older versions write `"a b"`, newer ones `["a","b"]`, and some programs escape characters.
    Raises as `read_vocabulary` does.
    """
    hasher = xxhash.xxh3_128()
    with _named(folder / TOKENIZER_JSON):
        model = _tokenizer_file(folder, max_memory).model
        vocab, merges = _compact(model.vocab), _compact(model.merges)
        if vocab[:1] == b"[":
            for match in _WITH_SCORE.finditer(vocab):
                hasher.update(b"%b %a\n" % (_unescaped(match[1]), float(match[2])))
        elif merges[:2] == b"[[":
            for match in _NEW_MERGE.finditer(merges):
                hasher.update(b"%b %b\n" % (_unescaped(match[1]), _unescaped(match[2])))
        else:
            for match in _TEXT.finditer(merges):
                hasher.update(b"%b\n" % _unescaped(match[1]))
    return hasher.hexdigest()


def is_id(number: object) -> bool:
    """Return True if a stranger's number can be a token's id."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < _END_OF_IDS


def same_lines(one: Path, other: Path) -> bool:
    """Return True if two lists, such as merges.txt, hold the same lines after the first comment.

    Raises `SourceError` if one cannot be read.
    """
    lines = []
    for path in (one, other):
        with _named(path):
            content = read_regular(path, max_nbytes=_MAX_NBYTES).replace(b"\r\n", b"\n").rstrip()
        if content.startswith(b"#version"):
            content = content.partition(b"\n")[2]
        lines.append(xxhash.xxh3_128_digest(content))
    return lines[0] == lines[1]


# Patterns of JSON as `_compact` writes it: a quote always ends a text.
_TEXT = re.compile(rb'"([^"]*)"')
_NEW_MERGE = re.compile(rb'\["([^"]*)","([^"]*)"\]')
_NUMBERED = re.compile(rb'"([^"]*)":(\d{1,10})[,}]')
_SCORED = re.compile(rb'\["([^"]*)",')
_WITH_SCORE = re.compile(rb'\["([^"]*)",([-+.0-9eE]{1,40})\]')
_BACKSLASH, _QUOTE = b"\x01\x01", b"\x02\x02"


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a stranger's file can cause into an error that names it."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        raise SourceError(
            f"is not a tokenizer's ({one_line(error)})", subject=path, remedy="fetch it again"
        ) from None


def _read(folder: Path, name: str, max_memory: int | None) -> bytes:
    path = folder / name
    refuse_link_outside(folder, path)
    nbytes = path.stat().st_size
    check_room(_MEMORY_PER_BYTE * nbytes, max_memory=max_memory, subject=path, purpose="to read it")
    content = read_regular(path, max_nbytes=_MAX_NBYTES)
    if is_lfs_pointer(content):
        raise SourceError(LFS_FINDING, subject=path, remedy=LFS_REMEDY)
    return content


def _in_order(ids: npt.NDArray[np.int64], hashes: npt.NDArray[np.int64]) -> Vocabulary:
    order = np.argsort(ids, kind="stable")
    ids, hashes = ids[order], hashes[order]
    is_last = np.append(ids[1:] != ids[:-1], True)[: len(ids)]
    return Vocabulary(ids[is_last], hashes[is_last])


def _pairs(folder: Path, name: str, max_memory: int | None) -> Iterable[tuple[bytes, int]]:
    if name == TOKENIZER_JSON:
        return _json_pairs(_compact(_tokenizer_file(folder, max_memory).model.vocab))
    content = _read(folder, name, max_memory)
    if name == "vocab.txt":
        return ((line.rstrip(b"\r\n"), number) for number, line in enumerate(BytesIO(content)))
    if name == "vocab.json":
        return _json_pairs(_compact(content))
    if name == "tekken.json":
        return _tekken_pairs(msgspec.json.decode(content, type=_TekkenFile))
    if name.endswith(TIKTOKEN_SUFFIX):
        words = (line.split() for line in BytesIO(content) if line.strip())
        return ((token, int(rank)) for token, rank in words)
    return ((piece, number) for number, piece in enumerate(_pieces(content)))


def _tekken_pairs(file: _TekkenFile) -> Iterator[tuple[bytes, int]]:
    """Yield tokens and ids of a tekken.json: special tokens come first, ranks follow."""
    for special in file.special_tokens or ():
        yield special.token_str.encode(), special.rank
    for entry in file.vocab:
        yield entry.token_bytes.encode(), entry.rank + file.config.default_num_special_tokens


def _tokenizer_file(folder: Path, max_memory: int | None) -> _TokenizerFile:
    return msgspec.json.decode(_read(folder, TOKENIZER_JSON, max_memory), type=_TokenizerFile)


def _json_pairs(compact: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield tokens and ids of compact JSON, without a dict of them all: that would stay resident.

    It is `{"token":id,...}`, or a unigram model's `[["token",score],...]`, in order of ids.
    """
    if compact[:1] == b"[":
        for number, match in enumerate(_SCORED.finditer(compact)):
            yield _unescaped(match[1]), number
    else:
        for match in _NUMBERED.finditer(compact):
            yield _unescaped(match[1]), int(match[2])


def _unescaped(text: bytes) -> bytes:
    text = text.replace(_QUOTE, b'\\"').replace(_BACKSLASH, b"\\\\")
    if b"\\" not in text:
        return text
    return msgspec.json.decode(b'"%b"' % text, type=str).encode()


def _pieces(content: bytes) -> Iterator[bytes]:
    """Yield the pieces of a SentencePiece model: field 1 of each field 1 of the message."""
    for field, value in _fields(memoryview(content)):
        if field == 1 and isinstance(value, memoryview):
            texts = (text for number, text in _fields(value) if number == 1)
            text = next(texts, b"")
            yield b"" if isinstance(text, int) else bytes(text)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and value of each field of a protobuf message. Raises `ValueError`."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, position = _varint(message, position)
        else:
            length = {1: 8, 5: 4}.get(kind, -1)
        if length < 0 or position + length > len(message):
            raise ValueError("not a SentencePiece model")
        yield tag >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise ValueError("not a SentencePiece model")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _compact(encoded: msgspec.Raw | bytes) -> bytes:
    """Return JSON without spaces, in which the next quote always ends a text.

    Escaped quotes and backslashes become control characters, which no text of JSON holds. A pattern
    that knows escapes takes 130 bytes for each character of a text; if it does not match, it starts
    again at every quote within the text.
    """
    compact = msgspec.json.format(memoryview(encoded), indent=-1)
    return compact.replace(b"\\\\", _BACKSLASH).replace(b'\\"', _QUOTE)


def _canonical(raw: msgspec.Raw) -> str:
    """Return a step's settings as text, equal for all versions that mean the same."""
    if len(memoryview(raw)) > _MAX_STEP_NBYTES:
        return xxhash.xxh3_128_hexdigest(_compact(raw))
    return json.dumps(_step(msgspec.json.decode(raw)), sort_keys=True)


def _step(step: object) -> object:
    if isinstance(step, list):
        return [_step(item) for item in step]
    if not isinstance(step, dict):
        return step
    settings = {key: _step(value) for key, value in step.items() if value is not None}
    if settings.get("type") == "Metaspace":
        prepends = settings.pop("add_prefix_space", True)
        settings.setdefault("prepend_scheme", "always" if prepends else "never")
        settings.setdefault("split", True)
        settings.pop("str_rep", None)
    elif settings.get("type") == "ByteLevel":
        settings.setdefault("use_regex", True)
    return settings
