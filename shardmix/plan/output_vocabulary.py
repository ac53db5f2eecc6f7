"""The output's vocabulary: its rows, its tokenizer's files, and the ids that configs name.

Reads tokenizers and configs; writes nothing.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shardmix.conventions.module_tree import inner_path
from shardmix.conventions.naming import has_vocabulary_axis
from shardmix.conventions.token_ids import GENERATION_NAME, LostId, with_ids, with_sizes
from shardmix.conventions.tokenizer_splices import EDITED_NAMES, Splice, splices
from shardmix.conventions.vocabularies import is_tokenizer_file
from shardmix.conventions.vocabulary_tensors import stated_size
from shardmix.errors import MismatchError, SourceError, listed, unreadable
from shardmix.formats.strict_json import read_json
from shardmix.matching.mapped_tensors import TokenTensors, token_tensors
from shardmix.matching.model_tokens import ModelTokens, read_model_tokens
from shardmix.matching.tokenizers import TokenizerFolder, differing_settings
from shardmix.matching.vocabulary_maps import OutputTokens, output_tokens, row_maps, summary
from shardmix.plan.merge_plan import OutputVocabulary
from shardmix.recipe import Recipe
from shardmix.sources.auxiliary_files import find_auxiliary_files
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import CONFIG_NAME
from shardmix.sources.mapped_rows import MappedRowsSource, RowMaps
from shardmix.system.files import read_regular
from shardmix.system.memory import give_back_free_memory

_MAX_TOKENIZER_NBYTES = 150_000_000


@dataclass(frozen=True, slots=True)
class MappedModels:
    """The models of a merge, with their rows mapped to the output's vocabulary."""

    sources: tuple[Source, ...]
    """The models."""
    config: Mapping[str, Any]
    """The output's config, true of the mapped rows."""
    vocabulary: OutputVocabulary
    """The vocabulary."""
    folder: Path
    """The folder of the model that gives the tokenizer."""
    notes: tuple[str, ...]
    """Notes for the user."""


def map_models(
    recipe: Recipe,
    sources: Sequence[Source],
    config: Mapping[str, Any],
    config_folder: Path,
    subfolder: str,
    config_name: str,
    max_memory: int | None,
) -> MappedModels:
    """Map the rows of a recipe's models to the vocabulary that it asks for.

    `config` is the output's config.json, from `subfolder` of the model in `config_folder`. Raises
    `ShardmixError` if a vocabulary is not clear, does not fit its rows, or cannot be united.
    """
    asked = recipe.tokenizer
    assert asked is not None
    _refuse_other_embeddings(sources)
    _refuse_ambiguous(recipe, sources)
    tensors = token_tensors(sources)
    models = [
        read_model_tokens(TokenizerFolder(source.text, source.folder), max_memory=max_memory)
        for source in sources
    ]
    for source, tokens, its in zip(sources, models, tensors, strict=True):
        _refuse_beyond(source, tokens, its)
    names = recipe.sources
    preferred = names.index(recipe.base_model) if recipe.base_model is not None else None
    if asked.base is not None:
        preferred = names.index(asked.base)
    output = output_tokens(models, asked, names, preferred or 0, max_memory)
    sizes = [its.num_rows for its in tensors]
    maps = row_maps(output, models, sizes, asked, names, preferred)
    number_of = _Ids(output, maps.filled[0].num_rows)
    mapped = [
        _mapped(sources, model, maps, its, number_of, tokens)
        for model, (its, tokens) in enumerate(zip(tensors, models, strict=True))
    ]
    own_folder = config_folder / subfolder
    like = [model for model, source in enumerate(sources) if source.folder == own_folder]
    notes = [summary(output, maps, models)]
    if like:
        ids: ModelTokens | None = models[like[0]]
        keys, size = tensors[like[0]].keys, sizes[like[0]]
    else:
        ids = _tokens_beside(own_folder, config_name, notes, max_memory)
        keys, size = tensors[0].keys, None
    changed, lost = number_of.config(config, ids, keys, size)
    configs = []
    for name in (CONFIG_NAME, GENERATION_NAME):
        if not os.path.lexists(own_folder / name):
            continue
        content = read_json(own_folder / name)
        if name == CONFIG_NAME:
            other, _ = number_of.config(content, ids, keys, size)
        else:
            other, more = number_of.ids(content, ids)
            lost += more
        if other != content:
            configs.append((inner_path(subfolder, name), json.dumps(other)))
    notes += _lost_notes(lost, config_name)
    giver = sources[output.giver]
    notes += _settings_notes(models, output.giver)
    notes += _special_notes(changed, mapped[output.giver].config, config_name, giver.text)
    give_back_free_memory()
    files = _tokenizer_files(giver)
    return MappedModels(
        sources=tuple(mapped),
        config=changed,
        vocabulary=OutputVocabulary(
            giver=giver.public_name,
            num_rows=number_of.num_rows,
            num_tokens=len(output.ids),
            files=files,
            digests=tuple((name, _digest(giver.folder / name)) for name in files),
            splices=tuple(_splices(giver.folder, files, output)),
            configs=tuple(configs),
        ),
        folder=giver.folder,
        notes=tuple(notes),
    )


