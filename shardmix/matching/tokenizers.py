"""Differences between tokenizers: ids that stand for other tokens, and the splitting of text.

Compares their files byte for byte first: those of fine-tunes are mostly the original's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shardmix.conventions.vocabularies import (
    ADDED_NAME,
    CONFIG_NAME,
    CUTTING_NAMES,
    SIDE_NAMES,
    SPECIAL_NAME,
    TEMPLATE_NAMES,
    TIKTOKEN_SUFFIX,
    TOKENIZER_JSON,
    VOCABULARY_NAMES,
    TokenizerJson,
    Vocabulary,
    is_id,
    merges_digest,
    read_tokenizer_json,
    read_tokens,
    read_vocabulary,
    same_lines,
)
from shardmix.errors import BudgetError, SourceError, printable, shown, unreadable
from shardmix.formats.strict_json import read_json
from shardmix.matching.differences import Difference
from shardmix.system.files import read_regular, refuse_link_outside, same_content
from shardmix.system.memory import give_back_free_memory

KEY = "tokenizer"
_NUM_NAMED = 3
_MOST_SPARE = 5_000
_QUICK_NBYTES = 1_000_000
_LISTS = ("merges.txt", "bpe.codes")
_SPECIAL_KEYS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
_TEXT_KEYS = ("add_bos_token", "add_eos_token", "do_lower_case")
_SPARE = re.compile(
    r"(?i)reserved|unused|placeholder|dummy|madeupword|extra_?(?:id_?)?\d|(?:pad|control|special|unk)"
    r"_?(?:token)?_?\d+[|>\]]*$"
)
"""Tokens that only reserve a row for another."""


@dataclass(frozen=True, slots=True)
class TokenizerFolder:
    """A model's tokenizer, by its folder."""

    name: str
    """The user's name for the model."""
    path: Path
    """The model's folder."""


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """A model's tokenizer as its small files describe it."""

    name: str
    """The user's name for the model."""
    folder: Path
    """The model's folder."""
    vocabularies: tuple[str, ...]
    """Names of the files with a vocabulary; the first one is read first."""
    config: Mapping[str, Any]
    """Content of tokenizer_config.json, with special tokens from all files."""
    added: dict[int, str]
    """Id → token, of the tokens added beside the vocabulary."""


def tokenizer_differences(
    folders: Sequence[TokenizerFolder],
    *,
    output: int = 0,
    num_rows: int | None = None,
    max_memory: int | None = None,
) -> list[Difference]:
    """Return the differences to the output's tokenizer, which is that of the model `output`.

    `num_rows` is the length of the input embedding, if it is known. `max_memory` (bytes) bounds the
    process: files that are too large for it are not compared, and a warning says so. A tokenizer
    that cannot be read is only a warning, too, since it is not merged.
    """
    found: list[Difference] = []
    files = []
    for folder in folders:
        try:
            files.append(small_files(folder))
        except SourceError as error:
            found.append(_told(f"{error}; its tokenizer was not compared"))
            files.append(SmallFiles(folder.name, folder.path, (), {}, {}))
    first = next((own for own in (files[output], *files) if own.vocabularies), None)
    if first is None:
        return found
    if first is not files[output] and len(found) == 0:
        found.append(
            _told(
                f"{KEY}: none in {files[output].name}, whose files the output takes, but one in "
                f"{first.name}: to take that, use --config-from {first.name}"
            )
        )
    if first is files[output]:
        found += _beyond_rows(first, num_rows, max_memory)
    known: dict[str, _Read] = {}
    for other in files:
        if other is first or not other.vocabularies:
            continue
        try:
            told = _compared(first, other, known, num_rows, max_memory)
            if first is not files[output]:
                told = [replace(difference, consequence="") for difference in told]
            found += told
        except (SourceError, BudgetError) as error:
            found.append(
                _told(f"{KEY}: those of {first.name} and {other.name} were not compared: {error}")
            )
    return list(dict.fromkeys(found))


def _beyond_rows(
    files: SmallFiles, num_rows: int | None, max_memory: int | None
) -> Iterator[Difference]:
    """Find ids of the output's tokenizer that the embedding has no row for.

    Added tokens are the last ones. Without any the whole vocabulary is read, if that is quick.
    """
    if num_rows is None:
        return
    last = max(files.added, default=-1)
    name = files.vocabularies[0]
    try:
        refuse_link_outside(files.folder, files.folder / name)
        if last < num_rows and (files.folder / name).stat().st_size <= _QUICK_NBYTES:
            ids = _read_vocabulary(files, name, max_memory).vocabulary.ids
            last = int(ids[-1]) if ids.size else -1
    except (SourceError, BudgetError, OSError):
        return  # the comparison of tokenizers reports it
    yield from _beyond(files.name, last, num_rows)


def _beyond(name: str, last: int, num_rows: int) -> Iterator[Difference]:
    if last >= num_rows:
        yield _told(
            f"{KEY}: {name} has ids up to {last}, and the embedding has {num_rows} rows",
            "texts with ids beyond them fail: take the tokenizer of another model with "
            "--config-from",
            f"{KEY}.ids",
        )


