"""The seam of methods: their declarations, and the values that they compute with.

A new element-wise method is one file here and a line in `registry`. Its parameters become recipe
keys, options, help and error texts; its needs become the memory budget.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from shardmix.errors import RecipeError
from shardmix.methods.ops import A, Ops
from shardmix.methods.statistics import Statistic

LARGEST_FLOAT32 = 3.4028234663852886e38

Value = float | bool | str
"""The possible types of a parameter."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that a method declares."""

    name: str
    """Its key in a recipe, such as "weight"."""
    type: type
    """float, bool or str."""
    description: str
    """One sentence for `--help` and error texts."""
    default: Value | None = None
    """Default value; None if it must be given."""
    by_model: bool = False
    """True if each model has its own value."""
    least: float | None = None
    """The least value allowed; None if there is no bound."""
    most: float | None = None
    """The largest value allowed; None if there is no bound."""


@dataclass(frozen=True, slots=True)
class Params:
    """The parameters of a tensor, each with its value."""

    shared: Mapping[str, Value] = field(default_factory=dict, hash=False)
    """Values for all models, by name."""
    by_model: tuple[Mapping[str, Value], ...] = field(default=(), hash=False)
    """Values of each model, in the recipe's order, without the base model."""

    def number(self, name: str) -> float:
        """Return a number that holds for all models."""
        return float(self.shared[name])

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return each model's number, in order."""
        return tuple(float(values[name]) for values in self.by_model)


@dataclass(frozen=True, slots=True)
class Needs:
    """The needs of a method besides the models' chunks. The memory budget asks for them."""

    base_model: bool = False
    """True if it takes a base model; its values then come first."""
    statistics: tuple[Statistic, ...] = ()
    """Statistics of whole tensors, gathered before any of the tensor is combined."""
    least_models: int = 1
    """Fewest models besides the base model."""
    most_models: int | None = None
    """Most models besides the base model; None for any number."""


class MergeMethod(Protocol):
    """A way to merge tensors of one shape, element by element."""

    name: ClassVar[str]
    """Its name in a recipe."""
    summary: ClassVar[str]
    """One sentence for people."""
    reference: ClassVar[str]
    """Address (https) of the paper that it comes from, or of the library whose behaviour it has."""
    parameters: ClassVar[tuple[Parameter, ...]]
    """Its parameters."""
    num_factors: ClassVar[int | None]
    """Number of factors of `combine`; None for one of each contributor."""
    is_weighted_sum: ClassVar[bool]
    """True if `combine` is Σ factorᵢ · valueᵢ, in order: backends have a faster way for that."""
    takes_changes: ClassVar[bool]
    """True if `combine` takes each model's changes (model - base) in place of its values."""
    is_copy: ClassVar[bool]
    """True if the output is its one model: bits are copied, NaN and all, if the dtype stays."""

    def check(self, params: Params) -> None:
        """Raise `RecipeError` if the values do not go together."""

    def needs(self, params: Params) -> Needs:
        """Return the needs for these values."""

    def contributors(self, params: Params, *, is_wide: bool) -> tuple[int, ...]:
        """Return the models (indexes into `by_model`) whose values count; others are not read.

        `is_wide`: the tensor is computed in float64, so no weight vanishes in float32.
        """

    def factors(
        self, params: Params, models: Sequence[int], statistics: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Return the numbers that `combine` needs, in double precision.

        `models` are the contributors; `statistics` has a value for each of `needs`', over the
        base model and them.
        """

    def combine(self, ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A:
        """Return the merged elements of a chunk.

        `values` are the chunk's elements in float32 (float64 if any source is), of the base model
        first if there is one, then of each contributor: its values, or its changes to the base if
        the method takes those. `factors` are rounded to the same dtype.
        """


class WeightedModels:
    """Part of a method in which each model counts by one number: its weight, or a multiple of it.

    A subclass overrides `weights` if that is not the plain weight.
    """

    num_factors: ClassVar[int | None] = None

    def weights(self, params: Params) -> tuple[float, ...]:
        """Return each model's number, in the recipe's order."""
        return effective_weights(params)

    def contributors(self, params: Params, *, is_wide: bool) -> tuple[int, ...]:
        """Return the models whose number is not 0."""
        return nonzero(self.weights(params), is_wide=is_wide)

    def factors(
        self, params: Params, models: Sequence[int], statistics: Sequence[Sequence[float]]
    ) -> tuple[float, ...]:
        """Return the numbers of the contributors."""
        weights = self.weights(params)
        return tuple(weights[model] for model in models)


def combined(
    method: MergeMethod,
    ops: Ops[A],
    values: Sequence[A],
    factors: Sequence[A],
    are_changes: Sequence[bool],
) -> A:
    """Return what a method makes of a chunk's values.

    `are_changes` tells which values are changes to the base already, as those of an adapter are;
    others become changes here if the method takes them.
    """
    if method.takes_changes:
        base, *others = values
        changes = (
            value if is_change else ops.sub(value, base)
            for value, is_change in zip(others, are_changes[1:], strict=True)
        )
        values = [base, *changes]
    return method.combine(ops, values, factors)


def vanishes_in_float32(weight: float) -> bool:
    """Return True if a weight is 0 in float32: 0 or -0.0, or less than half of the least value."""
    rounded: float = struct.unpack("<f", struct.pack("<f", weight))[0]
    return rounded == 0


def nonzero(weights: Sequence[float], *, is_wide: bool) -> tuple[int, ...]:
    """Return the indexes of weights that are not 0; a weight of 0 leaves a model's values out.

    0 · NaN would be NaN.
    """
    return tuple(
        index
        for index, weight in enumerate(weights)
        if weight and (is_wide or not vanishes_in_float32(weight))
    )


def weighted_sum(ops: Ops[A], values: Sequence[A], factors: Sequence[A]) -> A | None:
    """Return Σ factorᵢ · valueᵢ, in order; None without any."""
    total = None
    for value, factor in zip(values, factors, strict=True):
        part = ops.mul(value, factor)
        total = part if total is None else ops.add(total, part)
    return total


def effective_weights(params: Params, *, scale: float = 1.0) -> tuple[float, ...]:
    """Return scale · weight of each model, divided by the sum of weights if `normalize` is true."""
    weights = params.numbers("weight")
    if not params.shared["normalize"]:
        return tuple(scale * weight for weight in weights)
    total = math.fsum(weights)
    return tuple(scale * weight / total for weight in weights)


def check_weights(params: Params, what: str, *, scale: float = 1.0) -> None:
    """Raise `RecipeError` if weights sum to 0 and are to be normalised, or become infinite.

    `what` names the effective weights in messages.
    """
    if params.shared["normalize"] and math.fsum(params.numbers("weight")) == 0:
        raise RecipeError(
            "sum to 0 and so cannot be normalised to sum to 1",
            subject="weights",
            remedy="give other weights, or set normalize to false",
        )
    for weight in effective_weights(params, scale=scale):
        if not abs(weight) <= LARGEST_FLOAT32:  # what the arithmetic is in
            raise RecipeError(
                f"{weight} is not a finite number in float32",
                subject=what,
                remedy="give weights that are nearer to 1",
            )
