"""A checked recipe, built from words, pairs or a file, and options beside them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

from shardmix.conventions.adapters import is_adapted
from shardmix.conventions.model_types import check_model_type
from shardmix.conventions.output_quantisations import OUTPUT_QUANTISATIONS
from shardmix.conventions.sentence_modules import check_pooling
from shardmix.dtypes import OUT_DTYPES
from shardmix.errors import RecipeError, is_unicode, shown
from shardmix.methods import linear, task_arithmetic
from shardmix.methods.base import MergeMethod
from shardmix.methods.registry import merge_method
from shardmix.recipe.adapter import check_adapter, with_common_base
from shardmix.recipe.parameters import (
    checked_settings,
    representative,
    resolve_parameters,
    suggestion,
)
from shardmix.recipe.recipe import (
    KEEP,
    NORMALIZE,
    WEIGHT,
    Recipe,
    RecipeModel,
    overlaid,
    plain,
)
from shardmix.recipe.tokenizer import (
    BASE,
    REFUSE,
    UNION,
    RecipeTokenizer,
    checked_padding,
)
from shardmix.recipe.yaml_file import difference_keys, load_recipe, settings

WEIGHT_SUM_TOLERANCE = 1e-3
"""Largest distance of the sum of weights from 1, if it is checked."""

ModelsArgument = (
    Recipe
    | str
    | Path
    | Mapping[str, float]
    | Iterable[str | PathLike[str] | tuple[str | PathLike[str], float]]
)
"""A recipe, the path of one, a mapping source → weight, or pairs (source, weight).

For methods whose models have no weight, plain sources.
"""


def build_recipe(
    models: ModelsArgument,
    *,
    method: str | None = None,
    base_model: str | PathLike[str] | None = None,
    parameters: Mapping[str, object] | None = None,
    normalize: bool | None = None,
    allow_weight_sum: bool | None = None,
    dtype: str | None = None,
    tokenizer_source: str | PathLike[str] | None = None,
    pad_to_multiple_of: int | None = None,
    **others: Any,
) -> Recipe:
    """Return a checked recipe.

    Options that are not None replace the recipe's own. `parameters` are those of the merge as a
    whole. `others` are further fields of `Recipe`. The linear method's weights in pairs and
    mappings must sum to 1, unless `normalize` or `allow_weight_sum` is true. Raises `RecipeError`.
    """
    recipe, origin, is_sum_checked = _as_recipe(models)
    given: dict[str, Any] = {key: value for key, value in others.items() if value is not None}
    if given.get("as_adapter") and not origin and not isinstance(models, Recipe):
        given["merge_method"] = task_arithmetic.NAME
    if "allow_differences" in given:
        given["allow_differences"] = difference_keys(given["allow_differences"])
    if method is not None:
        given["merge_method"] = method
    if base_model is not None:
        given["base_model"] = str(base_model)
    if dtype is not None:
        given |= {"dtype": None, "out_dtype": dtype}
    recipe = with_common_base(replace(recipe, **given))
    tokenizer = _tokenizer(recipe.tokenizer, tokenizer_source, pad_to_multiple_of)
    recipe = replace(recipe, tokenizer=tokenizer)
    asked = settings(parameters, where="parameters")
    if normalize is not None:
        asked = overlaid(asked, plain({NORMALIZE: normalize}))
    _refuse_without_effect(recipe, [setting.name for setting in asked])
    is_sum_checked = is_sum_checked and recipe.merge_method == linear.NAME
    below = plain({NORMALIZE: False}) if is_sum_checked else ()
    recipe = replace(recipe, parameters=overlaid(below, overlaid(recipe.parameters, asked)))
    try:
        return checked(recipe, is_sum_checked=is_sum_checked and not allow_weight_sum)
    except RecipeError as error:
        if origin:
            error.of(origin)
        raise


def _as_recipe(models: ModelsArgument) -> tuple[Recipe, str, bool]:
    """Return an unchecked recipe, its file's path, and True if its weights must sum to 1."""
    if isinstance(models, Recipe):
        return models, "", False
    if isinstance(models, str | Path):
        return load_recipe(Path(models)), str(models), False
    try:
        entries = list(models.items() if isinstance(models, Mapping) else models)
    except TypeError:
        raise RecipeError(
            f"{type(models).__name__} given",
            subject="models",
            remedy="give a mapping source → weight, pairs (source, weight), or a recipe's path",
        ) from None
    are_weighted = not all(isinstance(entry, str | PathLike) for entry in entries)
    return Recipe(models=tuple(map(_recipe_model, entries))), "", are_weighted


def _recipe_model(entry: object) -> RecipeModel:
    if isinstance(entry, str | PathLike):
        return RecipeModel(str(entry))
    try:
        source, weight = cast("tuple[str, float]", entry)
    except (TypeError, ValueError):
        raise RecipeError("must be a pair (source, weight)", subject=shown(entry)) from None
    return RecipeModel(str(source), settings({WEIGHT: weight}, where=str(source)))