def _told(finding: str, consequence: str = "", key: str = KEY) -> Difference:
    return Difference(key, finding, consequence, is_refused=False)


def small_files(folder: TokenizerFolder) -> SmallFiles:
    """Read a tokenizer's small files. Raises `SourceError`."""
    path = folder.path
    names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    present = [name for name in VOCABULARY_NAMES if name in names]
    present += sorted(name for name in names if name.endswith(TIKTOKEN_SUFFIX))
    if not present:
        return SmallFiles(folder.name, path, (), {}, {})
    side = {name: _read_side(path, name) if name in names else {} for name in SIDE_NAMES}
    config = {**side[SPECIAL_NAME], **side[CONFIG_NAME]}
    if "chat_template" not in config and not names.isdisjoint(TEMPLATE_NAMES):
        config["chat_template"] = _template(path, names)
    added = {number: token for token, number in side[ADDED_NAME].items() if is_id(number)}
    decoder = side[CONFIG_NAME].get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        text = _token_text(token)
        if number.isdecimal() and len(number) < 10 and text is not None:
            added[int(number)] = text
    return SmallFiles(folder.name, path, tuple(present), config, added)


def _read_side(folder: Path, name: str) -> dict[str, Any]:
    refuse_link_outside(folder, folder / name)
    content: dict[str, Any] = read_json(folder / name)
    return content


def _template(folder: Path, names: set[str]) -> str:
    name = next(name for name in TEMPLATE_NAMES if name in names)
    refuse_link_outside(folder, folder / name)
    try:
        return read_regular(folder / name, max_nbytes=4_000_000).decode(errors="replace")
    except OSError as error:
        raise unreadable(folder / name, error) from None


