"""Examples, read from JSON or JSON lines and checked; errors name line and field.

Knows texts, not tokens; runs before any model is opened.
"""

import json
import random
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmix.conventions.model_types import PAIRS
from shardmix.errors import RecipeError, one_line, shown
from shardmix.scoring.options import ScoreSettings

_MAX_FILE_NBYTES = 8_000_000  # as Python objects, JSON may take 26 times as much


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text and its expected continuation, for decoders and encoder-decoders."""

    name: str
    """Its name in messages: its file and line, or its number."""
    input: str
    """The prompt."""
    output: str
    """The text whose loss is computed."""


@dataclass(frozen=True, slots=True)
class QueryExample:
    """A query, a passage that answers it, and others that do not, for encoders and rerankers."""

    name: str
    """Its name in messages: its file and line, or its number."""
    query: str
    positive: str
    negatives: tuple[str, ...]


Example = TextExample | QueryExample
ExamplesArgument = str | Path | Iterable[Mapping[str, Any]] | tuple[Example, ...]


def load_examples(examples: ExamplesArgument, settings: ScoreSettings) -> tuple[Example, ...]:
    """Return the checked examples of a file or of a list of mappings.

    A file holds a JSON list, JSON lines, or a JSON object from task names to lists. Decoders and
    encoder-decoders take `{"input": str, "output": str}`; encoders and rerankers take `{"query":
    str, "pos": [str, ...], "neg": [str, ...]}`, of which the first positive counts. Negatives are
    drawn here, once for all models. Raises `RecipeError`.
    """
    if isinstance(examples, tuple) and examples and isinstance(examples[0], Example):
        return _loaded(examples, settings)
    if isinstance(examples, str | Path):
        named = _read_file(Path(examples))
    else:
        try:
            named = [(f"example {number}", item) for number, item in enumerate(examples, start=1)]
        except TypeError:
            raise RecipeError(
                f"{type(examples).__name__} given",
                subject="examples",
                remedy="give a list of examples or a file",
            ) from None
    if not named:
        raise RecipeError("no examples given", remedy="give a few, five or so")
    draw = random.Random(settings.seed)
    if settings.type.reads.takes_queries:
        queries = [_query_example(name, item, settings, draw) for name, item in named]
        _check_comparable(queries, settings)
        return tuple(queries)
    return tuple(_text_example(name, item) for name, item in named)


def _loaded(examples: tuple[Example, ...], settings: ScoreSettings) -> tuple[Example, ...]:
    """Return examples that are loaded already; refuse those of another kind of model."""
    kind = QueryExample if settings.type.reads.takes_queries else TextExample
    for example in examples:
        if not isinstance(example, kind):
            raise RecipeError(
                f"is a {type(example).__name__}; a model of type {settings.model_type} takes a "
                f"{kind.__name__}",
                subject=example.name,
                remedy="load the examples with this model type",
            )
    return examples


def _read_file(path: Path) -> list[tuple[str, Any]]:
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise RecipeError(
                "is neither a file nor a pipe", subject=path, remedy="name a file of examples"
            )
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_NBYTES + 1)
        if len(content) > _MAX_FILE_NBYTES:
            raise RecipeError(
                f"has more than {_MAX_FILE_NBYTES} bytes",
                subject=path,
                remedy="leave a few examples in it, which are enough",
            )
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"cannot be read ({error.strerror})", subject=path, remedy="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"is not UTF-8 text (byte {error.start})", subject=path, remedy="save it as UTF-8"
        ) from None
    except ValueError as error:  # a path with a NUL
        raise RecipeError(
            f"cannot be a path ({error})", subject=f"{str(path)!r}", remedy="check it"
        ) from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _read_lines(path, text)
    if isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values()):
        if not {"query", "pos", "neg", "input", "output"} & set(whole):
            return [
                (f"{path}: {task}[{number}]", item)
                for task, items in whole.items()
                for number, item in enumerate(items, start=1)
            ]
    elif isinstance(whole, list):
        return [(f"{path}: example {number}", item) for number, item in enumerate(whole, start=1)]
    return [(f"{path}: example 1", whole)]  # one line of JSON lines


def _read_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    named = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            named.append((f"{path}: line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"not valid JSON ({one_line(error)})",
                subject=f"{path}: line {number}",
                remedy="write a JSON list of examples, or one example a line",
            ) from None
    return named


def _text_example(name: str, item: object) -> TextExample:
    fields = _mapping(name, item, needed="`input` and `output`")
    output = _text(name, fields, "output")
    if not output.strip():
        raise RecipeError(
            "`output` is empty; the loss is computed over it",
            subject=name,
            remedy="write what is wanted",
        )
    return TextExample(name, _text(name, fields, "input"), output)


def _query_example(
    name: str, item: object, settings: ScoreSettings, draw: random.Random
) -> QueryExample:
    fields = _mapping(name, item, needed="`query`, `pos` and `neg`")
    query = _text(name, fields, "query")
    positives = _texts(name, fields, "pos")
    if not positives:
        raise RecipeError(
            "`pos` is empty", subject=name, remedy="give a passage that answers the query"
        )
    negatives = _texts(name, fields, "neg")
    if len(negatives) > settings.neg_number:
        negatives = draw.sample(negatives, settings.neg_number)
    return QueryExample(name, query, positives[0], tuple(negatives))


def _check_comparable(examples: Sequence[QueryExample], settings: ScoreSettings) -> None:
    """Refuse a query without anything to compare: its loss would be 0 for any model."""
    num_compared = 1 if settings.type.reads == PAIRS else settings.batch_size
    for start in range(0, len(examples), num_compared):
        batch = examples[start : start + num_compared]
        if len(batch) == 1 and not batch[0].negatives:
            raise RecipeError(
                "`neg` gives no negatives, and nothing else is in its batch",
                subject=batch[0].name,
                remedy="give at least one passage that does not answer the query",
            )


def _mapping(name: str, item: object, *, needed: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise RecipeError(f"must be an object with {needed}, not {shown(item)}", subject=name)
    return item


def _text(name: str, fields: Mapping[str, Any], key: str) -> str:
    if key not in fields:
        raise RecipeError(
            f"`{key}` is missing; it has {', '.join(map(shown, list(fields)[:9])) or 'nothing'}",
            subject=name,
            remedy="add it",
        )
    value = fields[key]
    if not isinstance(value, str):
        raise RecipeError(f"`{key}` must be a text, not {shown(value)}", subject=name)
    _check_unicode(name, key, value)
    return value


def _texts(name: str, fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key, [] if key == "neg" else None)
    if isinstance(value, str) or not isinstance(value, Sequence):
        finding = f"not {shown(value)}" if key in fields else "but is missing"
        raise RecipeError(f"`{key}` must be a list of texts, {finding}", subject=name)
    for text in value:
        if not isinstance(text, str):
            raise RecipeError(f"`{key}` must hold only texts, not {shown(text)}", subject=name)
        _check_unicode(name, key, text)
    return list(value)


def _check_unicode(name: str, key: str, text: str) -> None:
    """Refuse half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"`{key}` is not valid Unicode (character {error.start})",
            subject=name,
            remedy="write the text again",
        ) from None
