"""Spherical linear interpolation between the base model and one other, tensor by tensor."""

import math
from collections.abc import Sequence
from typing import ClassVar

from shardmix.methods.base import Needs, Parameter, Params
from shardmix.methods.ops import A, Ops
from shardmix.methods.statistics import Gram

_NEARLY_PARALLEL = 0.9995
"""|cos| from which on interpolation is linear, as in mergekit."""
_NO_DIRECTION = 1e-8
"""The largest norm of a tensor that has no direction, and is used as it is."""


class Slerp:
    """out = sin((1-t)θ)/sin(θ) · base + sin(tθ)/sin(θ) · model, θ the angle between the tensors.

    Nearly parallel tensors, as of two fine-tunes of one model, are interpolated linearly.
    """

    name: ClassVar[str] = "slerp"
    summary: ClassVar[str] = "interpolation on the sphere between the base model and one other"
    reference: ClassVar[str] = "https://doi.org/10.1145/325334.325242"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("t", float, "0 gives the base model, 1 the other", least=0.0, most=1.0),
    )
    num_factors: ClassVar[int | None] = 2
    is_weighted_sum: ClassVar[bool] = False
    takes_changes: ClassVar[bool] = False
    is_copy: ClassVar[bool] = False

    def check(self, params: Params) -> None:
        """Accept any t within its bounds."""

    def needs(self, params: Params) -> Needs:
        """Return the needs: a base model, one other, and their scalar products."""
        return Needs(base_model=True, statistics=(Gram(),), most_models=1)

    def contributors(self, params: Params, *, is_wide: bool) -> tuple[int, ...]:
        """Return the other model."""
        return (0,)

    def factors(
        self, params: Params, models: Sequence[int], statistics: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Return the factor of the base, as the sum of both factors, and that of the model."""
        t = params.number("t")
        ((base_base, base_model, model_model),) = statistics
        norms = [math.sqrt(square) for square in (base_base, model_model)]
        lengths = [norm if norm > _NO_DIRECTION else 1.0 for norm in norms]
        cosine = base_model / (lengths[0] * lengths[1])
        # Also if it is NaN, since a tensor has NaN: the output shows it.
        if not abs(cosine) <= _NEARLY_PARALLEL:
            return 1.0, t
        angle = math.acos(cosine)
        of_base = math.sin((1 - t) * angle) / math.sin(angle)
        of_model = math.sin(t * angle) / math.sin(angle)
        return of_base + of_model, of_model

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return both · base + of_model · (model - base): exact to the last bit for linear ones."""
        base, model = values
        both, of_model = factors
        return ops.add(ops.mul(base, both), ops.mul(ops.sub(model, base), of_model))
