"""Whether models belong together: their configs, tokenizers and modules, beside their tensors.

Puts the single checks together. Reads small files; no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmix.checkpoint import Checkpoint
from shardmix.config_differences import NamedConfig, config_differences
from shardmix.differences import Difference, settle
from shardmix.module_differences import module_differences
from shardmix.naming import input_embedding
from shardmix.recipe import Recipe
from shardmix.tokenizer_differences import TokenizerFolder, tokenizer_differences


@dataclass(frozen=True, slots=True)
class Member:
    """A model of the merge: one that is averaged, or gives the files beside the weights."""

    name: str
    """What its user calls it."""
    folder: Path
    """Its folder."""
    config: dict[str, object]
    """Content of its config.json."""


def check_belong_together(
    checkpoints: Sequence[Checkpoint],
    recipe: Recipe,
    *,
    base_folder: Path,
    base_config: dict[str, object],
    max_memory: int | None = None,
) -> tuple[str, ...]:
    """Return what to know of the ways in which models differ that have the same tensors.

    `base_folder` and `base_config` are of the model that gives the output its config and tokenizer;
    `max_memory` (bytes) bounds what the process may take. Raises `MismatchError` if they differ in
    what nobody can have meant to average over.
    """
    members = [
        Member(checkpoint.source, checkpoint.folder, checkpoint.config)
        for checkpoint in checkpoints
    ]
    output = 0
    if recipe.base is not None:
        members.append(Member(recipe.base, base_folder, base_config))
        output = len(members) - 1
    found = _differences(members, output, checkpoints, max_memory)
    return settle(found, recipe.allow_differences)


def _differences(
    members: Sequence[Member],
    output: int,
    checkpoints: Sequence[Checkpoint],
    max_memory: int | None,
) -> list[Difference]:
    configs = [NamedConfig(member.name, member.config) for member in members]
    folders = [TokenizerFolder(member.name, member.folder) for member in members]
    return [
        *module_differences(checkpoints),
        *config_differences(configs, output=output),
        *tokenizer_differences(
            folders, output=output, num_rows=_num_rows(checkpoints[0]), max_memory=max_memory
        ),
    ]


def _num_rows(checkpoint: Checkpoint) -> int | None:
    """Return how many rows the input embedding has, or None if none is known by its name."""
    table = checkpoint.table
    embedding = input_embedding([name for name in table.names if "emb" in name or "wte" in name])
    if embedding is None:
        return None
    shape = table.shapes[table.names.index(embedding)]
    return shape[0] if shape else None