def parse_source_words(
    words: Sequence[str], *, method: str | None = None, base_model: str | None = None
) -> list[str | tuple[str, float]]:
    """Parse the models of a command line: SOURCE=WEIGHT, where the last `=` divides them.

    If the method's models have no weight, words are sources; so is the word of the base model. A
    model with an adapter that is the only one needs no weight.
    """
    if not has_weights(merge_method(method or linear.NAME)):
        return list(words)
    if len(words) == 1 and base_model is None and is_adapted(words[0]) and "=" not in words[0]:
        return [(words[0], 1.0)]
    return [word if word == base_model else _weighted(word) for word in words]


def _tokenizer(
    own: RecipeTokenizer | None, source: str | PathLike[str] | None, padding: int | None
) -> RecipeTokenizer | None:
    """Return a recipe's vocabulary, with options that replace its parts."""
    if source is not None and str(source) == REFUSE:
        if padding is not None:
            raise _padding_without_source()
        return None
    if source is not None:
        own = replace(own or RecipeTokenizer(), source=str(source))
    if padding is not None:
        if own is None:
            raise _padding_without_source()
        own = replace(own, pad_to_multiple_of=checked_padding(padding))
    return own


def _padding_without_source() -> RecipeError:
    return RecipeError(
        "would change nothing without a source of the tokenizer",
        subject="pad_to_multiple_of",
        remedy="name one with --tokenizer-source (tokenizer_source=), such as base",
    )


def has_weights(method: MergeMethod) -> bool:
    """Return True if each model of a method has a weight."""
    return any(each.name == WEIGHT and each.by_model for each in method.parameters)


def _weighted(word: str) -> tuple[str, float]:
    source, equals, weight = word.rpartition("=")
    if not source:
        missing, example = ("source", "./model") if equals else ("weight", word)
        raise RecipeError(
            f"no {missing} given",
            subject=repr(word),
            remedy=f"write SOURCE=WEIGHT, such as {example}=0.5",
        )
    try:
        return source, float(weight)
    except ValueError:
        raise RecipeError(
            f"weight {shown(weight)} is not a number", subject=word, remedy="write one such as 0.5"
        ) from None


