"""One model as it is: its values are copied, or rounded to another dtype."""

from collections.abc import Sequence
from typing import ClassVar

from shardmix.methods.base import Needs, Parameter, Params
from shardmix.methods.ops import A, Ops

NAME = "passthrough"


class Passthrough:
    """out = model, bit for bit unless its dtype changes."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "one model as it is, to store it in safetensors or in another dtype"
    reference: ClassVar[str] = (
        "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    num_factors: ClassVar[int | None] = 0
    is_weighted_sum: ClassVar[bool] = False
    takes_changes: ClassVar[bool] = False
    is_copy: ClassVar[bool] = True

    def check(self, params: Params) -> None:
        """Accept: it has no parameters."""

    def needs(self, params: Params) -> Needs:
        """Return the need for one model alone."""
        return Needs(most_models=1)

    def contributors(self, params: Params, *, is_wide: bool) -> tuple[int, ...]:
        """Return the model."""
        return (0,)

    def factors(
        self, params: Params, models: Sequence[int], statistics: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Return nothing."""
        return ()

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return the model's values."""
        return values[0]
