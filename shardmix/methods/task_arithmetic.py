"""Task arithmetic: the changes of models to a base model, added up and put on the base."""

from collections.abc import Sequence
from typing import ClassVar

from shardmix.methods.base import (
    Needs,
    Parameter,
    Params,
    check_weights,
    effective_weights,
    nonzero,
    sum_of_deltas,
)
from shardmix.methods.ops import A, Ops


class TaskArithmetic:
    """out = base + lambda · Σ weightᵢ · (modelᵢ - base), divided by Σ weightᵢ if `normalize`."""

    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "the base model plus a weighted sum of what each model changed in it"
    reference: ClassVar[str] = "https://arxiv.org/abs/2212.04089"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("weight", float, "the share of the model's changes", by_model=True),
        Parameter("normalize", bool, "divide by the sum of the weights", default=False),
        Parameter("lambda", float, "scales the sum of all changes", default=1.0),
    )
    num_factors: ClassVar[int | None] = None
    is_weighted_sum: ClassVar[bool] = False

    def check(self, params: Params) -> None:
        """Raise `RecipeError` if the weights cannot be normalised, or are infinite with lambda."""
        check_weights(params, "weight · lambda", scale=params.number("lambda"))

    def needs(self, params: Params) -> Needs:
        """Return the need for a base model."""
        return Needs(base_model=True)

    def contributors(self, params: Params, *, is_wide: bool) -> tuple[int, ...]:
        """Return the models whose changes count."""
        return nonzero(_scales(params), is_wide=is_wide)

    def factors(
        self, params: Params, models: Sequence[int], statistics: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Return what each model's changes are multiplied with."""
        scales = _scales(params)
        return tuple(scales[model] for model in models)

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return the base plus the sum of changes, in the models' order."""
        changes = sum_of_deltas(ops, values, factors)
        return values[0] if changes is None else ops.add(values[0], changes)


def _scales(params: Params) -> tuple[float, ...]:
    return effective_weights(params, scale=params.number("lambda"))