def parse_parameter_words(words: Sequence[str]) -> dict[str, str | list[str]]:
    """Parse the `name=value` words of `-p`; values divided by commas are a gradient."""
    found: dict[str, str | list[str]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals or not value:
            raise RecipeError(
                "must be NAME=VALUE", subject=f"-p {word!r}", remedy="write it as -p t=0.3"
            )
        if name in found:
            raise RecipeError("is given twice", subject=f"-p {name}", remedy="give it once")
        found[name] = value.split(",") if "," in value else value
    return found


def checked(recipe: Recipe, *, is_sum_checked: bool = False, may_be_one: bool = False) -> Recipe:
    """Return the recipe with its base model apart and its parameters in their types.

    `is_sum_checked`: weights that are not normalised must sum to 1. `may_be_one`: one model is
    enough, whatever it is; otherwise it must have an adapter. Raises `RecipeError`.
    """
    for source in (*recipe.sources, recipe.config_from):
        if source is not None:
            _check_source(source)
    for key in ("dtype", "out_dtype"):
        _check_dtype(getattr(recipe, key))
    if recipe.quantize is not None and recipe.quantize not in tuple(OUTPUT_QUANTISATIONS):
        raise RecipeError(
            f"must be {', '.join(OUTPUT_QUANTISATIONS)}"
            f"{suggestion(recipe.quantize, OUTPUT_QUANTISATIONS)}",
            subject=f"quantize {shown(recipe.quantize)}",
            remedy="name that, or leave it out",
        )
    if recipe.model_type is not None:
        check_model_type(recipe.model_type)
    if recipe.pooling is not None:
        check_pooling(recipe.pooling)
    check_adapter(recipe)
    method = merge_method(recipe.merge_method)
    _check_tokenizer(recipe)
    recipe = replace(
        recipe,
        models=tuple(
            replace(
                model,
                parameters=checked_settings(
                    model.parameters, method, f"models[{number}] ({model.source})", of_model=True
                ),
            )
            for number, model in enumerate(recipe.models, start=1)
        ),
        parameters=checked_settings(recipe.parameters, method, "parameters", of_model=False),
    )
    recipe = _with_base_apart(recipe, method)
    _check_number_of_models(recipe, method, may_be_one=may_be_one)
    if not recipe.depends_on_tensor:
        (params,) = resolve_parameters(recipe, ()).groups
        if is_sum_checked and not params.shared[NORMALIZE]:
            _check_sum(params.numbers(WEIGHT))
    return recipe


def _check_source(source: str) -> None:
    if not source.strip():
        raise RecipeError("a source is empty", remedy="name a model folder, a file or a Hub id")
    if not is_unicode(source):
        raise RecipeError(
            "is not valid Unicode, so no report could name it",
            subject=source,
            remedy="rename the folder",
        )


def _check_dtype(dtype: str | None) -> None:
    choices = (KEEP, *OUT_DTYPES)
    if dtype is not None and dtype not in choices:
        raise RecipeError(
            f"must be one of {', '.join(choices)}{suggestion(dtype, choices)}",
            subject=f"dtype {dtype!r}",
        )


def _check_tokenizer(recipe: Recipe) -> None:
    """Raise `RecipeError` if a vocabulary is asked of a model that is not merged."""
    tokenizer = recipe.tokenizer
    if tokenizer is None:
        return
    named = [(f"tokens[{shown(row.token)}]", row.model) for row in tokenizer.tokens]
    if tokenizer.source not in (BASE, UNION):
        named.insert(0, ("tokenizer_source", tokenizer.source))
    named.append(("tokenizer.base", tokenizer.base))
    for key, model in named:
        if model is not None and model not in recipe.sources:
            raise RecipeError(
                f"names {model}, which is none of the models"
                f"{suggestion(model, (REFUSE, BASE, UNION, *recipe.sources))}",
                subject=key,
                remedy="name base, union or a model as the recipe names it"
                if key == "tokenizer_source"
                else "name a model as the recipe names it",
            )


def _with_base_apart(recipe: Recipe, method: MergeMethod) -> Recipe:
    """Return the recipe without the base model among its models, if the method takes one.

    For other methods the base model is one of the models, and gives the config, as in mergekit.
    """
    base = recipe.base_model
    if method.needs(representative(recipe)).base_model:
        if base is None:
            raise RecipeError(
                f"{method.name} needs a base model",
                remedy="name it by `base_model` or --base-model",
            )
        for number, model in enumerate(recipe.models, start=1):
            if model.source == base and model.parameters:
                raise RecipeError(
                    "is the base model, whose parameters would have no effect",
                    subject=f"models[{number}] ({base})",
                    remedy="leave them out",
                )
        others = tuple(model for model in recipe.models if model.source != base)
        return replace(recipe, models=others)
    if base is None:
        return recipe
    if base not in recipe.sources[1:]:
        raise RecipeError(
            f"`base_model`: {method.name} takes no base model, and {base} is none of the models",
            remedy="give it among the models, or as `config_from` if it has the config",
        )
    tokenizer = recipe.tokenizer
    return replace(
        recipe,
        base_model=None,
        config_from=recipe.config_from or base,
        tokenizer=None if tokenizer is None else replace(tokenizer, base=base),
    )


def _check_number_of_models(recipe: Recipe, method: MergeMethod, *, may_be_one: bool) -> None:
    needs = method.needs(representative(recipe))
    count, beside = len(recipe.models), " beside the base model" if needs.base_model else ""
    num_sources = len(recipe.sources)
    if num_sources == 1:  # its adapter is merged into it
        may_be_one = may_be_one or method.is_copy or is_adapted(recipe.sources[0])
    if num_sources < 1 or (num_sources == 1 and not may_be_one):
        example = "SOURCE=WEIGHT" if has_weights(method) else "SOURCE"
        raise RecipeError(
            f"{num_sources} model{'s' * (num_sources != 1)} given: a merge needs at least two",
            remedy=f"name each as {example}",
        )
    if count < needs.least_models:
        raise RecipeError(
            f"{count} models given: {method.name} needs at least {needs.least_models}{beside}",
            remedy="name more",
        )
    if needs.most_models is not None and count > needs.most_models:
        raise RecipeError(
            f"{count} models given: {method.name} takes at most {needs.most_models}{beside}",
            remedy="leave the others out, or use another method",
        )


def _check_sum(weights: Iterable[float]) -> None:
    total = math.fsum(weights)
    if abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        raise RecipeError(
            f"weights sum to {total:.6g}, not 1",
            remedy="correct them, or use --normalize (normalize=True) to rescale them, or "
            "--allow-weight-sum (allow_weight_sum=True) if this sum is meant",
        )


def _refuse_without_effect(recipe: Recipe, names: Iterable[str]) -> None:
    """Raise `RecipeError` if every model has a parameter of its own that is given for all."""
    for name in names:
        if recipe.models and all(
            any(setting.name == name for setting in model.parameters) for model in recipe.models
        ):
            raise RecipeError(
                "would change nothing, since each model has its own",
                subject=f"parameter {name!r}",
                remedy="change it there",
            )


def recipe_notes(recipe: Recipe) -> Iterator[str]:
    """Yield notes on settings of a checked recipe that mergekit takes otherwise."""
    if recipe.out_dtype is None:
        if recipe.dtype not in (None, KEEP, "float32"):
            yield (
                f"dtype {recipe.dtype}: is taken as the output's; the arithmetic is in float32 "
                "(float64 if any source is)"
            )
    elif recipe.dtype not in (None, recipe.out_dtype):
        yield (
            f"dtype {recipe.dtype}: has no effect, since out_dtype is {recipe.out_dtype}; the "
            "arithmetic is in float32 (float64 if any source is)"
        )
