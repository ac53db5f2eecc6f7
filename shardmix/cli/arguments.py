"""The words of a command line, turned into the library's arguments. Loads no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shardmix.cli.options import names_of, scoring
from shardmix.errors import RecipeError

if TYPE_CHECKING:
    from shardmix.recipe.build import ModelsArgument
    from shardmix.scoring.options import ScoreOptions


def merge_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the library's options from a command's arguments, which have the same names."""
    from shardmix.options import MergeOptions

    options = {name: arguments[name] for name in MergeOptions.__annotations__ if name in arguments}
    options["fsync"] = not arguments["no_fsync"]
    words = options.pop("parameters", ())
    if words:
        from shardmix.recipe.build import parse_parameter_words

        options["parameters"] = parse_parameter_words(words)
    return options


def score_options(arguments: dict[str, Any], *, dtype: str) -> "ScoreOptions":
    """Return only the scoring options that were given; the library knows the defaults."""
    given = {
        name: value
        for name in sorted(names_of(scoring))
        if (value := arguments[name]) is not None and value is not False
    }
    if dtype != "auto":
        given["dtype"] = dtype
    return cast("ScoreOptions", given)


def first_word(scoring: "ScoreOptions") -> str:
    """Return one of these options as it is typed."""
    name = next(iter(scoring))
    return "--score-dtype" if name == "dtype" else f"--{name.replace('_', '-')}"


def required_model_type(model_type: str | None) -> str:
    """Return the model type; raise `RecipeError` if there is none."""
    if model_type is None:
        from shardmix.conventions.model_types import MODEL_TYPES

        raise RecipeError(
            "--weights-from needs --model-type",
            remedy=f"name one of {', '.join(MODEL_TYPES)}",
        )
    return model_type


def equally_weighted(words: Sequence[str]) -> list[tuple[str, float]]:
    """Return the models of a command line without weights, all with the same weight."""
    from shardmix.recipe.yaml_file import RECIPE_SUFFIXES

    for word in words:
        if word.endswith(RECIPE_SUFFIXES):
            raise RecipeError(
                "is a recipe, which has weights; with --weights-from they come from the examples",
                subject=word,
                remedy="name only the models",
            )
        if "=" in word and not Path(word).exists():
            raise RecipeError(
                "no such model; with --weights-from the weights come from the examples",
                subject=f"{word!r}",
                remedy="name only the models",
            )
    return [(word, 1 / len(words)) for word in words]


def models_of(words: Sequence[str], options: Mapping[str, Any]) -> "ModelsArgument":
    """Return the models of `SOURCE=WEIGHT` words, or the recipe that the one word names.

    The options' method says whether its models have weights.
    """
    from shardmix.recipe.build import parse_source_words
    from shardmix.recipe.yaml_file import RECIPE_SUFFIXES

    if len(words) == 1 and words[0].endswith(RECIPE_SUFFIXES):
        return words[0]
    return parse_source_words(words, method=options["method"], base_model=options["base_model"])


def scored_sources(words: Sequence[str]) -> Sequence[str]:
    """Return the words, which are sources, or the models of the recipe that the one word names."""
    from shardmix.recipe.yaml_file import RECIPE_SUFFIXES, load_recipe

    if len(words) == 1 and words[0].endswith(RECIPE_SUFFIXES):
        return [model.source for model in load_recipe(Path(words[0])).models]
    return words


def source_paths(words: Sequence[str]) -> dict[str, str]:
    """Return name → path of `NAME=PATH` words."""
    found = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path:
            raise RecipeError(
                "must be NAME=PATH, such as tuned=./tuned", subject=f"--source {word!r}"
            )
        found[name] = path
    return found
