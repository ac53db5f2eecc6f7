"""The output's vocabulary, and the row of every token in every model.

Tokens are the same if their texts are. As in mergekit, a row that a model lacks is the one that a
recipe names for it, else the row of the only model that has it, else the base model's, else the
mean of those that have it. Rows without a token are padding: they stay as in the model whose
vocabulary it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmix.conventions.vocabularies import AddedToken
from shardmix.errors import MismatchError, RecipeError, SourceError, printable
from shardmix.matching.model_tokens import ModelTokens, added_vocabulary, few
from shardmix.recipe.tokenizer import BASE, UNION, RecipeTokenizer, TokenRow
from shardmix.sources.mapped_rows import AVERAGE, MEAN, ZERO, RowMaps, RowRuns

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OutputTokens:
    """The tokens of the output: those of one model, and others that follow them."""

    giver: int
    """Number of the model whose tokenizer it has."""
    tokens: ModelTokens
    """That model's tokens."""
    added: tuple[AddedToken, ...]
    """Further tokens that a tokenizer finds in a text before it is split."""
    entries: tuple[tuple[int, str], ...]
    """Further entries of the vocabulary, which no text is split into: id and token."""
    hashes: Ids
    """Hashes of all tokens, in order of ids."""
    ids: Ids
    """Their ids."""

    @property
    def num_needed(self) -> int:
        """The least number of rows."""
        return int(self.ids[-1]) + 1


def output_tokens(
    models: Sequence[ModelTokens],
    asked: RecipeTokenizer,
    names: Sequence[str],
    base: int,
    max_memory: int | None,
) -> OutputTokens:
    """Return the tokens of the output.

    `names` are the models as the recipe names them; `base` is the number of the base. Raises
    `MismatchError` if vocabularies cannot be united, `RecipeError` for a token that no model has.
    """
    giver = base if asked.source in (BASE, UNION) else names.index(asked.source)
    own = models[giver]
    known = {*own.all.hashes.tolist()}
    fresh: list[AddedToken] = []
    entries: list[tuple[int, str]] = []
    next_id = own.last_id + 1
    if asked.source == UNION:
        for other in models:
            is_new = ~np.isin(other.all.hashes, np.fromiter(known, np.int64, len(known)))
            ids = other.all.ids[is_new].tolist()
            if not ids:
                continue
            known.update(other.all.hashes[is_new].tolist())
            texts = other.texts(ids, max_memory)
            as_added = {token.id: token for token in other.added}
            for number in ids:
                if number in as_added:
                    fresh.append(_renumbered(as_added[number], next_id))
                else:
                    entries.append((next_id, texts[number]))
                next_id += 1
            # A single character needs no merge.
            if entries and not (own.is_byte_level and all(len(text) > 1 for _, text in entries)):
                raise _not_united(own, other, [text for _, text in entries])
    for row in asked.tokens:
        key = hash(row.token.encode())
        if key not in known:
            known.add(key)
            fresh.append(_new_token(row, models, next_id))
            next_id += 1
    if (fresh or entries) and own.json is None:
        raise SourceError(
            f"its tokenizer is in {own.file}; new tokens are written only into a tokenizer.json",
            subject=own.name,
            remedy="save its tokenizer as one (AutoTokenizer.from_pretrained, then save_pretrained "
            "in transformers)",
        )
    if (fresh or entries) and len(own.all.ids) != own.last_id + 1:
        raise SourceError(
            f"its {len(own.all.ids)} tokens have ids up to {own.last_id}, with gaps, so that no "
            "tokenizer can number new tokens after them",
            subject=own.name,
            remedy="use tokenizer source base, or a model whose ids have no gaps",
        )
    more = added_vocabulary([*((token.id, token.content) for token in fresh), *entries])
    hashes = np.concatenate([own.all.hashes, more.hashes])
    ids = np.concatenate([own.all.ids, more.ids])
    return OutputTokens(giver, own, tuple(fresh), tuple(entries), hashes, ids)


def _renumbered(token: AddedToken, number: int) -> AddedToken:
    return AddedToken(
        number,
        token.content,
        token.single_word,
        token.lstrip,
        token.rstrip,
        token.normalized,
        token.special,
    )


def _new_token(row: TokenRow, models: Sequence[ModelTokens], number: int) -> AddedToken:
    """Return a token that the recipe adds: as a model has it, else as it stands in a text."""
    for model in models:
        for token in model.added:
            if token.content == row.token:
                return _renumbered(token, number)
    return AddedToken(number, row.token, normalized=False)


def _not_united(own: ModelTokens, other: ModelTokens, texts: Sequence[str]) -> MismatchError:
    return MismatchError(
        f"the vocabularies of {own.name} and {other.name} were learned apart: {other.name} has "
        f"{len(texts)} tokens besides added ones that {own.name} lacks ({few(texts)}), and a text "
        "would be split otherwise with them",
        subject="tokenizer_source union",
        remedy=f"use base, or the model whose tokenizer you want ({own.name} or {other.name})",
    )


