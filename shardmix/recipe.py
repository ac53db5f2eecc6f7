"""What to merge: a `Recipe`, checked, from a mapping, pairs, `SOURCE=WEIGHT` words or YAML.

Knows names and numbers; opens no checkpoint. A recipe and its sources alone decide the bytes of
the output: where it goes and how much memory it may take are not part of it.
"""

import difflib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from shardmix.conventions.mergekit_recipes import mergekit_error
from shardmix.conventions.model_types import check_model_type
from shardmix.conventions.sentence_modules import check_pooling
from shardmix.dtypes import OUT_DTYPES
from shardmix.errors import RecipeError, is_unicode, one_line, shown
from shardmix.system.files import read_regular
from shardmix.system.units import parse_size

WEIGHT_SUM_TOLERANCE = 1e-3
_LARGEST_WEIGHT = 3.4028234663852886e38  # of float32
_MAX_RECIPE_NBYTES = 128 * 1024
# What PyYAML raises where a value is not what its tag says: `!!int ""`, `!!bool maybe`, ...
_YAML_STUMBLES = (ValueError, TypeError, LookupError, AttributeError)
RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """A checkpoint and its share in the sum."""

    source: str
    """Local folder, `.safetensors` file, or Hub id `org/name[@revision]`."""
    weight: float
    """Its factor, in double precision."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked description of a merge: out = Σ weightᵢ · sourceᵢ."""

    models: tuple[WeightedSource, ...]
    """At least two; the first one gives names, layout, config and tokenizer."""
    dtype: str = "keep"
    """Output dtype: keep (each tensor's in the first model), float32, float16 or bfloat16."""
    config_from: str | None = None
    """Source of config, tokenizer and the other auxiliary files; None: the first model."""
    max_shard_size: int | None = None
    """Largest output shard in bytes; None: the first model's own shard layout."""
    normalize: bool = False
    """The weights are still to be rescaled to sum to 1."""
    allow_weight_sum: bool = False
    """Weights whose sum is not 1 are meant."""
    allow_differences: tuple[str, ...] = ()
    """Keys in which the models may differ although an average over that makes no sense by itself:
    of a config (`num_attention_heads`, `text_config.hidden_act`), `tokenizer`, `model_type`,
    `quantization_config`, or a file (`modules.json`). Sorted, each once."""
    model_type: str | None = None
    """decoder, encoder, reranker or encoder-decoder. The output of encoders also loads in
    sentence-transformers: with its own modules, or else with CLS pooling and normalisation."""
    pooling: str | None = None
    """How an encoder's output pools the states of a text's tokens, one of
    `sentence_modules.POOLINGS`; None: as its modules say, or else by the first (cls)."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in order."""
        return tuple(model.source for model in self.models)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights, in source order."""
        return tuple(model.weight for model in self.models)


_RECIPE_KEYS = tuple(field.name for field in fields(Recipe))
_MODEL_KEYS = tuple(field.name for field in fields(WeightedSource))

ModelsArgument = Recipe | str | Path | Mapping[str, float] | Iterable[tuple[str | Path, float]]


def build_recipe(models: ModelsArgument, **options: Any) -> Recipe:
    """Return a checked recipe from whatever a caller may hold.

    `models` is a `Recipe`, the path of a YAML recipe, a mapping source → weight, or pairs
    (source, weight), which may name one source twice. An option that is not None overrides the
    recipe's own. Raises `RecipeError`.
    """
    if isinstance(models, Recipe):
        recipe = models
    elif isinstance(models, str | Path):
        recipe = load_recipe(Path(models))
    else:
        try:
            pairs = list(models.items() if isinstance(models, Mapping) else models)
        except TypeError:
            raise RecipeError(
                f"{type(models).__name__} given",
                subject="models",
                remedy="give a mapping source → weight, pairs (source, weight), or the path of "
                "a recipe",
            ) from None
        recipe = Recipe(models=tuple(_weighted_source(pair) for pair in pairs))
    given = {key: value for key, value in options.items() if value is not None}
    if "allow_differences" in given:
        given["allow_differences"] = difference_keys(given["allow_differences"])
    return checked(replace(recipe, **given))


def vanishes_in_float32(weight: float) -> bool:
    """Tell whether a weight is 0 in float32: 0 or -0.0, or less than half of the least value."""
    rounded: float = struct.unpack("<f", struct.pack("<f", weight))[0]
    return rounded == 0


def load_recipe(path: Path) -> Recipe:
    """Read a YAML recipe, unchecked. Raises `RecipeError` naming file, key, nearest valid key."""
    try:
        # More takes minutes to parse; a hundred models take a tenth of it.
        text = read_regular(path, max_nbytes=_MAX_RECIPE_NBYTES)
        content = yaml.load(text, Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(
            f"cannot be read ({error.strerror})", subject=path, remedy="check the path"
        ) from None
    except yaml.YAMLError as error:
        finding = one_line(error, limit=300)
        raise RecipeError(
            f"not valid YAML: {finding}", subject=path, remedy="mend it there"
        ) from None
    except RecursionError:
        raise RecipeError(
            "not valid YAML: nests too deeply for a recipe",
            subject=path,
            remedy="write it without such nesting",
        ) from None
    except _YAML_STUMBLES as error:
        raise RecipeError(
            f"not valid YAML: a value is not what its tag says ({one_line(error)})",
            subject=path,
            remedy="mend the value, or leave the tag out",
        ) from None
    return recipe_from_dict(content, origin=str(path))


def recipe_from_dict(content: object, *, origin: str = "recipe") -> Recipe:
    """Build a recipe, unchecked, from parsed YAML or JSON, refusing what it does not know."""
    error = mergekit_error(content)
    if error is not None:
        raise error.of(origin)
    top = _known_keys(content, _RECIPE_KEYS, origin)
    models = top.get("models")
    if not isinstance(models, list):
        raise RecipeError(
            "`models` must be a list of {source: ..., weight: ...}, one a model",
            subject=origin,
        )
    pairs = []
    for number, model in enumerate(models, start=1):
        where = f"{origin}: models[{number}]"
        entry = _known_keys(model, _MODEL_KEYS, where)
        for key in _MODEL_KEYS:
            if entry.get(key) is None:
                raise RecipeError(
                    f"`{key}` is missing",
                    subject=where,
                    remedy="a model has a source and a weight",
                )
        pairs.append((_text(entry["source"], key="source", where=where), entry["weight"]))
    options = {key: value for key, value in top.items() if key != "models" and value is not None}
    for key in ("normalize", "allow_weight_sum"):
        if not isinstance(options.get(key, False), bool):
            raise RecipeError(
                f"`{key}` is {shown(options[key])}",
                subject=origin,
                remedy="it must be true or false",
            )
    if "allow_differences" in options:
        options["allow_differences"] = difference_keys(options["allow_differences"], where=origin)
    if "max_shard_size" in options:
        options["max_shard_size"] = parse_size(options["max_shard_size"])
    for key in ("dtype", "config_from", "model_type", "pooling"):
        if key in options:
            options[key] = _text(options[key], key=key, where=origin)
    return Recipe(models=tuple(_weighted_source(pair) for pair in pairs), **options)


def difference_keys(value: object, *, where: str = "recipe") -> tuple[str, ...]:
    """Return the keys of `allow_differences`, sorted, each once.

    `value` is a list of keys; text may hold several, separated by commas. Raises `RecipeError`.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple | set | frozenset):
        raise RecipeError(
            f"`allow_differences` is {shown(value)}",
            subject=where,
            remedy="it must be a list of keys, such as [num_attention_heads, tokenizer]",
        )
    keys = set()
    for entry in entries:
        text = _text(entry, key="allow_differences", where=where)
        for key in map(str.strip, text.split(",")):
            if not key or not is_unicode(key) or not key.isprintable():
                raise RecipeError(
                    f"`allow_differences` holds {shown(text)}, which names no key",
                    subject=where,
                    remedy="name one such as num_attention_heads or tokenizer",
                )
            keys.add(key)
    return tuple(sorted(keys))


