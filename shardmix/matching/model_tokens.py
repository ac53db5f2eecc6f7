"""A model's tokens by id, as a tokenizer of its files numbers them; each token has one id.

Stricter than the comparison of tokenizers: rows are mapped by these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmix.conventions.vocabularies import (
    CONFIG_NAME,
    TOKENIZER_JSON,
    AddedToken,
    TokenizerJson,
    Vocabulary,
    read_tokenizer_json,
    read_tokens,
    read_vocabulary,
    vocabulary,
)
from shardmix.errors import SourceError, listed, printable
from shardmix.matching.tokenizers import SmallFiles, TokenizerFolder, small_files
from shardmix.system.memory import give_back_free_memory

_OWN_NAMES = (TOKENIZER_JSON, "vocab.txt", "vocab.json")
"""Files whose ids are the model's; a SentencePiece model's are shifted by some classes."""
_NUM_NAMED = 3
_BYTE_LEVEL = '"type": "ByteLevel"'


@dataclass(frozen=True, slots=True)
class ModelTokens:
    """A model's tokens. Hashes are those of `Vocabulary`."""

    name: str
    """The user's name for the model."""
    files: SmallFiles
    """Its tokenizer's small files."""
    file: str
    """Name of the file that holds the vocabulary."""
    all: Vocabulary
    """All tokens by id."""
    own: Vocabulary
    """Those of the vocabulary, without added tokens."""
    added: tuple[AddedToken, ...]
    """Added tokens, with the ids that a tokenizer gives them."""
    json: TokenizerJson | None
    """The rest of a tokenizer.json."""

    @property
    def last_id(self) -> int:
        """The largest id."""
        return int(self.all.ids[-1])

    def ids_of(self, hashes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the id of each token, by its hash; -1 if there is none."""
        order = np.argsort(self.all.hashes, kind="stable")
        known = self.all.hashes[order]
        at = np.minimum(known.searchsorted(hashes), len(known) - 1)
        return np.where(known[at] == hashes, self.all.ids[order][at], -1)

    def id_of(self, token: str) -> int | None:
        """Return a token's id, or None."""
        number = int(self.ids_of(np.array([hash(token.encode())], np.int64))[0])
        return None if number < 0 else number

    def texts(self, ids: Sequence[int], max_memory: int | None) -> dict[int, str]:
        """Return id → token of some ids."""
        wanted = set(ids)
        found = {token.id: token.content for token in self.added if token.id in wanted}
        if wanted <= found.keys():
            return found
        return read_tokens(self.files.folder, self.file, wanted, max_memory=max_memory) | found

    @property
    def is_byte_level(self) -> bool:
        """True if texts are split by merges of bytes, so that a token needs merges to occur."""
        if self.json is None:
            return False
        return (
            self.json.kind == "BPE"
            and self.json.needs_merges
            and _BYTE_LEVEL in self.json.steps["pre_tokenizer"] + self.json.steps["normalizer"]
        )


def read_model_tokens(folder: TokenizerFolder, *, max_memory: int | None) -> ModelTokens:
    """Read the tokens of the model in a folder.

    Raises `SourceError` if there are none, or if their ids are not clear; `BudgetError`.
    """
    files = small_files(folder)
    name = files.vocabularies[0] if files.vocabularies else None
    if name is None:
        raise SourceError(
            "has no tokenizer, so that its rows cannot be mapped by token",
            subject=folder.name,
            remedy="put its tokenizer.json into its folder",
        )
    if name not in _OWN_NAMES:
        raise SourceError(
            f"has only {name}, whose ids some classes shift, so that rows cannot be mapped by it",
            subject=folder.name,
            remedy="save its tokenizer as a tokenizer.json (AutoTokenizer.from_pretrained, then "
            "save_pretrained in transformers)",
        )
    try:
        return _read(files, name, max_memory)
    finally:
        give_back_free_memory()


def _read(files: SmallFiles, name: str, max_memory: int | None) -> ModelTokens:
    beside = _added_beside(files)
    content = None
    if name == TOKENIZER_JSON:
        content = read_tokenizer_json(files.folder, max_memory=max_memory)
        own, count = content.vocabulary, content.num_entries
        stated = list(content.added_tokens)
        known = {token.content for token in stated}
        stated += [token for token in beside if token.content not in known]
        added = tuple(_assigned(own, stated, files))
    else:
        own = read_vocabulary(files.folder, name, max_memory=max_memory)
        count = len(own.ids)
        added = tuple(beside)
    found = own.with_added({token.id: token.content for token in added})
    tokens = ModelTokens(files.name, files, name, found, own, added, content)
    _refuse_unclear(tokens, count, max_memory)
    return tokens


def _added_beside(files: SmallFiles) -> list[AddedToken]:
    """Return the added tokens of the small files, in the order of their ids."""
    decoder = files.config.get("added_tokens_decoder")
    flags: Mapping[str, Any] = decoder if isinstance(decoder, dict) else {}
    found = []
    for number, content in sorted(files.added.items()):
        own = flags.get(str(number))
        own = own if isinstance(own, dict) else {}
        is_special = own.get("special") is True
        found.append(
            AddedToken(
                number,
                content,
                own.get("single_word") is True,
                own.get("lstrip") is True,
                own.get("rstrip") is True,
                own.get("normalized", not is_special) is True,
                is_special,
            )
        )
    return found


def _assigned(own: Vocabulary, stated: Sequence[AddedToken], files: SmallFiles) -> list[AddedToken]:
    """Check the ids of added tokens: the tokenizers library numbers them by itself.

    A token of the vocabulary has its id there; others follow the vocabulary, in order.
    """
    keys = [hash(token.content.encode()) for token in stated]
    is_known = np.isin(own.hashes, keys)
    ids = dict(zip(own.hashes[is_known].tolist(), own.ids[is_known].tolist(), strict=True))
    last = -1
    found: dict[str, AddedToken] = {}
    for token, key in zip(stated, keys, strict=True):
        if key not in ids:
            ids[key] = last + 1 if last >= len(own.ids) or not len(own.ids) else len(own.ids)
        last = max(last, ids[key])
        if token.content in found and found[token.content].id != token.id:
            raise _twice(files, token.content, (found[token.content].id, token.id))
        if ids[key] != token.id:
            raise SourceError(
                f"{CONFIG_NAME if token.content in files.added.values() else TOKENIZER_JSON} says "
                f"that the added token {_quoted(token.content)} is {token.id}, but a tokenizer "
                f"numbers it {ids[key]}, so that its row is not clear",
                subject=files.name,
                remedy="correct its id, or add the tokens again in order",
            )
        found[token.content] = token
    return list(found.values())


def _refuse_unclear(tokens: ModelTokens, num_entries: int, max_memory: int | None) -> None:
    """Raise `SourceError` if a token has two ids, or an id two tokens; or if there are none."""
    ids, hashes = tokens.all.ids, tokens.all.hashes
    if not len(ids):
        raise SourceError(
            f"{tokens.file} holds no tokens", subject=tokens.name, remedy="fetch it again"
        )
    if int(ids[0]) < 0:
        raise SourceError(
            f"{tokens.file} has the id {int(ids[0])}", subject=tokens.name, remedy="fetch it again"
        )
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if again.size:
        pair = sorted(ids[order][int(again[0]) : int(again[0]) + 2].tolist())
        text = tokens.texts(pair, max_memory).get(pair[0], "")
        raise _twice(tokens.files, text, pair)
    if num_entries != len(tokens.own.ids):
        raise SourceError(
            f"{tokens.file} has {num_entries} tokens but {len(tokens.own.ids)} ids: two share one, "
            "or one is no number, so that rows are not clear",
            subject=tokens.name,
            remedy="correct it, or fetch it again",
        )
    shared = np.isin(tokens.own.ids, [token.id for token in tokens.added])
    if shared.any():
        by_id = {token.id: token.content for token in tokens.added}
        pairs = zip(
            tokens.own.ids[shared].tolist(), tokens.own.hashes[shared].tolist(), strict=True
        )
        for number, key in pairs:
            if hash(by_id[number].encode()) != key:
                raise SourceError(
                    f"id {number} stands for a token of {tokens.file} and for the added token "
                    f"{_quoted(by_id[number])}, so that its row is not clear",
                    subject=tokens.name,
                    remedy="correct the added token's id",
                )


def _twice(files: SmallFiles, token: str, ids: Sequence[int]) -> SourceError:
    numbers = " and ".join(map(str, ids))
    return SourceError(
        f"its token {_quoted(token)} has two ids, {numbers}, so that its row is not clear",
        subject=files.name,
        remedy="correct its tokenizer",
    )


def _quoted(token: str) -> str:
    return f'"{printable(token[:40])}"'


def differing_tokens(one: ModelTokens, other: ModelTokens) -> str:
    """Describe the tokens that only one of two models has."""
    found = []
    for own, theirs in ((one, other), (other, one)):
        ids = own.all.ids[~np.isin(own.all.hashes, theirs.all.hashes)].tolist()
        if ids:
            texts = own.texts(ids[:_NUM_NAMED], None)
            more = f" and {len(ids) - _NUM_NAMED} more" if len(ids) > _NUM_NAMED else ""
            named = ", ".join(_quoted(texts[number]) for number in ids[:_NUM_NAMED])
            found.append(f"only in {own.name}: {named}{more}")
    return "; ".join(found) or "both tokenizers have the same tokens, other rows are padding"


def few(tokens: Sequence[str], most: int = _NUM_NAMED) -> str:
    """Return a few tokens in quotation marks, and the number of the rest."""
    return listed([_quoted(token) for token in tokens], most)


def added_vocabulary(tokens: Sequence[tuple[int, str]]) -> Vocabulary:
    """Return a vocabulary of single tokens."""
    return vocabulary((token.encode(), number) for number, token in tokens)
