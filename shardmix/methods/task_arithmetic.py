"""Task arithmetic: the changes of models to a base model, added up and put on the base."""

from collections.abc import Sequence
from typing import ClassVar

from shardmix.methods.base import (
    Needs,
    Parameter,
    Params,
    WeightedModels,
    check_weights,
    effective_weights,
    weighted_sum,
)
from shardmix.methods.ops import A, Ops

NAME = "task_arithmetic"


class TaskArithmetic(WeightedModels):
    """out = base + lambda · Σ weightᵢ · (modelᵢ - base), divided by Σ weightᵢ if `normalize`."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "the base model plus a weighted sum of what each model changed in it"
    reference: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("weight", float, "the share of the model's changes", by_model=True),
        Parameter("normalize", bool, "divide by the sum of the weights", default=False),
        Parameter("lambda", float, "scales the sum of all changes", default=1.0),
    )
    is_weighted_sum: ClassVar[bool] = False
    takes_changes: ClassVar[bool] = True
    is_copy: ClassVar[bool] = False

    def check(self, params: Params) -> None:
        """Raise `RecipeError` if the weights cannot be normalised, or are infinite with lambda."""
        check_weights(params, "weight · lambda", scale=params.number("lambda"))

    def needs(self, params: Params) -> Needs:
        """Return the need for a base model."""
        return Needs(base_model=True)

    def weights(self, params: Params) -> tuple[float, ...]:
        """Return what each model's changes are multiplied with."""
        return effective_weights(params, scale=params.number("lambda"))

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return the base plus the sum of changes, in the models' order."""
        base, *changes = values
        total = weighted_sum(ops, changes, factors)
        return base if total is None else ops.add(base, total)
