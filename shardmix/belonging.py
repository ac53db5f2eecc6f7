"""Whether models belong together: their configs, tokenizers and modules, beside their tensors.

Puts the single checks together. Reads small files; no weights.
"""

from collections.abc import Sequence

from shardmix.checkpoint import Checkpoint
from shardmix.differences import Difference, settle
from shardmix.module_differences import module_differences
from shardmix.recipe import Recipe


def check_belong_together(checkpoints: Sequence[Checkpoint], recipe: Recipe) -> tuple[str, ...]:
    """Return what to know of the ways in which models differ that have the same tensors.

    Raises `MismatchError` if they differ in what nobody can have meant to average over.
    """
    return settle(_differences(checkpoints), recipe.allow_differences)


def _differences(checkpoints: Sequence[Checkpoint]) -> list[Difference]:
    return [*module_differences(checkpoints)]
