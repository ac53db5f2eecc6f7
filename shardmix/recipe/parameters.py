"""The parameters of a recipe: checked by its method's declarations, and resolved for every tensor.

A model's own setting counts first, then the recipe's, then the method's default. Layers are
counted by tensor names, each stack of a model by itself.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmix.errors import RecipeError, shown
from shardmix.methods.base import LARGEST_FLOAT32, MergeMethod, Parameter, Params, Value
from shardmix.methods.registry import merge_method
from shardmix.recipe.recipe import NORMALIZE, WEIGHT, Choice, Recipe, Setting, Settings

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|layer|block|blocks)\.(\d{1,4})(?:\.|$)")
_MOST_GROUPS = 20_000
"""Largest number of different parameters in one merge. A hostile checkpoint's tensor names could
otherwise make as many as it has tensors."""


@dataclass(frozen=True, slots=True)
class ResolvedParameters:
    """The parameters of every tensor, grouped by tensors that share them."""

    groups: tuple[Params, ...]
    """The different parameters, in the order in which tensors first need them."""
    rows: npt.NDArray[np.int32]
    """One index into `groups` for each tensor."""


def checked_settings(
    settings: Settings, method: MergeMethod, where: str, *, of_model: bool
) -> Settings:
    """Return settings with every value of the type that the method declares.

    `where` names their level in errors. `of_model` is True for a model's own. Raises
    `RecipeError`.
    """
    declared = {parameter.name: parameter for parameter in method.parameters}
    checked = []
    for setting in settings:
        parameter = declared.get(setting.name)
        if parameter is None:
            raise RecipeError(
                f"{method.name} has no parameter {shown(setting.name)}"
                f"{suggestion(setting.name, declared)}",
                subject=where,
                remedy=f"its parameters are {', '.join(declared)}",
            )
        if of_model and not parameter.by_model:
            raise RecipeError(
                f"`{setting.name}` is a parameter of the merge as a whole, not of a model",
                subject=where,
                remedy="move it to the recipe's own `parameters`",
            )
        choices = tuple(_checked_choice(choice, parameter, where) for choice in setting.choices)
        checked.append(Setting(setting.name, choices))
    return tuple(checked)


def _checked_choice(choice: Choice, parameter: Parameter, where: str) -> Choice:
    if len(choice.points) > 1 and parameter.type is not float:
        raise RecipeError(
            f"`{parameter.name}` is a list, but only numbers can follow the layers",
            subject=where,
            remedy="give one value",
        )
    points = tuple(_converted(value, parameter, where) for value in choice.points)
    return Choice(points, choice.filter)


def _converted(value: object, parameter: Parameter, where: str) -> Value:
    """Return a value in the parameter's type; text is read as on a command line."""
    name = parameter.name
    if parameter.type is bool:
        words = {"true": True, "false": False}
        if isinstance(value, str):
            value = words.get(value.lower(), value)
        if not isinstance(value, bool):
            raise RecipeError(
                f"`{name}` is {shown(value)}; it must be true or false", subject=where
            )
        return value
    if parameter.type is str:
        if not isinstance(value, str):
            raise RecipeError(f"`{name}` is {shown(value)}; it must be text", subject=where)
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        # YAML 1.1 reads "5e-1" as text; what Python takes for a number is meant as one.
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(
            f"{name} {shown(value)} is not a number", subject=where, remedy="write one such as 0.5"
        ) from None
    if not abs(number) <= LARGEST_FLOAT32:
        raise RecipeError(
            f"{name} {number} is not a finite number",
            subject=where,
            remedy="write a number such as 0.5",
        )
    least, most = parameter.least, parameter.most
    if (least is not None and number < least) or (most is not None and number > most):
        bounds = [f"at least {least:g}"] if least is not None else []
        bounds += [f"at most {most:g}"] if most is not None else []
        raise RecipeError(f"{name} {number:g} must be {' and '.join(bounds)}", subject=where)
    return number


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'weight'?)" for a word that is nearly known, or ""."""
    near = difflib.get_close_matches(str(word)[:100].lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def representative(recipe: Recipe) -> Params:
    """Return the parameters of some tensor, for a method to tell its needs. May be incomplete."""
    method = merge_method(recipe.merge_method)
    return Params(
        _values(method, [recipe.parameters], lambda _: True, 0.0, by_model=False),
        tuple(
            _values(method, [model.parameters, recipe.parameters], lambda _: True, 0.0)
            for model in recipe.models
        ),
    )


def resolve_parameters(recipe: Recipe, names: Sequence[str]) -> ResolvedParameters:
    """Return the parameters of every tensor of a checked recipe. `names` are the tensors'.

    Raises `RecipeError` if one is missing, or if a tensor's parameters contradict one another.

    Example:
        >>> resolve_parameters(build_recipe({"a": 0.5, "b": 0.5}), ["x", "y"]).rows.tolist()
        [0, 0]
    """
    rows = np.zeros(len(names), np.int32)
    if not recipe.depends_on_tensor:
        return ResolvedParameters((_resolved(recipe),), rows)
    levels = (recipe.parameters, *(model.parameters for model in recipe.models))
    choices = [choice for level in levels for setting in level for choice in setting.choices]
    filters = list(dict.fromkeys(c.filter for c in choices if c.filter is not None))
    has_gradients = any(len(choice.points) > 1 for choice in choices)
    depths = _depths(names) if has_gradients else [0.0] * len(names)
    groups: dict[object, Params] = {}
    group_of: dict[tuple[float, tuple[str, ...]], int] = {}
    numbers: dict[object, int] = {}
    for row, (name, depth) in enumerate(zip(names, depths, strict=True)):
        key = depth, tuple(text for text in filters if text in name)
        if key not in group_of:
            params = _resolved(recipe, name, *key)
            # Equal values are one group, even if different filters and depths led to them.
            values = (*params.shared.values(),), *((*own.values(),) for own in params.by_model)
            groups.setdefault(values, params)
            group_of[key] = numbers.setdefault(values, len(numbers))
            if len(group_of) > _MOST_GROUPS:
                raise RecipeError(
                    f"with its like, more than {_MOST_GROUPS} tensors have parameters of their own",
                    subject=name,
                    remedy="use fewer filters, or no gradients over such layers",
                )
        rows[row] = group_of[key]
    return ResolvedParameters(tuple(groups.values()), rows)


def source_weights(recipe: Recipe) -> tuple[float | None, ...]:
    """Return the weight of each of `recipe.sources`; None for one that has not one of its own."""
    weights = used_weights(recipe) or (None,) * len(recipe.models)
    return weights if recipe.base_model is None else (None, *weights)


def used_weights(recipe: Recipe) -> tuple[float, ...]:
    """Return each model's weight, normalised if the recipe says so.

    Returns () if the method has no weights, or if they may depend on the tensor.
    """
    if recipe.depends_on_tensor:
        return ()
    params = _resolved(recipe)
    return shares_of(params) if all(WEIGHT in own for own in params.by_model) else ()


def shares_of(params: Params) -> tuple[float, ...]:
    """Return each model's weight in a tensor, normalised if that was asked for."""
    weights = params.numbers(WEIGHT)
    if not params.shared.get(NORMALIZE, False):
        return weights
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def _resolved(
    recipe: Recipe, name: str = "", depth: float = 0.0, marks: Collection[str] = ()
) -> Params:
    """Return the parameters of a tensor, checked. `marks` are the filters that its name has."""
    method = merge_method(recipe.merge_method)

    def fits(choice: Choice) -> bool:
        return choice.filter is None or choice.filter in marks

    whole = [recipe.parameters]
    params = Params(
        _values(method, whole, fits, depth, by_model=False),
        tuple(_values(method, [own.parameters, *whole], fits, depth) for own in recipe.models),
    )
    of_tensor = f" for {name}" if name else ""
    for parameter in method.parameters:
        if not parameter.by_model and parameter.name not in params.shared:
            raise RecipeError(
                f"`{parameter.name}` is missing{of_tensor}: {parameter.description}",
                remedy=f"give it under `parameters`, or by -p {parameter.name}=VALUE",
            )
        for model, values in zip(recipe.models, params.by_model, strict=True):
            if parameter.by_model and parameter.name not in values:
                raise RecipeError(
                    f"`{parameter.name}` is missing{of_tensor}: {parameter.description}",
                    subject=model.source,
                    remedy="give each model one, or all the same",
                )
    try:
        method.check(params)
    except RecipeError as error:
        if name:
            error.of(name)
        raise
    return params


def _values(
    method: MergeMethod,
    levels: Sequence[Settings],
    fits: Callable[[Choice], bool],
    depth: float,
    *,
    by_model: bool = True,
) -> dict[str, Value]:
    """Return the values of a method's parameters, by model or not, that are given or defaults."""
    values = {}
    for parameter in method.parameters:
        if parameter.by_model == by_model:
            points = _points(parameter.name, levels, fits)
            if points is not None:
                values[parameter.name] = _at(points, depth)
            elif parameter.default is not None:
                values[parameter.name] = parameter.default
    return values


def _points(
    name: str, levels: Sequence[Settings], fits: Callable[[Choice], bool]
) -> tuple[Value, ...] | None:
    for level in levels:
        for setting in level:
            if setting.name == name:
                for choice in setting.choices:
                    if fits(choice):
                        return choice.points
    return None


def _at(points: tuple[Value, ...], depth: float) -> Value:
    """Return a gradient's value at a depth from 0 (the first layer) to 1 (the last)."""
    position = depth * (len(points) - 1)
    before = int(position)
    share = position - before
    if share == 0:
        return points[before]
    return (1 - share) * float(points[before]) + share * float(points[before + 1])


def _depths(names: Sequence[str]) -> list[float]:
    """Return each tensor's depth: its layer's index / (layers of its stack - 1); else 0.

    Stacks are told apart by what stands before the layer's number, such as "encoder.block.".
    """
    found = [_LAYER.search(name) for name in names]
    stacks = [match.string[: match.start(1)] if match else "" for match in found]
    layers = [int(match[1]) if match else 0 for match in found]
    last: dict[str, int] = {}
    for stack, layer in zip(stacks, layers, strict=True):
        if layer > last.get(stack, 0):
            last[stack] = layer
    return [
        layer / last[stack] if layer else 0.0 for stack, layer in zip(stacks, layers, strict=True)
    ]
