"""An output's sentence-transformers modules: their model, their folders, and their pooling.

Decides, and reads small files; writes nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmix.conventions.model_types import ENCODER
from shardmix.conventions.module_tree import Module, inner_path
from shardmix.conventions.sentence_modules import (
    MODEL_CONFIG_NAME,
    MODULES_NAME,
    TRANSFORMER_CONFIG_NAMES,
    pooling_modes,
)
from shardmix.matching.parts import MatchedParts
from shardmix.plan.merge_plan import OutputModules
from shardmix.recipe import Recipe
from shardmix.sources.auxiliary_files import find_auxiliary_files
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import CONFIG_NAME, read_config


@dataclass(frozen=True, slots=True)
class PlannedModules:
    """An output's modules."""

    modules: tuple[Module, ...]
    """All modules; empty for a bare model, and for one that gets an encoder's default modules."""
    subfolders: dict[str, str]
    """Key of a module (`Module.key`) → its folder within the output."""
    folder: Path | None
    """The model that gives them, if it is not the one that gives config and tokenizer."""
    output: OutputModules
    """The files to write for them."""
    notes: tuple[str, ...]
    """Notes for the user."""


def plan_modules(
    recipe: Recipe,
    sources: Sequence[Source],
    matched: MatchedParts,
    config_folder: Path,
    own_modules: tuple[Module, ...],
) -> PlannedModules:
    """Decide on the modules of an output with config and tokenizer from `config_folder`.

    They are that folder's own. If it has none, and the output may be an encoder, they are those of
    the first model that has some: an encoder must pool as all known models of the merge do.
    """
    may_embed = recipe.model_type in (None, ENCODER)
    giver = None
    if not own_modules and may_embed and os.path.lexists(config_folder / CONFIG_NAME):
        unmatched = {id(part) for part in matched.unmatched}
        giver = next(
            (
                each
                for each in sources
                if each.modules and not any(id(part) in unmatched for part in each.parts)
            ),
            None,
        )
    if giver is None:
        files: tuple[str, ...] = ()
        folder, modules, main_subfolder = config_folder, own_modules, ""
        notes: list[str] = []
    else:
        files = _module_files(giver, config_folder)
        folder, modules, main_subfolder = giver.root, giver.modules, giver.subfolder
        notes = [
            f"{MODULES_NAME}: the output takes {giver.text}'s modules{_pooled(giver)}, since the "
            "model that gives it config and tokenizer has none"
        ]
    configs, pooling_notes = _pooling_configs(recipe, folder, modules)
    if may_embed:
        notes += pooling_notes
    return PlannedModules(
        modules=modules,
        subfolders={module.key: module.subfolder for module in modules},
        folder=None if giver is None else folder,
        output=OutputModules(
            files=files,
            main_subfolder=main_subfolder,
            pooling=recipe.pooling,
            pooling_configs=configs,
        ),
        notes=tuple(notes),
    )


def _module_files(giver: Source, config_folder: Path) -> tuple[str, ...]:
    """Return the files that make a model's modules, except those of its encoder itself."""
    root_files = {MODULES_NAME, MODEL_CONFIG_NAME}
    main = f"{giver.subfolder}/" if giver.subfolder else ""
    root_files |= {
        main + name
        for name in TRANSFORMER_CONFIG_NAMES
        if not os.path.lexists(config_folder / name)
    }
    folders = tuple(
        f"{module.subfolder}/"
        for module in giver.modules
        if module.subfolder not in ("", giver.subfolder)
    )
    auxiliary_files = find_auxiliary_files(giver.root, weights=giver.weight_names)
    return tuple(
        name for name in auxiliary_files.files if name in root_files or name.startswith(folders)
    )


def _pooled(giver: Source) -> str:
    """Describe the pooling of a model's modules; "" if there is none, or more than one."""
    subfolders = [module.subfolder for module in giver.modules if module.kind == "Pooling"]
    if len(subfolders) != 1:
        return ""
    return f" (pooling by {_joined(_modes(giver.root, subfolders[0]))})"


def _pooling_configs(
    recipe: Recipe, folder: Path, modules: Sequence[Module]
) -> tuple[tuple[str, ...], list[str]]:
    """Return the configs whose pooling the user's overrides, and notes for the user."""
    asked = recipe.pooling
    if asked is None:
        return (), []
    if not modules:
        if recipe.model_type == ENCODER:
            return (), []
        return (), ["--pooling: is for encoders: with --model-type encoder the output pools so"]
    changed, notes = [], []
    subfolders = [module.subfolder for module in modules if module.kind == "Pooling"]
    for subfolder in subfolders:
        own = _modes(folder, subfolder)
        if own != (asked,):
            name = inner_path(subfolder, CONFIG_NAME)
            changed.append(name)
            notes.append(
                f"{name}: pools by {_joined(own)}, and --pooling {asked} was given: the output "
                f"pools by {asked}"
            )
    if not subfolders:
        notes.append("--pooling: changes nothing, since the model's modules have no Pooling")
    return tuple(changed), notes


def _modes(folder: Path, subfolder: str) -> tuple[str, ...]:
    return pooling_modes(read_config(folder / subfolder))


def _joined(modes: Sequence[str]) -> str:
    return " and ".join(modes)
