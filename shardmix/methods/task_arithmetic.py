"""Task arithmetic: the changes of models to a base model, added up and put on the base."""

import math
from collections.abc import Sequence
from typing import ClassVar

from shardmix.methods.base import (
    Needs,
    Parameter,
    Params,
    nonzero,
    refuse_zero_sum,
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

    def check(self, params: Params) -> None:
        """Raise `RecipeError` if the weights cannot be normalised."""
        if params.shared["normalize"]:
            refuse_zero_sum(math.fsum(params.numbers("weight")), "weights")

    def needs(self, params: Params) -> Needs:
        """Return the need for a base model."""
        return Needs(base_model=True)

    def contributors(self, params: Params, *, is_wide: bool) -> tuple[int, ...]:
        """Return the models whose changes count."""
        return nonzero(self.factors(params, ()), is_wide=is_wide)

    def factors(self, params: Params, statistics: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Return the factor of each model's changes."""
        weights, scale = params.numbers("weight"), params.number("lambda")
        if params.shared["normalize"]:
            total = math.fsum(weights)
            return tuple(scale * weight / total for weight in weights)
        return tuple(scale * weight for weight in weights)

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return the base plus the sum of changes, in the models' order."""
        changes = sum_of_deltas(ops, values, factors)
        return values[0] if changes is None else ops.add(values[0], changes)
