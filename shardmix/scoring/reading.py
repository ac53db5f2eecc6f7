"""Examples read for each model by its own tokenizer, and only once by equal ones.

Loads tokenizers one after the other, and holds none.
"""

from collections.abc import Sequence
from pathlib import Path

from shardmix.conventions.vocabularies import (
    CONFIG_NAME,
    CUTTING_NAMES,
    SIDE_NAMES,
    TEMPLATE_NAMES,
    TIKTOKEN_SUFFIX,
    VOCABULARY_NAMES,
)
from shardmix.errors import RecipeError
from shardmix.scoring.encoding import (
    EncodedExamples,
    encode_examples,
    load_tokenizer,
    position_limit,
)
from shardmix.scoring.examples import Example
from shardmix.scoring.options import ScoreSettings
from shardmix.sources.base import Source
from shardmix.system.files import same_content

_FILES = frozenset((*VOCABULARY_NAMES, *SIDE_NAMES, *CUTTING_NAMES, *TEMPLATE_NAMES))
_MOST_NAMED = 3


def read_examples(
    examples: Sequence[Example], sources: Sequence[Source], settings: ScoreSettings
) -> tuple[list[EncodedExamples], tuple[str, ...]]:
    """Return each model's encoded examples, in order, and notes for the user.

    Models that read the same share one object. A model without a tokenizer uses the first model's.
    Raises `SourceError` if a tokenizer cannot be loaded, `RecipeError` as `encode_examples`.
    """
    found: list[EncodedExamples] = []
    notes: list[str] = []
    known: list[tuple[Source, int | None, EncodedExamples]] = []
    for source in sources:
        owner = source
        if known and not _tokenizer_files(source.folder):
            owner = sources[0]
            notes.append(
                f"{source.text}: has no tokenizer; it reads the examples by that of {owner.text}"
            )
        limit = position_limit(source.config)
        encoded = next(
            (
                encoded
                for other, its_limit, encoded in known
                if its_limit == limit and _is_same(other, owner)
            ),
            None,
        )
        if encoded is None:
            encoded = _encode(examples, owner, source, settings)
            encoded = next((each for each in found if each.sequences == encoded.sequences), encoded)
        known.append((owner, limit, encoded))
        found.append(encoded)
    return found, (*notes, *_told(sources, found, settings))


def _encode(
    examples: Sequence[Example], owner: Source, model: Source, settings: ScoreSettings
) -> EncodedExamples:
    tokenizer = load_tokenizer(
        owner.text, owner.folder, trust_remote_code=settings.trust_remote_code
    )
    if settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            "its tokenizer has no chat template",
            subject=owner.text,
            remedy="score without --chat-template",
        )
    return encode_examples(examples, tokenizer, settings, model.config)


def _tokenizer_files(folder: Path) -> list[str]:
    """Return the names of a tokenizer's files; empty if there is none."""
    names = {path.name for path in folder.iterdir()}
    found = {
        name
        for name in names
        if name in _FILES
        or name.endswith(TIKTOKEN_SUFFIX)
        or (name.startswith("tokenization_") and name.endswith(".py"))
    }
    is_one = CONFIG_NAME in found or any(
        name in VOCABULARY_NAMES or name.endswith(TIKTOKEN_SUFFIX) for name in found
    )
    return sorted(found) if is_one else []


def _is_same(one: Source, other: Source) -> bool:
    """Return True if two models have the same tokenizer, byte for byte."""
    if one.folder == other.folder:
        return True
    names = _tokenizer_files(one.folder)
    return names == _tokenizer_files(other.folder) and all(
        same_content(one.folder / name, other.folder / name) for name in names
    )


def _told(
    sources: Sequence[Source], found: Sequence[EncodedExamples], settings: ScoreSettings
) -> list[str]:
    """Say that models read the examples in different ways, if they do."""
    distinct = list({id(encoded): encoded for encoded in found}.values())
    if len(distinct) < 2:
        return []
    is_of_tokens = settings.type.reads.loss_of_tokens
    parts = []
    for encoded in distinct[:_MOST_NAMED]:
        names = [source.text for source, own in zip(sources, found, strict=True) if own is encoded]
        count = sum(
            len(sequence.labels) if is_of_tokens else sequence.num_tokens
            for sequence in encoded.sequences
        )
        parts.append(f"{', '.join(names)}: {count} tokens")
    if len(distinct) > _MOST_NAMED:
        parts.append("...")
    consequence = (
        "a loss is a mean over a model's own tokens, so that these losses, and the weights that "
        "follow, are not comparable in general"
        if is_of_tokens
        else "losses compare whole texts, whatever their tokens"
    )
    return [
        "tokenizers differ: each model reads the examples by its own "
        f"({'; '.join(parts)}); {consequence}"
    ]