def _token_text(token: object) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _compared(
    first: SmallFiles,
    other: SmallFiles,
    known: dict[str, "_Read"],
    num_rows: int | None,
    max_memory: int | None,
) -> list[Difference]:
    """Return the differences of one tokenizer to the output's.

    `known` stores the parts of the output's that were read, by file, for the next comparison.
    """
    shared = [name for name in first.vocabularies if name in other.vocabularies]
    pair = (shared[0], shared[0]) if shared else (first.vocabularies[0], other.vocabularies[0])
    for own, name in ((first, pair[0]), (other, pair[1])):
        refuse_link_outside(own.folder, own.folder / name)
    is_same_file = bool(shared) and same_content(first.folder / pair[0], other.folder / pair[1])
    found, cuts = [], []
    if not is_same_file or first.added != other.added:
        try:
            one = known.get(pair[0]) or _read_vocabulary(first, pair[0], max_memory)
            known[pair[0]] = one
            two = _read_vocabulary(other, pair[1], max_memory)
            found += _id_differences(one, two, num_rows, max_memory)
            cuts += _cutting_steps(one, two, max_memory)
        finally:
            give_back_free_memory()
    cuts += [
        name
        for name in CUTTING_NAMES
        if pair[0] != TOKENIZER_JSON and _differs(first.folder, other.folder, name)
    ]
    cuts += [
        f"{key} ({_shown(first.config[key])} and {_shown(other.config[key])})"
        for key in _TEXT_KEYS
        if key in first.config and key in other.config and first.config[key] != other.config[key]
    ]
    if cuts:
        found.append(
            _told(
                f"{KEY}: {first.name} and {other.name} make other tokens of a text: they differ in "
                f"{', '.join(cuts)}",
                f"the output takes that of {first.name}",
                f"{KEY}.text",
            )
        )
    settings = differing_settings(first, other)
    if settings:
        found.append(
            _told(
                f"{KEY}: settings differ: {', '.join(settings)}",
                f"the output takes those of {first.name}",
                f"{KEY}.settings",
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class _Read:
    """A tokenizer whose vocabulary has been read."""

    files: SmallFiles
    file: str
    """Name of the file that holds the vocabulary."""
    vocabulary: Vocabulary
    """Vocabulary with added tokens."""
    added: dict[int, str]
    """Id → added token."""
    json: TokenizerJson | None
    """The file's content, if it is a tokenizer.json."""

    @property
    def name(self) -> str:
        return self.files.name

    def tokens(self, ids: Sequence[int], max_memory: int | None) -> dict[int, str]:
        """Return id → token of some ids."""
        read = read_tokens(self.files.folder, self.file, ids, max_memory=max_memory)
        return read | {number: self.added[number] for number in ids if number in self.added}


def _read_vocabulary(files: SmallFiles, name: str, max_memory: int | None) -> _Read:
    if name != TOKENIZER_JSON:
        own = read_vocabulary(files.folder, name, max_memory=max_memory)
        return _Read(files, name, own.with_added(files.added), files.added, None)
    content = read_tokenizer_json(files.folder, max_memory=max_memory)
    added = files.added | content.added
    return _Read(files, name, content.vocabulary.with_added(added), added, content)


def _cutting_steps(one: _Read, two: _Read, max_memory: int | None) -> list[str]:
    if one.json is None or two.json is None:
        return []
    steps = [step for step in one.json.steps if one.json.steps[step] != two.json.steps[step]]
    if one.json.merges == two.json.merges:
        return steps
    digests = {merges_digest(own.files.folder, max_memory=max_memory) for own in (one, two)}
    if len(digests) == 1:
        return steps
    return ["merges", *steps]


def _differs(one: Path, other: Path, name: str) -> bool:
    if not ((one / name).is_file() and (other / name).is_file()):
        return False
    refuse_link_outside(one, one / name)
    refuse_link_outside(other, other / name)
    if same_content(one / name, other / name):
        return False
    return not (name in _LISTS and same_lines(one / name, other / name))


def differing_settings(first: SmallFiles, other: SmallFiles) -> list[str]:
    """Return the special tokens and the chat template that two tokenizers have otherwise."""
    found = []
    for key in _SPECIAL_KEYS:
        one, two = _token_text(first.config.get(key)), _token_text(other.config.get(key))
        if one is not None and two is not None and one != two:
            found.append(f"{key} ({_shown(one)} in {first.name}, {_shown(two)} in {other.name})")
    one, two = (own.config.get("chat_template") for own in (first, other))
    if one != two:
        where = [own.name for own in (first, other) if own.config.get("chat_template")]
        found.append("chat_template" if len(where) == 2 else f"chat_template (only in {where[0]})")
    return found


def _id_differences(
    one: _Read, two: _Read, num_rows: int | None, max_memory: int | None
) -> list[Difference]:
    """Return ids that stand for other tokens, or for tokens in only one of the models."""
    _, at_one, at_two = np.intersect1d(
        one.vocabulary.ids, two.vocabulary.ids, assume_unique=True, return_indices=True
    )
    is_other = one.vocabulary.hashes[at_one] != two.vocabulary.hashes[at_two]
    conflicts = one.vocabulary.ids[at_one][is_other]
    if conflicts.size and not _are_alike(one.file, two.file):
        return [
            _told(
                f"{KEY}: {one.file} in {one.name} and {two.file} in {two.name} cannot be compared: "
                "whether an id stands for the same token in both is not known"
            )
        ]
    found = []
    if conflicts.size:
        some = conflicts[:_MOST_SPARE].tolist()
        tokens = [own.tokens(some, max_memory) for own in (one, two)]
        real = [
            number
            for number in some
            if not any(_SPARE.search(texts.get(number, "")) for texts in tokens)
        ]
        if real or conflicts.size > _MOST_SPARE:
            return [_refused(one, two, real or some, tokens, int(conflicts.size))]
        found.append(
            _told(
                f"{KEY}: {_ids(conflicts, 'a token')} in one of {one.name} and {two.name}, and "
                "kept free in the other",
                "their rows are averaged all the same",
                f"{KEY}.ids",
            )
        )
    if num_rows is not None and one.vocabulary.ids.size:
        found += _beyond(one.name, int(one.vocabulary.ids[-1]), num_rows)
    for own, than in ((one, two), (two, one)):
        ids = np.setdiff1d(own.vocabulary.ids, than.vocabulary.ids, assume_unique=True)
        within = ids if num_rows is None else ids[ids < num_rows]
        if within.size:
            found.append(
                _told(
                    f"{KEY}: {_ids(within)} in {own.name} only",
                    f"{than.name} has rows there that stand for nothing, and they are averaged in",
                    f"{KEY}.ids",
                )
            )
    return found


def _refused(
    one: _Read, two: _Read, ids: Sequence[int], tokens: Sequence[dict[int, str]], count: int
) -> Difference:
    words = [
        f"{number} is {_shown(tokens[0].get(number))} in {one.name}, "
        f"{_shown(tokens[1].get(number))} in {two.name}"
        for number in ids[:_NUM_NAMED]
    ]
    noun = "id stands for another token" if count == 1 else "ids stand for other tokens"
    return Difference(
        key=KEY,
        finding=f"{KEY}: {count} {noun}: {'; '.join(words)}",
        consequence=f"the output takes the tokenizer of {one.name}",
        is_refused=True,
        remedy="map their rows by token with --tokenizer-source base or union (tokenizer_source in "
        "a recipe or in Python)",
    )


def _are_alike(one: str, other: str) -> bool:
    """Return True if ids in files of these two kinds are comparable as they stand."""
    if one == other:
        return True
    own = {TOKENIZER_JSON, "vocab.txt", "vocab.json"}
    return one in own and other in own


def _ids(ids: Any, what: str = "") -> str:
    """Return ids as ranges: `ids 7, 32000-32001 and 40 more stand for tokens`."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    ranges = [
        str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}"
        for part in np.split(ids, breaks)[:_NUM_NAMED]
    ]
    num_told = sum(len(part) for part in np.split(ids, breaks)[:_NUM_NAMED])
    more = f" and {len(ids) - num_told} more" if len(ids) > num_told else ""
    if len(ids) == 1:
        return f"id {ranges[0]} stands for a token"
    return f"ids {', '.join(ranges)}{more} stand for {what or 'tokens'}"


def _shown(value: object) -> str:
    return f'"{printable(value[:40])}"' if isinstance(value, str) else shown(value)