def row_maps(
    output: OutputTokens,
    models: Sequence[ModelTokens],
    sizes: Sequence[int],
    asked: RecipeTokenizer,
    names: Sequence[str],
    preferred: int | None,
) -> RowMaps:
    """Return the row of every token in every model.

    `sizes` are the models' numbers of rows. `preferred` is the number of the model that gives rows
    that others lack, if it has them. Raises `RecipeError` if a row that the recipe names is none.
    """
    num_rows = _num_rows(output, sizes[output.giver], asked.pad_to_multiple_of)
    own = [_own_rows(output, models, sizes, model, num_rows) for model in range(len(models))]
    counts = np.zeros(num_rows, np.int32)
    for rows in own:
        counts += rows >= 0
    is_token = np.zeros(num_rows, bool)
    is_token[output.ids] = True
    defaults = _defaults(output, own, counts, is_token, preferred)
    fixed = list(_fixed_rows(output, models, sizes, asked, names, own))
    filled = []
    for model, rows in enumerate(own):
        givers = np.where(rows >= 0, model, defaults[0]).astype(np.int16)
        found = np.where(rows >= 0, rows, defaults[1]).astype(np.int32)
        for at, giver, row, force in fixed:
            if force or rows[at] < 0:
                givers[at], found[at] = giver, row
        filled.append(RowRuns.of(givers, found))
    mine = [
        RowRuns.of(
            np.where(rows >= 0, model, ZERO).astype(np.int16), np.maximum(rows, 0).astype(np.int32)
        )
        for model, rows in enumerate(own)
    ]
    return RowMaps(tuple(mine), tuple(filled))


def _num_rows(output: OutputTokens, size: int, padding: int | None) -> int:
    needed = output.num_needed
    return max(size, needed) if padding is None else -(-needed // padding) * padding


def _own_rows(
    output: OutputTokens,
    models: Sequence[ModelTokens],
    sizes: Sequence[int],
    model: int,
    num_rows: int,
) -> Ids:
    """Return a model's own row for each of the output's; -1 for those that it lacks.

    Padding, rows without a token, is the same row in each model that has padding there.
    """
    found = np.full(num_rows, -1, np.int64)
    found[output.ids] = models[model].ids_of(output.hashes)
    end = min(num_rows, sizes[model], sizes[output.giver])
    is_padding = np.ones(end, bool)
    for ids in (output.ids, models[model].all.ids):
        is_padding[ids[ids < end]] = False
    rows = np.flatnonzero(is_padding)
    found[rows] = rows
    return found


def _defaults(
    output: OutputTokens,
    own: Sequence[Ids],
    counts: npt.NDArray[np.int32],
    is_token: npt.NDArray[np.bool_],
    preferred: int | None,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """Return giver and row of each row for models that lack it."""
    givers = np.where(counts == 0, np.where(is_token, ZERO, AVERAGE), MEAN).astype(np.int16)
    rows = np.zeros(len(givers), np.int32)

    def give(where: npt.NDArray[np.bool_], model: int) -> None:
        givers[where] = model
        rows[where] = own[model][where]

    if preferred is not None:
        give(own[preferred] >= 0, preferred)
    give(~is_token & (own[output.giver] >= 0), output.giver)
    for model, its in enumerate(own):
        give((counts == 1) & (its >= 0), model)
    return givers, rows


def _fixed_rows(
    output: OutputTokens,
    models: Sequence[ModelTokens],
    sizes: Sequence[int],
    asked: RecipeTokenizer,
    names: Sequence[str],
    own: Sequence[Ids],
) -> Iterator[tuple[int, int, int, bool]]:
    """Yield the rows that the recipe names: row of the output, giver, its row, and its force."""
    for row in asked.tokens:
        at = int(output.ids[output.hashes == hash(row.token.encode())][0])
        if row.model is None:
            yield at, ZERO, 0, row.force
            continue
        giver = names.index(row.model)
        token = row.token if row.of_token is None else row.of_token
        found = row.of_id if row.of_id is not None else models[giver].id_of(token)
        subject = f'tokens["{printable(row.token[:40])}"]'
        if found is None:
            raise RecipeError(
                f"{row.model} has no token {few([token])}",
                subject=subject,
                remedy="name a model that has it, another token by {kind: model_token}, or "
                "{kind: zero}",
            )
        if found >= sizes[giver]:
            raise RecipeError(
                f"token_id {found} is beyond the {sizes[giver]} rows of {row.model}",
                subject=subject,
                remedy="name an id that it has",
            )
        yield at, giver, found, row.force


def summary(output: OutputTokens, maps: RowMaps, models: Sequence[ModelTokens]) -> str:
    """Describe the output's vocabulary in a line."""
    own, num_rows = output.tokens, maps.filled[0].num_rows
    more = len(output.added) + len(output.entries)
    text = f"tokenizer: the output has the {len(own.all.ids)} tokens of {own.name}"
    if more:
        texts = [*(token.content for token in output.added), *(text for _, text in output.entries)]
        text += f" and {more} more ({few(texts)})"
    text += f", in {num_rows} rows"
    dropped = []
    for model in models:
        count = int((~np.isin(model.all.hashes, output.hashes)).sum())
        if count:
            dropped.append(f"{count} of {model.name}")
    if dropped:
        text += f"; without {', '.join(dropped)}"
    if output.entries:
        text += (
            f"; texts are split as by {own.name}, so that {len(output.entries)} of the new tokens "
            "occur in none"
        )
    return text


Config = Mapping[str, Any]
