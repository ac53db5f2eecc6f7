"""The weighted sum: model soups, LM-Cocktail, averages."""

from collections.abc import Sequence
from typing import ClassVar

from shardmix.errors import RecipeError
from shardmix.methods.base import Needs, Parameter, Params, WeightedModels, check_weights
from shardmix.methods.ops import A, Ops

NAME = "linear"


class Linear(WeightedModels):
    """out = Σ weightᵢ · modelᵢ, divided by Σ weightᵢ if `normalize` is true."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "weighted sum of all models"
    reference: ClassVar[str] = "https://arxiv.org/abs/2203.05482"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("weight", float, "the model's share in the sum", by_model=True),
        Parameter("normalize", bool, "divide by the sum of the weights", default=True),
    )
    is_weighted_sum: ClassVar[bool] = True
    takes_changes: ClassVar[bool] = False
    is_copy: ClassVar[bool] = False

    def check(self, params: Params) -> None:
        """Raise `RecipeError` if the weights leave nothing of any model or cannot be normalised."""
        check_weights(params, "a normalised weight")
        if not self.contributors(params, is_wide=False):
            raise RecipeError(
                "every weight is 0 (in float32), so the output would hold nothing of any model",
                remedy="give at least one model a weight",
            )

    def needs(self, params: Params) -> Needs:
        """Return nothing: it needs the models only."""
        return Needs()

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return the sum, in the models' order."""
        total = ops.mul(values[0], factors[0])
        for value, factor in zip(values[1:], factors[1:], strict=True):
            total = ops.add(total, ops.mul(value, factor))
        return total
