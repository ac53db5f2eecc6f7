"""Opens a recipe's models, and the source of the output's config.

Reads headers and small files; checks each model by itself.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.model_types import contradiction, fitting_types
from shardmix.conventions.module_tree import Module, read_modules
from shardmix.conventions.sentence_modules import MODULES_NAME
from shardmix.conventions.weight_names import SUFFIX
from shardmix.errors import RecipeError, unreadable
from shardmix.matching.tensors import check_mergeable
from shardmix.recipe import Recipe
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import (
    main_subfolder,
    read_config,
)
from shardmix.sources.resolve import ResolvedSource, model_folder, open_sources

if TYPE_CHECKING:
    from shardmix.plan.output_vocabulary import MappedModels


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """The model that gives the output its config, tokenizer and other auxiliary files."""

    name: str
    """Its name in the model card."""
    folder: Path
    """Its folder."""
    config: Mapping[str, Any]
    """Content of its config.json; empty if it has none."""
    commit: str | None
    """Commit, if it came from the Hub."""
    weights: tuple[str, ...] = ()
    """Its weight files, by path within the folder: they are no auxiliary files."""
    is_named: bool = False
    """True if the recipe names it; otherwise it is the first model."""
    is_single_file: bool = False
    """True if it was named as a file, so that other files in its folder may be anybody's."""
    left_out: tuple[LeftOut, ...] = ()
    """Files of its repository on the Hub that were not fetched."""
    modules: tuple[Module, ...] = ()
    """Its sentence-transformers modules."""
    main_subfolder: str = ""
    """Folder of config and main weights in it: "" or the folder of one of these modules."""


@contextmanager
def disk_errors_named() -> Iterator[None]:
    """Turn an error that no check foresaw, such as a folder without permission, into a clear
    one."""
    try:
        yield
    except OSError as error:
        raise unreadable(error.filename or "a file", error) from None


def _paths(source: Source) -> list[Path]:
    """Return the paths of a source on the disk: its folders, and files that may be links."""
    files = [Path(file.path) for part in source.parts for file in part.identity.files]
    adapters = [Path(adapter.path) for adapter in source.identity.adapters]
    return [*adapters, *files] if source.is_single_file else [source.root, *adapters, *files]


def _check_model_type(*, model_type: str | None, config_source: ConfigSource) -> None:
    """Raise `RecipeError` if the output's config contradicts the named model type."""
    if model_type is None:
        return
    has_modules = os.path.lexists(config_source.folder / MODULES_NAME)
    finding = contradiction(config_source.config, model_type, has_modules=has_modules)
    if finding is not None:
        fitting = " or ".join(fitting_types(config_source.config))
        raise RecipeError(
            f"the config of {config_source.name} says {finding}",
            subject=f"model type {model_type!r}",
            remedy=f"leave --model-type out{f', or name what it is: {fitting}' if fitting else ''}",
        )


def _open_config_source(resolved: ResolvedSource | None, sources: Sequence[Source]) -> ConfigSource:
    if resolved is None:
        first = sources[0]
        name = first.public_name
        return ConfigSource(
            name,
            first.root,
            first.config,
            first.identity.commit,
            weights=first.weight_names,
            is_single_file=first.is_single_file,
            left_out=first.left_out,
            # Of a single file nothing else is merged; a check reports it if that is not enough.
            modules=read_modules(first.root) if first.is_single_file else first.modules,
            main_subfolder=first.subfolder,
        )
    located = resolved.fetch(with_weights=False)
    is_single_file = not located.path.is_dir()
    found = model_folder(located)
    folder = found.path
    name = resolved.text if located.hub_id is not None else folder.resolve().name
    modules = () if is_single_file else read_modules(folder)
    subfolder = main_subfolder(folder, modules)
    # The config of a model of the merge is true of its tensors, which may have been decoded.
    opened = [source.config for source in sources if source.folder == folder / subfolder]
    return ConfigSource(
        name,
        folder,
        opened[0] if opened else read_config(folder / subfolder),
        located.commit,
        is_named=True,
        weights=found.weights,
        is_single_file=is_single_file,
        left_out=located.left_out,
        modules=modules,
        main_subfolder=subfolder,
    )


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """The opened models of a recipe, and the source of the output's config."""

    sources: tuple[Source, ...]
    """The models, in the recipe's order."""
    config_source: ConfigSource
    """Source of config, tokenizer and other auxiliary files."""
    mapped: "MappedModels | None" = None
    """The models with their rows mapped to one vocabulary, if the recipe asks for one."""

    def check_untouched(self) -> None:
        """Raise `SourceChangedError` if a model may be another than was opened."""
        for source in self.sources:
            source.check_unchanged()
            for part in source.parts:
                part.identity.check_untouched()

    @property
    def paths(self) -> tuple[Path, ...]:
        """All folders and files that belong to them: no output may be put there."""
        paths = [path for source in self.sources for path in _paths(source)]
        named = [self.config_source.folder] if self.config_source.is_named else []
        return (*paths, *named)


def _without_tied_copies(source: Source) -> Source:
    """Leave out the second names of tied parameters; in safetensors each has bytes of its own."""
    if all(file.name.endswith(SUFFIX) for file in source.identity.files):
        return source
    # Imported here: few models need it.
    from shardmix.matching.tied_copies import without_tied_copies

    return without_tied_copies(source)


def open_models(
    recipe: Recipe, resolved: Mapping[str, ResolvedSource], *, max_memory: int | None
) -> OpenedModels:
    """Open every model of a recipe and the source of its config; `resolved` has their texts.

    Raises `SourceError` if one cannot be read, `MismatchError` if one cannot be merged at all,
    `RecipeError` if the recipe's model type contradicts the config, `BudgetError` if headers might
    take the process beyond `max_memory` (bytes).
    """
    sources = []
    models = (resolved[text] for text in recipe.sources)
    for source in open_sources(models, max_memory=max_memory):
        for part in source.parts:
            check_mergeable(part, recipe.allow_differences)
        sources.append(_without_tied_copies(source))
    named = None if recipe.config_from is None else resolved[recipe.config_from]
    config_source = _open_config_source(named, sources)
    _check_model_type(model_type=recipe.model_type, config_source=config_source)
    mapped = None
    if recipe.tokenizer is not None:
        # Imported here: most merges need none of it.
        from shardmix.plan.output_vocabulary import map_models

        mapped = map_models(
            recipe,
            sources,
            config_source.config,
            config_source.folder,
            config_source.main_subfolder,
            config_source.name,
            max_memory,
        )
    return OpenedModels(tuple(sources), config_source, mapped)
