"""The vocabulary that a recipe asks for: whose tokens the output has, and the rows of some."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardmix.errors import RecipeError, shown

REFUSE = "refuse"
"""Models with other vocabularies are refused, as if no source was named."""
BASE = "base"
"""The tokens of the base model, or of the first one."""
UNION = "union"
"""The base's tokens, then those that other models have besides."""
MOST_PADDING = 65_536
"""Largest multiple that a number of rows is raised to."""
_MOST_TOKENS = 10_000
_KEYS = ("source", "tokens", "pad_to_multiple_of", "base")
_TOKEN_KEYS = ("source", "force")
_ROW_KEYS = ("kind", "model", "token", "token_id")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The row that a token takes in models that lack it."""

    token: str
    """The token."""
    model: str | None = None
    """The model whose row it is; None for zeros."""
    of_token: str | None = None
    """The token there that has the row; None for the same token."""
    of_id: int | None = None
    """The id there that has the row, instead of a token."""
    force: bool = False
    """True if models that have the token take this row as well."""


@dataclass(frozen=True, slots=True)
class RecipeTokenizer:
    """A vocabulary for the output. Models are named as in the recipe."""

    source: str = UNION
    """BASE, UNION, or a model of the recipe."""
    tokens: tuple[TokenRow, ...] = ()
    """Rows of single tokens; tokens that the output would not have are added."""
    pad_to_multiple_of: int | None = None
    """The number of rows is the next multiple of this; None: as many as the source has, or needs
    for its tokens."""
    base: str | None = None
    """The model that BASE means and that gives rows that others lack; None: the base model, or the
    first of the models, which gives no rows."""

    def renamed(self, names: Mapping[str, str]) -> "RecipeTokenizer":
        """Return the same with other names for the models."""

        def new(name: str | None) -> str | None:
            return None if name is None else names.get(name, name)

        return replace(
            self,
            source=names.get(self.source, self.source),
            tokens=tuple(replace(row, model=new(row.model)) for row in self.tokens),
            base=new(self.base),
        )


ReadSource = Callable[..., str]


def tokenizer_of(
    top: Mapping[str, Any],
    read_source: ReadSource,
    known_keys: Callable[[object, Sequence[str], str], dict[str, Any]],
    where: str,
) -> RecipeTokenizer | None:
    """Return what a recipe's keys `tokenizer_source` and `tokenizer` ask for; None for nothing.

    `read_source` and `known_keys` read a model's name and a mapping. Raises `RecipeError`.
    """
    source, content = top.get("tokenizer_source"), top.get("tokenizer")
    if source is not None and content is not None:
        raise RecipeError(
            "`tokenizer_source` and `tokenizer` are both given",
            subject=where,
            remedy="put the source into `tokenizer`, as its `source`",
        )
    if content is None:
        if source is None:
            return None
        name = read_source(source, key="tokenizer_source", where=where)
        return None if name == REFUSE else RecipeTokenizer(name)
    known = known_keys(content, _KEYS, f"{where}: tokenizer")
    name = UNION
    if known.get("source") is not None:
        name = read_source(known["source"], key="tokenizer.source", where=where)
    tokens = known.get("tokens")
    padding = known.get("pad_to_multiple_of")
    base = None
    if known.get("base") is not None:
        base = read_source(known["base"], key="tokenizer.base", where=where)
    found = RecipeTokenizer(
        name,
        () if tokens is None else _tokens(tokens, read_source, known_keys, f"{where}: tokenizer"),
        None if padding is None else checked_padding(padding, where=f"{where}: tokenizer"),
        base,
    )
    if name == REFUSE:
        if found != RecipeTokenizer(REFUSE):
            raise RecipeError(
                "`source: refuse` maps no tokens, so that nothing else has an effect",
                subject=f"{where}: tokenizer",
                remedy="name base, union or a model as its source",
            )
        return None
    return found


def _tokens(
    content: object, read_source: ReadSource, known_keys: Any, where: str
) -> tuple[TokenRow, ...]:
    if not isinstance(content, dict):
        raise RecipeError(
            f"`tokens` is {shown(content)}; it must be a mapping, token to {{source: ...}}",
            subject=where,
        )
    if len(content) > _MOST_TOKENS:
        raise RecipeError(
            f"`tokens` has {len(content)} entries; it must be at most {_MOST_TOKENS}", subject=where
        )
    rows = []
    for token, entry in content.items():
        if not isinstance(token, str) or not token:
            raise RecipeError(
                f"`tokens` has {shown(token)}, which is no token",
                subject=where,
                remedy="put it into quotes",
            )
        rows.append(_token_row(token, entry, read_source, known_keys, where))
    return tuple(rows)


def _token_row(
    token: str, entry: object, read_source: ReadSource, known_keys: Any, where: str
) -> TokenRow:
    where = f"{where}: tokens[{shown(token)}]"
    known = known_keys(entry, _TOKEN_KEYS, where)
    force = known.get("force")
    if not isinstance(force, bool | None):
        raise RecipeError(f"`force` is {shown(force)}; it must be true or false", subject=where)
    source = known.get("source")
    if source is None:
        raise RecipeError(
            "`source` is missing",
            subject=where,
            remedy="name a model, {kind: zero}, or {kind: model_token, model: ..., token: ...}",
        )
    if not isinstance(source, dict) or "kind" not in source:
        model = read_source(source, key="source", where=where)
        return TokenRow(token, model, force=bool(force))
    row = known_keys(source, _ROW_KEYS, where)
    if row["kind"] == "zero":
        if len(row) > 1:
            raise RecipeError("`kind: zero` must be the only key of its source", subject=where)
        return TokenRow(token, force=bool(force))
    if row["kind"] != "model_token":
        raise RecipeError(
            f"`kind` is {shown(row['kind'])}; it must be zero or model_token", subject=where
        )
    if row.get("model") is None:
        raise RecipeError("`model` is missing", subject=where, remedy="name the model with the row")
    model = read_source(row["model"], key="model", where=where)
    of_token, of_id = row.get("token"), row.get("token_id")
    if (of_token is None) == (of_id is None):
        raise RecipeError(
            "takes either `token` or `token_id`", subject=where, remedy="give one of the two"
        )
    if of_token is not None and not isinstance(of_token, str):
        raise RecipeError(
            f"`token` is {shown(of_token)}, not text", subject=where, remedy="put it into quotes"
        )
    if of_id is not None and (isinstance(of_id, bool) or not isinstance(of_id, int) or of_id < 0):
        raise RecipeError(
            f"`token_id` is {shown(of_id)}; it must be a whole number from 0", subject=where
        )
    return TokenRow(token, model, of_token, of_id, force=bool(force))


def checked_padding(value: object, *, where: str = "") -> int:
    """Return a multiple that rows are padded to. Raises `RecipeError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PADDING:
        raise RecipeError(
            f"`pad_to_multiple_of` is {shown(value)}; it must be a whole number from 1 to "
            f"{MOST_PADDING}",
            subject=where,
            remedy="give one such as 64",
        )
    return value


def tokenizer_entries(tokenizer: RecipeTokenizer | None) -> dict[str, Any]:
    """Return the keys of a recipe that ask for this."""
    if tokenizer is None:
        return {}
    if tokenizer == RecipeTokenizer(tokenizer.source):
        return {"tokenizer_source": tokenizer.source}
    content: dict[str, Any] = {"source": tokenizer.source}
    if tokenizer.tokens:
        content["tokens"] = {row.token: _entry(row) for row in tokenizer.tokens}
    if tokenizer.pad_to_multiple_of is not None:
        content["pad_to_multiple_of"] = tokenizer.pad_to_multiple_of
    if tokenizer.base is not None:
        content["base"] = tokenizer.base
    return {"tokenizer": content}


def _entry(row: TokenRow) -> dict[str, Any]:
    source: object = row.model
    if row.model is None:
        source = {"kind": "zero"}
    elif row.of_token is not None:
        source = {"kind": "model_token", "model": row.model, "token": row.of_token}
    elif row.of_id is not None:
        source = {"kind": "model_token", "model": row.model, "token_id": row.of_id}
    return {"source": source, **({"force": True} if row.force else {})}