def _refuse_other_embeddings(sources: Sequence[Source]) -> None:
    for source in sources:
        for part in source.others:
            for name in part.tensors.names:
                if has_vocabulary_axis(name):
                    raise SourceError(
                        f"its module {part.subfolder} has rows for tokens of its own ({name}), and "
                        "only those of the model itself are mapped",
                        subject=source.text,
                        remedy="merge models with one vocabulary, or without such a module",
                    )


def _refuse_ambiguous(recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise `MismatchError` if the recipe could not be told from another by public names."""
    asked = recipe.tokenizer
    assert asked is not None
    named = {asked.source, asked.base, *(row.model for row in asked.tokens)}
    by_name: dict[str, str] = {}
    for text, source in zip(recipe.sources, sources, strict=True):
        other = by_name.setdefault(source.public_name, text)
        if other != text and named & {text, other}:
            raise MismatchError(
                f"two models are called {source.public_name}, so that the output's recipe could "
                "not say whose tokenizer or row it means",
                subject=text,
                remedy="rename its folder",
            )


def _refuse_beyond(source: Source, tokens: ModelTokens, its: TokenTensors) -> None:
    if tokens.last_id >= its.num_rows:
        raise MismatchError(
            f"its tokenizer has ids up to {tokens.last_id}, but its embedding only {its.num_rows} "
            "rows",
            subject=source.text,
            remedy="give it the tokenizer that it was trained with, or resize the embedding",
        )


class _Ids:
    """The ids of the output."""

    def __init__(self, output: OutputTokens, num_rows: int) -> None:
        self._output = output
        self.num_rows = num_rows
        order = np.argsort(output.hashes, kind="stable")
        self._hashes, self._ids = output.hashes[order], output.ids[order]

    def config(
        self,
        config: Mapping[str, Any],
        tokens: ModelTokens | None,
        keys: Sequence[str],
        size: int | None,
    ) -> tuple[dict[str, Any], list[LostId]]:
        """Return a model's config with the output's ids and number of rows, and the ids lost.

        `keys` count its rows, which are `size`.
        """
        changed, lost = self.ids(config, tokens)
        counted = [key for key in keys if stated_size(changed, key) != self.num_rows]
        return with_sizes(changed, counted, size, self.num_rows), lost

    def ids(
        self, content: Mapping[str, Any], tokens: ModelTokens | None
    ) -> tuple[dict[str, Any], list[LostId]]:
        """Return a config with the output's ids in place of a model's, and the ids lost."""
        if tokens is None or tokens is self._output.tokens:
            return dict(content), []
        own, known = tokens.all, self._output.ids

        def new_id(number: int) -> int | None:
            at = int(own.ids.searchsorted(number))
            if at == len(own.ids) or int(own.ids[at]) != number:
                # Padding, which may be named before a token is put there.
                is_free = number < self.num_rows and not (known == number).any()
                return number if is_free else None
            found = int(self._hashes.searchsorted(own.hashes[at]))
            is_there = found < len(self._hashes) and self._hashes[found] == own.hashes[at]
            return int(self._ids[found]) if is_there else None

        return with_ids(content, new_id)


def _mapped(
    sources: Sequence[Source],
    model: int,
    maps: RowMaps,
    its: TokenTensors,
    ids: _Ids,
    tokens: ModelTokens,
) -> Source:
    source, runs = sources[model], maps.filled[model]
    config, _ = ids.config(source.config, tokens, its.keys, its.num_rows)
    tensors = () if runs.is_identity(model, its.num_rows) else its.tensors
    if (runs.givers != model).any():
        tensors += its.shared
    mapped = MappedRowsSource(sources, model, maps, tensors, config)
    for tensor in tensors:
        for giver in mapped.givers:
            if tensor.givers[giver] is None:
                raise MismatchError(
                    f"{tensor.name} of {source.text} needs rows of "
                    f"{sources[giver].text}, which has no such tensor",
                    remedy="merge models of one architecture",
                )
    return mapped


def _tokens_beside(
    folder: Path, name: str, notes: list[str], max_memory: int | None
) -> ModelTokens | None:
    """Return the tokens of the model that gives the config; None if it has no clear tokenizer."""
    try:
        return read_model_tokens(TokenizerFolder(name, folder), max_memory=max_memory)
    except SourceError as error:
        notes.append(f"{error}; the special tokens' ids in its config.json stay as they are")
        return None


def _lost_notes(lost: Sequence[LostId], name: str) -> list[str]:
    if not lost:
        return []
    words = listed([f"{each.key} {each.id}" for each in lost])
    return [
        f"config of {name}: names ids whose tokens the output does not have ({words}); they are "
        "left out: set them anew, or name another model with --config-from"
    ]


def _settings_notes(models: Sequence[ModelTokens], giver: int) -> Iterator[str]:
    """Yield a note for each model whose tokenizer has other settings than the output's."""
    own = models[giver]
    for other in models:
        told = [] if other is own else differing_settings(own.files, other.files)
        if told:
            yield (
                f"tokenizer: settings differ: {', '.join(told)}; the output takes those of "
                f"{own.name}"
            )


def _special_notes(
    config: Mapping[str, Any], of_giver: Mapping[str, Any], name: str, giver: str
) -> Iterator[str]:
    """Yield a note for each special token that the model of the tokenizer has otherwise."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own, other = config.get(key), of_giver.get(key)
        if None not in (own, other) and own != other:
            yield (
                f"{key} is {own}, as {name} has it, whose config the output takes; as {giver} has "
                f"it, whose tokenizer the output takes, it is {other}: see which one is meant"
            )


def _tokenizer_files(giver: Source) -> tuple[str, ...]:
    found = find_auxiliary_files(
        giver.folder,
        weights=giver.weight_names if not giver.subfolder else (),
        is_single_file=giver.is_single_file,
    )
    return tuple(name for name in found.files if is_tokenizer_file(name))


def _splices(folder: Path, files: Sequence[str], output: OutputTokens) -> Iterator[Splice]:
    """Yield what gives the tokenizer's files the output's further tokens."""
    if not (output.added or output.entries):
        return
    entries: dict[str, int] = {}
    if output.entries:
        its = output.tokens
        own = set(its.own.hashes.tolist())
        added = (*its.added, *output.added)
        entries = {
            each.content: each.id for each in added if hash(each.content.encode()) not in own
        }
        entries |= {text: number for number, text in output.entries}
    for name in files:
        if name in EDITED_NAMES:
            content = _content(folder / name)
            yield from splices(name, content, output.added, entries)


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(_content(path))


def _content(path: Path) -> bytes:
    try:
        return read_regular(path, max_nbytes=_MAX_TOKENIZER_NBYTES)
    except OSError as error:
        raise unreadable(path, error) from None