def parse_source_words(words: Sequence[str]) -> list[tuple[str, float]]:
    """Parse `SOURCE=WEIGHT` words of a command line; the last `=` divides them."""
    pairs = []
    for word in words:
        source, equals, weight = word.rpartition("=")
        if not source:
            missing, example = ("source", "./model") if equals else ("weight", word)
            raise RecipeError(
                f"no {missing} given",
                subject=f"{word!r}",
                remedy=f"write SOURCE=WEIGHT, such as {example}=0.5",
            )
        pairs.append((source, _number(weight, where=word)))
    return pairs


def checked(recipe: Recipe) -> Recipe:
    """Return the recipe with its weights normalised if it says so; raise `RecipeError` if wrong."""
    weights = recipe.weights
    if len(weights) < 2:
        raise RecipeError(
            f"{len(weights)} model{'s' * (len(weights) != 1)} given: a merge needs at least two",
            remedy="name each as SOURCE=WEIGHT",
        )
    _refuse_non_finite(recipe)
    for source in (
        *recipe.sources,
        *([recipe.config_from] if recipe.config_from is not None else []),
    ):
        if not source.strip():
            raise RecipeError("a source is empty", remedy="name a model folder, a file or a Hub id")
        if not is_unicode(source):
            raise RecipeError(
                "is not valid Unicode, so no report could name it",
                subject=source,
                remedy="rename the folder",
            )
    if recipe.dtype != "keep" and recipe.dtype not in OUT_DTYPES:
        choices = ("keep", *OUT_DTYPES)
        raise RecipeError(
            f"must be one of {', '.join(choices)}{_suggestion(recipe.dtype, choices)}",
            subject=f"dtype {recipe.dtype!r}",
        )
    if recipe.model_type is not None:
        check_model_type(recipe.model_type)
    if recipe.pooling is not None:
        check_pooling(recipe.pooling)
    total = math.fsum(weights)
    if all(map(vanishes_in_float32, weights)) and not (recipe.normalize and total):
        raise RecipeError(
            "every weight is 0 (in float32), so the output would hold nothing of any model",
            remedy="give at least one model a weight",
        )
    if recipe.normalize:
        if total == 0:
            raise RecipeError(
                "weights sum to 0 and so cannot be normalised to sum to 1",
                remedy="change the weights, or leave --normalize out",
            )
        models = tuple(replace(model, weight=model.weight / total) for model in recipe.models)
        normalized = replace(recipe, models=models, normalize=False)  # done, and once only
        _refuse_non_finite(normalized)
        return normalized
    if abs(total - 1) > WEIGHT_SUM_TOLERANCE and not recipe.allow_weight_sum:
        raise RecipeError(
            f"weights sum to {total:.6g}, not 1",
            remedy="correct them, or use --normalize (normalize=True) to rescale them, or "
            "--allow-weight-sum (allow_weight_sum=True) if this sum is meant",
        )
    return recipe


