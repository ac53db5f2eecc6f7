"""mergekit's recipe language, in YAML and JSON: read strictly, and written.

A key that is unknown, or of a feature that shardmix does not have, is refused by name. Values of
parameters are checked later, by the method's declarations.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from shardmix.errors import RecipeError, is_unicode, one_line, shown
from shardmix.methods import task_arithmetic
from shardmix.methods.base import Value
from shardmix.methods.registry import METHODS
from shardmix.recipe.parameters import suggestion
from shardmix.recipe.recipe import Choice, Recipe, RecipeModel, Setting, Settings, plain_value
from shardmix.recipe.tokenizer import tokenizer_entries, tokenizer_of
from shardmix.system.files import read_regular
from shardmix.system.units import parse_size

RECIPE_SUFFIXES = (".yaml", ".yml")
_MAX_RECIPE_NBYTES = 128 * 1024
# PyYAML raises these if a value does not fit its tag: `!!int ""`, `!!bool maybe`, ...
_YAML_STUMBLES = (ValueError, TypeError, LookupError, AttributeError)
_TEXT_KEYS = (
    *("merge_method", "dtype", "out_dtype"),
    *("quantize", "config_from", "model_type", "pooling"),
)
_KEYS = (
    *("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype"),
    *("quantize", "config_from", "max_shard_size", "model_type", "allow_differences", "pooling"),
    *("as_adapter", "rank", "energy", "skip_others"),
    *("tokenizer_source", "tokenizer"),
)
_MODEL_KEYS = ("model", "parameters")
_REFUSED = {
    "slices": ("merging by layers is not supported yet", "give whole models under `models`"),
    "modules": ("merging module by module is not supported yet", "give models under `models`"),
    "chat_template": (
        "a chat template is not changed",
        "leave it out: it comes from the model that `config_from` names",
    ),
    "seed": ("no method draws random numbers yet", "leave it out"),
    "name": ("recipes that build on one another are not supported yet", "give one recipe a file"),
    "allow_weight_sum": ("the sum of weights is not checked in a recipe", "leave it out"),
}


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
    except yaml.composer.ComposerError as error:
        is_second = "single document" in str(error)
        raise RecipeError(
            f"not valid YAML: {one_line(error, limit=300)}",
            subject=path,
            remedy="recipes that build on one another are not supported yet: give one a file"
            if is_second
            else "mend it there",
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(
            f"not valid YAML: {one_line(error, limit=300)}", subject=path, remedy="mend it there"
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
    """Build a recipe, unchecked, from parsed YAML or JSON. Raises `RecipeError`."""
    top = _known_keys(content, _KEYS, origin)
    entries = top.get("models")
    if not isinstance(entries, list):
        raise RecipeError(
            "`models` must be a list of {model: ..., parameters: ...}, one a model", subject=origin
        )
    models = []
    for number, entry in enumerate(entries, start=1):
        where = f"{origin}: models[{number}]"
        known = _known_keys(entry, _MODEL_KEYS, where)
        if known.get("model") is None:
            raise RecipeError("`model` is missing", subject=where, remedy="name a folder or Hub id")
        source = _source(known["model"], key="model", where=where)
        models.append(RecipeModel(source, settings(known.get("parameters"), where=where)))
    options: dict[str, Any] = {
        key: _text(top[key], key=key, where=origin)
        for key in _TEXT_KEYS
        if top.get(key) is not None
    }
    if top.get("base_model") is not None:
        options["base_model"] = _source(top["base_model"], key="base_model", where=origin)
    if top.get("allow_differences") is not None:
        options["allow_differences"] = difference_keys(top["allow_differences"], where=origin)
    if top.get("max_shard_size") is not None:
        options["max_shard_size"] = parse_size(top["max_shard_size"])
    options |= _of_adapter(top, origin)
    options["tokenizer"] = tokenizer_of(top, _source, _known_keys, origin)
    parameters = settings(top.get("parameters"), where=origin)
    return Recipe(tuple(models), parameters=parameters, **options)


def _of_adapter(top: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the keys of a recipe for an adapter; its method need not be named."""
    found: dict[str, Any] = {}
    for key, kind, what in (
        ("as_adapter", bool, "true or false"),
        ("rank", int, "a whole number"),
        ("energy", (int, float), "a number"),
        ("skip_others", bool, "true or false"),
    ):
        value = top.get(key)
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise RecipeError(f"`{key}` is {shown(value)}; it must be {what}", subject=origin)
        found[key] = value
    if found.get("as_adapter") and top.get("merge_method") is None:
        found["merge_method"] = task_arithmetic.NAME
    return found


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the mapping that `recipe_from_dict` makes this recipe of, for YAML and JSON."""
    content: dict[str, Any] = {
        "merge_method": recipe.merge_method,
        "models": [
            {"model": model.source, **_parameters_entry(model.parameters)}
            for model in recipe.models
        ],
    }
    if recipe.base_model is not None:
        content["base_model"] = recipe.base_model
    content |= _parameters_entry(recipe.parameters)
    for key in _KEYS[_KEYS.index("dtype") : _KEYS.index("tokenizer_source")]:
        value = getattr(recipe, key)
        if value:
            content[key] = list(value) if isinstance(value, tuple) else value
    return content | tokenizer_entries(recipe.tokenizer)


def _parameters_entry(settings: Settings) -> dict[str, Any]:
    if not settings:
        return {}
    return {"parameters": {setting.name: plain_value(setting) for setting in settings}}


def settings(values: object, *, where: str) -> Settings:
    """Return settings from a mapping of parameters to values, gradients or filters.

    The values are as in the file; `parameters.checked_settings` gives them their types.
    """
    if values is None:
        return ()
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"`parameters` is {shown(values)}; it must be a mapping, such as {{weight: 0.5}}",
            subject=where,
        )
    given = {name: value for name, value in values.items() if value is not None}
    return tuple(_setting(str(name), value, where=where) for name, value in given.items())


def _setting(name: str, value: object, *, where: str) -> Setting:
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple):
        return Setting(name, (Choice((cast("Value", value),)),))
    if not entries:
        raise RecipeError(f"`{name}` is an empty list", subject=where, remedy="give it a value")
    if not any(isinstance(entry, Mapping) for entry in entries):
        return Setting(name, (Choice(tuple(entries)),))
    return Setting(name, tuple(_choice(name, entry, where=where) for entry in entries))


def _choice(name: str, entry: object, *, where: str) -> Choice:
    known = _known_keys(entry, ("filter", "value"), f"{where}: {name}")
    if known.get("value") is None:
        raise RecipeError(
            f"`value` is missing in {shown(entry)}",
            subject=f"{where}: {name}",
            remedy="give the filter a value",
        )
    text = known.get("filter")
    if text is not None:
        text = _text(text, key="filter", where=f"{where}: {name}")
    value = known["value"]
    points = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not points:
        raise RecipeError(
            "`value` is an empty list", subject=f"{where}: {name}", remedy="give it a value"
        )
    return Choice(points, None if text == "*" else text)


def difference_keys(value: object, *, where: str = "recipe") -> tuple[str, ...]:
    """Return the keys of `allow_differences`, sorted, each once.

    `value` is a list of keys; text may hold several, separated by commas. Raises `RecipeError`.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple | set | frozenset):
        raise RecipeError(
            f"`allow_differences` is {shown(value)}; it must be a list of keys, such as "
            "[num_attention_heads, tokenizer]",
            subject=where,
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


def _source(value: object, *, key: str, where: str) -> str:
    """Return a model's source from text, {path, revision}, or {model: either, lora: either}.

    An adapter, `lora`, follows a `+`.
    """
    if isinstance(value, dict):
        if "model" in value:
            known = _known_keys(value, ("model", "lora"), f"{where}: {key}")
            model = _source(known["model"], key=f"{key}.model", where=where)
            if known.get("lora") is None:
                return model
            return f"{model}+{_source(known['lora'], key=f'{key}.lora', where=where)}"
        known = _known_keys(value, ("path", "revision"), f"{where}: {key}")
        path = _source(known.get("path"), key=f"{key}.path", where=where)
        revision = known.get("revision")
        if revision is None:
            return path
        return f"{path}@{_text(revision, key=f'{key}.revision', where=where)}"
    return _text(value, key=key, where=where)


def _text(value: object, *, key: str, where: str) -> str:
    # YAML reads a folder name such as 010 or 2024-01-01 as a number or a date.
    if not isinstance(value, str):
        raise RecipeError(
            f"`{key}` is {shown(value)}, not text",
            subject=where,
            remedy="if it is a name, put it into quotes",
        )
    return value


def _known_keys(content: object, known: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise RecipeError(
            f"must be a mapping with {', '.join(known)}, not {type(content).__name__}",
            subject=where,
        )
    for key in content:
        if key in known:
            continue
        if isinstance(key, str) and known is _KEYS and key in _REFUSED:
            finding, remedy = _REFUSED[key]
            raise RecipeError(f"`{key}`: {finding}", subject=where, remedy=remedy)
        if "parameters" in known and key in _PARAMETER_NAMES:
            raise RecipeError(
                f"`{key}` is a parameter", subject=where, remedy="put it under `parameters`"
            )
        near = suggestion(key, known) if isinstance(key, str) else ""
        raise RecipeError(
            f"unknown key {shown(key)}{near}",
            subject=where,
            remedy=f"known keys: {', '.join(known)}",
        )
    return content


_PARAMETER_NAMES = frozenset(
    parameter.name for method in METHODS.values() for parameter in method.parameters
)


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice. Plain YAML would silently use the last.

    It also refuses aliases, since a few lines of them can stand for more text than fits in memory.
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
