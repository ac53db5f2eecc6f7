"""Every method that a recipe can ask for, by name."""

import difflib

from shardmix.errors import RecipeError
from shardmix.methods.base import MergeMethod, Parameter
from shardmix.methods.linear import Linear
from shardmix.methods.passthrough import Passthrough
from shardmix.methods.slerp import Slerp
from shardmix.methods.task_arithmetic import TaskArithmetic

METHODS: dict[str, MergeMethod] = {
    method.name: method for method in (Linear(), TaskArithmetic(), Slerp(), Passthrough())
}


def merge_method(name: str) -> MergeMethod:
    """Return a method by its name in recipes. Raises `RecipeError` if there is none of that name.

    Example:
        >>> merge_method("linear").parameters[0].name
        'weight'
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
    suggestion = f" (did you mean {near[0]!r}?)" if near else ""
    raise RecipeError(
        f"is no merge method{suggestion}",
        subject=repr(name),
        remedy=f"use one of {', '.join(METHODS)}",
    )


def summaries() -> str:
    """Return all methods in one text, for `--help`."""
    described = [f"{name} ({method.summary})" for name, method in METHODS.items()]
    return f"{'; '.join(described)}. Default: {next(iter(METHODS))}."


def parameter_summaries() -> str:
    """Return the parameters of all methods in one text, for `--help`."""
    described = [
        f"{name}: {', '.join(map(_summary, method.parameters))}" for name, method in METHODS.items()
    ]
    return f"{'; '.join(described)}."


def _summary(parameter: Parameter) -> str:
    if parameter.default is None:
        owner = "each model's" if parameter.by_model else "required"
        return f"{parameter.name} ({parameter.description}; {owner})"
    value = str(parameter.default).lower()
    return f"{parameter.name} ({parameter.description}; default {value})"