def _refuse_non_finite(recipe: Recipe) -> None:
    for model in recipe.models:
        # Sums are in float32: a weight beyond its range is infinite there.
        if not abs(model.weight) <= _LARGEST_WEIGHT:
            raise RecipeError(
                f"weight {model.weight} is not a finite number",
                subject=model.source,
                remedy="write a number such as 0.5",
            )


def _weighted_source(pair: object) -> WeightedSource:
    source: object
    weight: object
    try:
        source, weight = pair  # type: ignore[misc]
    except (TypeError, ValueError):
        raise RecipeError("must be a pair (source, weight)", subject=shown(pair)) from None
    return WeightedSource(str(source), _number(weight, where=str(source)))


def _number(value: object, *, where: str) -> float:
    # YAML 1.1 reads "5e-1" as text; what Python takes for a number is meant as one.
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(
            f"weight {shown(value)} is not a number",
            subject=where,
            remedy="write one such as 0.5",
        ) from None


def _text(value: object, *, key: str, where: str) -> str:
    # YAML reads a folder's name such as 010 or 2024-01-01 as something else than its letters.
    if not isinstance(value, str):
        raise RecipeError(
            f"`{key}` is {shown(value)}, not text",
            subject=where,
            remedy="if it is a name, put it into quotes",
        )
    return value


def _known_keys(content: object, known: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RecipeError(
            f"must be a mapping with {', '.join(known)}, not {type(content).__name__}",
            subject=where,
        )
    for key in content:
        if key not in known:
            suggestion = _suggestion(key, known) if isinstance(key, str) else ""
            raise RecipeError(
                f"unknown key {shown(key)}{suggestion}",
                subject=where,
                remedy=f"known keys: {', '.join(known)}",
            )
    return content


def _suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; plain YAML would keep the last in silence.

    Aliases are refused, too: a few lines of them stand for more text than any memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                problem="aliases (*name) are not for recipes; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} is given twice",
                    problem_mark=key_node.start_mark,
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)
