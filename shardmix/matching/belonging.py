"""The check that models belong together: configs, tokenizers and modules, besides tensors.

Puts the single checks together. Reads small files; no weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardmix.conventions.naming import SCALE_KEY, TIE_KEY, declared_quantisation, input_embedding
from shardmix.matching.config_fit import config_misfits
from shardmix.matching.configs import NamedConfig, config_differences
from shardmix.matching.differences import Difference, settle
from shardmix.matching.preprocessors import preprocessor_differences
from shardmix.matching.tensors import QUANTISATION
from shardmix.matching.tokenizers import TokenizerFolder, tokenizer_differences
from shardmix.recipe import Recipe
from shardmix.sources.base import Source

if TYPE_CHECKING:
    from shardmix.matching.modules import ModularModel

_WOULD_NOT_LOAD = "the output would not load"


@dataclass(frozen=True, slots=True)
class PartConfig:
    """The model that gives the output, or one of its modules, the files beside the weights."""

    name: str | None
    """The user's name for it; None for the first model."""
    folder: Path
    """Its folder."""
    config: Mapping[str, Any]
    """Content of its config.json."""


def check_belong_together(
    sources: Sequence[Source],
    groups: Sequence[Sequence[Source]],
    recipe: Recipe,
    *,
    config_sources: Sequence[PartConfig],
    modular_config_source: "ModularModel | None" = None,
    max_memory: int | None = None,
) -> tuple[str, ...]:
    """Return warnings for the differences between models that have the same tensors.

    `groups` are the parts of the models that are merged with one another, the models themselves
    first. `config_sources` give each its config and tokenizer, and `modular_config_source` the
    modules if no model does. `max_memory` (bytes) bounds the process. Raises `MismatchError` for a
    difference over which no average makes sense.
    """
    found = _module_differences(sources, modular_config_source, recipe.pooling)
    for number, (group, config_source) in enumerate(zip(groups, config_sources, strict=True)):
        if number == 0 or any("model_type" in part.config for part in group):
            found += _quantisations(group, config_source)
            misfits = list(_misfits(group[0], config_source))
            told = {misfit.key for misfit in misfits if misfit.is_refused}
            found += misfits
            found += [
                other
                for other in _config_differences(group, config_source)
                if other.key not in told
            ]
            found += _scale_differences(group, config_source)
        if number or recipe.tokenizer is None:  # otherwise rows are mapped by token
            found += _tokenizer_differences(group, config_source, max_memory)
        found += _preprocessor_differences(group, config_source)
    return settle(found, recipe.allow_differences)


def _module_differences(
    sources: Sequence[Source], config_source: "ModularModel | None", pooling: str | None
) -> list[Difference]:
    if config_source is None and not any(each.modules or len(each.parts) > 1 for each in sources):
        return []
    # Imported here: models without modules need none of it.
    from shardmix.matching.modules import module_differences

    return list(module_differences(sources, config_source, pooling))


def _quantisations(group: Sequence[Source], config_source: PartConfig) -> Iterator[Difference]:
    """Find configs that declare a quantisation; an earlier check found that no weight has one."""
    configs = [(part.text, part.config) for part in group]
    configs += (
        [(config_source.name, config_source.config)] if config_source.name is not None else []
    )
    giver = group[0].text if config_source.name is None else config_source.name
    for name, config in configs:
        declared = declared_quantisation(config)
        if declared is not None:
            yield Difference(
                QUANTISATION,
                f"config.json of {name} says that the model is quantised ({declared[1]}, in "
                f"{declared[0]}), but no weight of the merge is",
                "it is left out of the output" if name == giver else "",
                is_refused=True,
                rule=_WOULD_NOT_LOAD,
                remedy="remove the key from that config.json",
            )


def _misfits(first: Source, config_source: PartConfig) -> Iterator[Difference]:
    """Find statements of the output's config that its tensors contradict."""
    config, name, way = (
        config_source.config,
        config_source.name,
        "name another model with --config-from",
    )
    if name is None:
        config, name, way = first.config, first.text, "correct it there, or use --config-from"
    for misfit in config_misfits(config, first.tensors.names, first.tensors.shapes):
        yield Difference(
            misfit.key,
            f"config.json of {name} is not of these tensors: {misfit.finding}",
            "the output has that config all the same",
            is_refused=misfit.is_certain,
            rule=_WOULD_NOT_LOAD,
            remedy=way,
        )


def _config_differences(group: Sequence[Source], config_source: PartConfig) -> list[Difference]:
    configs = [NamedConfig(part.text, part.config) for part in group]
    if config_source.name is None:
        return config_differences(configs)
    return config_differences(
        [*configs, NamedConfig(config_source.name, config_source.config)], output=len(group)
    )


def _scale_differences(group: Sequence[Source], config_source: PartConfig) -> Iterator[Difference]:
    """Find models whose config scales the input of the output head while the output's does not."""
    configs = [(part.text, part.config) for part in group]
    name, config = (
        configs[0] if config_source.name is None else (config_source.name, config_source.config)
    )
    said = {
        (str(each.get(TIE_KEY)), str(each.get(SCALE_KEY)))
        for each in (config, *dict(configs).values())
    }
    if len(said) == 1:
        return
    from shardmix.conventions.declarations import (  # few merges need them
        declaration_of,
        scales_output,
    )

    scale = declaration_of(config).scale
    if not scale:
        return
    wanted = scales_output(scale, config)
    for other, theirs in configs:
        if declaration_of(theirs).scale == scale and scales_output(scale, theirs) != wanted:
            yield Difference(
                TIE_KEY,
                f"{TIE_KEY} and {SCALE_KEY}: what the output head reads is "
                f"{'scaled' if wanted else 'not scaled'} by the config of {name}, but "
                f"{'not scaled' if wanted else 'scaled'} by that of {other}",
                f"in the output it is {'scaled' if wanted else 'not scaled'}",
                is_refused=True,
                other_keys=(SCALE_KEY,),
            )


def _tokenizer_differences(
    group: Sequence[Source], config_source: PartConfig, max_memory: int | None
) -> list[Difference]:
    folders = [TokenizerFolder(part.text, part.folder) for part in group]
    output = 0
    if config_source.name is not None:
        folders.append(TokenizerFolder(config_source.name, config_source.folder))
        output = len(group)
    return tokenizer_differences(
        folders, output=output, num_rows=_num_rows(group[0]), max_memory=max_memory
    )


def _preprocessor_differences(
    group: Sequence[Source], config_source: PartConfig
) -> list[Difference]:
    folders = [(part.text, part.folder) for part in group]
    if config_source.name is not None:
        folders.append((config_source.name, config_source.folder))
    return preprocessor_differences(folders, output=0 if config_source.name is None else len(group))


def _num_rows(source: Source) -> int | None:
    """Return the number of rows of the input embedding, or None if no name reveals it."""
    table = source.tensors
    embedding = input_embedding([name for name in table.names if "emb" in name or "wte" in name])
    if embedding is None:
        return None
    shape = table.shapes[table.names.index(embedding)]
    return shape[0] if shape else None
