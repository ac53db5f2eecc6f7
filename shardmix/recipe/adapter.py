"""A recipe whose output is a LoRA adapter: its base model, and the bounds of its rank."""

from dataclasses import replace

from shardmix.conventions.adapters import MOST_RANK, parts_of
from shardmix.errors import RecipeError, listed
from shardmix.methods import task_arithmetic
from shardmix.recipe.recipe import Recipe

_WITHOUT_EFFECT = (
    *("quantize", "config_from", "max_shard_size", "model_type", "pooling", "tokenizer"),
)


def with_common_base(recipe: Recipe) -> Recipe:
    """Return a recipe for an adapter with its base model; without one, that of all its adapters.

    Raises `RecipeError` if they name several.
    """
    if not recipe.as_adapter or recipe.base_model is not None:
        return recipe
    bases = list(dict.fromkeys(parts_of(source)[0] for source in recipe.sources))
    if len(bases) != 1:
        raise RecipeError(
            f"are adapters on {len(bases)} models ({listed(bases)}); one adapter changes one model",
            subject="models",
            remedy="give each with the same base, as BASE+ADAPTER, or name it with --base-model",
        )
    return replace(recipe, base_model=bases[0])


def check_adapter(recipe: Recipe) -> None:
    """Raise `RecipeError` if a recipe asks for an adapter's rank in vain, or for one that is
    impossible."""
    rank, energy = recipe.rank, recipe.energy
    if not recipe.as_adapter:
        others = ("rank", rank), ("energy", energy), ("skip_others", recipe.skip_others or None)
        for name, value in others:
            if value is not None:
                raise RecipeError(
                    "is for adapters", subject=name, remedy="add --as-adapter (as_adapter=True)"
                )
        return
    if recipe.merge_method != task_arithmetic.NAME:
        raise RecipeError(
            f"cannot write the result of {recipe.merge_method}; what an adapter holds is a sum of "
            "changes to a base model",
            subject="as_adapter",
            remedy=f"use --method {task_arithmetic.NAME}, or leave --method out",
        )
    for key in _WITHOUT_EFFECT:
        if getattr(recipe, key) is not None:
            raise RecipeError(
                "has no effect on an adapter, which is one file and its config",
                subject=key,
                remedy="leave it out",
            )
    is_whole = isinstance(rank, int) and not isinstance(rank, bool)
    if rank is not None and not (is_whole and 1 <= rank <= MOST_RANK):
        raise RecipeError(f"must be a whole number from 1 to {MOST_RANK}", subject=f"rank {rank!r}")
    if energy is None:
        return
    is_number = isinstance(energy, int | float) and not isinstance(energy, bool)
    if not (is_number and 0 < energy <= 1):
        raise RecipeError("must be above 0 and at most 1", subject=f"energy {energy!r}")
    if rank is None:
        raise RecipeError(
            "chooses the least rank up to a largest one", subject="energy", remedy="give --rank"
        )
