"""The correspondence of tensors between models, or the reason they cannot be merged.

Works only on headers. Checkpoints of one class may differ in storage: parameters that share a
tensor, names of other programs and versions, and buffers that transformers computes.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardmix.conventions import naming
from shardmix.conventions.adapters import (
    ADAPTER_REMEDY,
    ADAPTER_RULE,
    adapter_tensor,
    is_of_adapter,
)
from shardmix.conventions.tensor_names import without_wrappers
from shardmix.dtypes import DTYPES, FLOAT_DTYPES, INTEGER_DTYPES
from shardmix.errors import MismatchError, ShardmixError, SourceError, listed
from shardmix.sources.base import Source

if TYPE_CHECKING:
    from shardmix.conventions.declarations import Declaration
    from shardmix.matching.ties import SharedTensors

_NUM_LISTED = 3
_HEADS = re.compile(r"(cls|lm_head|head|classifier|score|qa_outputs|pooler|\w+_head)\.")

# Integers that quantised codes are packed into (MLX, HQQ, quanto and others, each with names of
# its own). Models have matrices of int64 and booleans, but not of these.
_PACKING_DTYPES = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})


@dataclass(frozen=True, slots=True)
class MatchedTensors:
    """The tensors of the output, and the source of each in every model."""

    names: tuple[str, ...]
    """Names in the order of the first model's files; tensors that it does not store come last."""
    num_added: int
    """Number of those last ones."""
    shapes: tuple[tuple[int, ...], ...]
    """One shape a name, the same in every model."""
    rows: tuple[npt.NDArray[np.int32], ...]
    """For each model, for each name: the row in that model's tensor table."""
    untied: tuple[str, ...]
    """Parts of the output's config that must say `tie_word_embeddings: false`: "" is its top."""
    notes: tuple[str, ...]
    """Notes for the user on tensors that were left out or taken from elsewhere."""


QUANTISATION = "quantization_config"
"""The key in `allow_differences` of a quantisation that a config declares and no weight has."""

# Methods that quantise weights during use: beside floats their declaration is not stale.
_WHILE_RUNNING = frozenset({"bitnet"})


def check_mergeable(source: Source, allow_differences: Collection[str] = ()) -> None:
    """Raise `SourceError` if a model's weights cannot be averaged: quantised, FP8, complex.

    A quantisation that only the config declares is refused as well, unless it is among the keys of
    `allow_differences`.
    """
    text, table = source.text, source.tensors
    if not table.names:
        raise SourceError("holds no tensors", subject=text, remedy="fetch it again")
    tensor = adapter_tensor(table.names)
    names = [Path(file.name).name for file in source.identity.files[:1]]
    if tensor is not None or any(name.startswith("adapter_model") for name in names):
        found = f" (it holds {tensor})" if tensor is not None else ""
        raise SourceError(
            f"is an adapter, not a model{found}; {ADAPTER_RULE}",
            subject=text,
            remedy=ADAPTER_REMEDY,
        )
    finding = _unmergeable_tensor(source)
    declared = naming.declared_quantisation(source.config)
    if declared is not None and (finding is not None or declared[1] in _WHILE_RUNNING):
        raise SourceError(
            f"is quantised ({declared[1]}, in config.json); a weighted sum of quantised codes "
            "would be silently wrong",
            subject=text,
            remedy=naming.quantisation_remedy(declared[1]),
        )
    if declared is not None and QUANTISATION not in allow_differences:
        raise SourceError(
            f"config.json says that the model is quantised ({declared[1]}, in {declared[0]}), but "
            "none of its weights is: the key is stale",
            subject=text,
            remedy=f"remove it from config.json, or use --allow-differences {QUANTISATION} "
            "(allow_differences in a recipe or in Python), which leaves it out of the "
            "output",
        )
    if finding is not None:
        raise finding.of(text)


def _unmergeable_tensor(source: Source) -> SourceError | None:
    """Return the error for a tensor that cannot be averaged, or None if all of them can be."""
    table = source.tensors
    # One tensor of each kind is enough: 90,000 experts have few kinds.
    endings = [name.rpartition(".")[2] for name in table.names]
    columns = zip(table.dtype_ranks.tolist(), endings, map(len, table.shapes), strict=True)
    kinds = {kind: row for row, kind in enumerate(columns)}
    for (rank, ending, _), row in kinds.items():
        dtype, name = DTYPES[rank], table.names[row]
        if dtype not in FLOAT_DTYPES and dtype not in INTEGER_DTYPES:
            return SourceError(
                f"{name} {list(table.shapes[row])} is {dtype}; a weighted sum of it would be "
                "silently wrong",
                remedy="merge checkpoints in float16, bfloat16, float32 or float64",
            )
        packed = dtype in _PACKING_DTYPES and len(table.shapes[row]) >= 2
        if naming.marks_quantisation(ending, dtype) or (
            packed and not naming.is_computed_buffer(name)
        ):
            return SourceError(
                f"holds {name}, a mark of quantised weights; a weighted sum of quantised codes "
                "would be silently wrong",
                remedy="merge the unquantised checkpoints",
            )
    return None


def match_tensors(
    sources: Sequence[Source], out_config: Mapping[str, Any], out_folder: Path | None = None
) -> MatchedTensors:
    """Match all models' tensors by name, resolving ties.

    `out_config` is the output's config.json, from the model in `out_folder`. Raises `MismatchError`
    if tensors are missing, shapes differ, or floats meet integers.
    """
    notes: list[str] = []
    stored = [_own_names(source, notes) for source in sources]
    has_same_names = all(names == stored[0] for names in stored) or all(
        set(names) == set(stored[0]) for names in stored
    )
    ties = [_tie_statements(source.config) for source in sources]
    if has_same_names and ties.count(_tie_statements(out_config)) == len(ties):
        row_of = [_rows(names) for names in stored]
        found = _Resolved(list(stored[0]), row_of, [{} for _ in stored])
    else:
        found = _resolved(sources, stored, out_config, out_folder, notes)
    names = found.names
    rows = tuple(
        np.fromiter(
            (own[name] if name in own else elsewhere[name] for name in names),
            dtype=np.int32,
            count=len(names),
        )
        for own, elsewhere in zip(found.row_of, found.held, strict=True)
    )
    shapes = _common_shapes(sources, names, rows)
    _refuse_mixed_kinds(sources, names, rows)
    return MatchedTensors(
        names=tuple(_written_names(names, stored, found.row_of)),
        num_added=found.num_added,
        shapes=shapes,
        rows=rows,
        untied=found.untied,
        notes=tuple(notes),
    )


class _Resolved(NamedTuple):
    """Names of the output, and the rows of tensors that models hold by other names."""

    names: list[str]
    row_of: list[dict[str, int]]
    held: Sequence[Mapping[str, int]]
    num_added: int = 0
    untied: tuple[str, ...] = ()


def _resolved(
    sources: Sequence[Source],
    stored: Sequence[Sequence[str]],
    out_config: Mapping[str, Any],
    out_folder: Path | None,
    notes: list[str],
) -> _Resolved:
    """Match models that differ in names, or in their statements on ties."""
    from shardmix.conventions.declarations import declaration_of  # most merges need none of these
    from shardmix.matching.ties import NamedModel, share

    declarations = [declaration_of(source.config, source.folder) for source in sources]
    known = names_of_class(stored, declarations)
    row_of = [_rows(names) for names in known]
    partial = _names_not_in_all(row_of)
    if partial and all(set(names) == set(stored[0]) for names in stored):
        # Their classes read the same names as different parameters.
        known, row_of, partial = list(stored), [_rows(names) for names in stored], []
    computed = {name for name in partial if naming.is_computed_buffer(name)}
    if computed:
        notes.append(
            f"left out {_listed(sorted(computed))}: not in every model; transformers computes "
            "it by itself"
        )
    models = [
        NamedModel(source.config, declaration, rows)
        for source, declaration, rows in zip(sources, declarations, row_of, strict=True)
    ]
    output = NamedModel(out_config, declaration_of(out_config, out_folder), row_of[0])
    shared = share(models, output, [name for name in partial if name not in computed])
    names = [*(name for name in known[0] if name not in computed), *shared.added]
    _refuse_missing(sources, row_of, shared.rows, names, declarations)
    notes += _notes_of(shared)
    return _Resolved(names, row_of, shared.rows, len(shared.added), shared.untied)


def _rows(names: Sequence[str]) -> dict[str, int]:
    return {name: row for row, name in enumerate(names)}


def _own_names(source: Source, notes: list[str]) -> Sequence[str]:
    """Return a model's names without the parts that wrappers of modules add."""
    names = source.tensors.names
    plain = without_wrappers(names)
    if plain is names:
        return names
    if len(set(plain)) != len(plain):
        raise SourceError(
            "stores tensors both with a wrapper's name in theirs (_orig_mod., module.) and "
            "without it",
            subject=source.text,
            remedy="save the model again, without the wrapper",
        )
    changed = next(name for name, own in zip(names, plain, strict=True) if name != own)
    notes.append(
        f"{source.text}: has a wrapper's name in those of its tensors ({changed}), which "
        "loaders don't read; the output has them without it"
    )
    return plain


def _tie_statements(config: Mapping[str, Any]) -> tuple[object, ...]:
    """Return all statements of a config that may concern ties."""
    return tuple(
        (key, str(part[key]))
        for part in naming.config_parts(config)
        for key in sorted(part)
        if key in ("model_type", "architectures") or key.startswith("tie_")
    )


def names_of_class(
    stored: Sequence[Sequence[str]], declarations: Sequence["Declaration"]
) -> list[Sequence[str]]:
    """Return all models' names in their classes' form, spelled as in the first one."""
    from shardmix.conventions.tensor_names import aligned, class_names, prefix_of

    first = class_names(stored[0], declarations[0])
    others = set(first)
    found = [first]
    for names, declaration in zip(stored[1:], declarations[1:], strict=True):
        own = class_names(names, declaration)
        prefix = declaration.prefix or declarations[0].prefix or prefix_of(own, others)
        shared = {
            f"{tie.at}.{name}" if tie.at else name
            for tie in declaration.ties
            for pair in tie.pairs
            for name in pair
        }
        found.append(aligned(own, others, prefix, shared))
    return found


def _written_names(
    names: Sequence[str], stored: Sequence[Sequence[str]], row_of: Sequence[Mapping[str, int]]
) -> list[str]:
    """Return the names that the output stores, as the first model with each tensor has them."""
    written = []
    for name in names:
        owner = next((model for model, rows in enumerate(row_of) if name in rows), None)
        written.append(name if owner is None else stored[owner][row_of[owner][name]])
    return written


def _notes_of(shared: "SharedTensors") -> list[str]:
    if not shared.split:
        return []
    told = f"{_listed(shared.split)}: stored by some models and shared with another parameter in "
    if shared.untied:
        where = ", ".join(part or "its config" for part in shared.untied)
        return [
            f"{told}others; the output stores the mean of each, and {where} says "
            f"{naming.TIE_KEY}: false"
        ]
    if shared.is_kept_tied:
        return [
            f"{told}others; the output stores the mean of each, which transformers 5 and newer "
            "read beside a config that ties them"
        ]
    return [f"{told}others; the output stores the mean of each"]


def _names_not_in_all(row_of: Sequence[Mapping[str, int]]) -> list[str]:
    union = dict.fromkeys(name for rows in row_of for name in rows)
    return [name for name in union if not all(name in rows for rows in row_of)]


def _refuse_missing(
    sources: Sequence[Source],
    row_of: Sequence[Mapping[str, int]],
    shared: Sequence[Mapping[str, int]],
    names: Sequence[str],
    declarations: Sequence["Declaration"],
) -> None:
    def lacks(model: int) -> list[str]:
        return [name for name in names if name not in row_of[model] and name not in shared[model]]

    for model in range(len(sources)):
        missing = lacks(model)
        if not missing:
            continue
        # Name two models: the one that lacks tensors, and one that has the first of them.
        other = next((i for i, rows in enumerate(row_of) if missing[0] in rows), 0)
        here, there = sources[model].text, sources[other].text
        only_there = [name for name in missing if name in row_of[other]]
        only_here = [name for name in lacks(other) if name in row_of[model]]
        raise MismatchError(
            f"tensor sets differ: only in {there}: {_listed(only_there)}; only in {here}: "
            f"{_listed(only_here)}; models of a merge must have one architecture and the same "
            f"tensor names{_hint(only_there, only_here)}"
            f"{_unknown_class(sources[model], declarations[model])}",
            remedy=_way_on([*only_there, *only_here]),
        )


def _way_on(names: Sequence[str]) -> str:
    """Return the remedy for models that differ in these names."""
    wrapped = next((name for name in names if is_of_adapter(name)), None)
    if wrapped is not None:
        return (
            f"load the model that holds {wrapped} in PEFT, since its adapter is not merged into "
            "its weights, and save it with merge_and_unload() and save_pretrained()"
        )
    return (
        "if they are of one architecture, load them with one class of transformers (AutoModel, or "
        "the one that you will use) and save them again with save_pretrained"
    )


def _hint(only_there: Sequence[str], only_here: Sequence[str]) -> str:
    """Return the likely reason for a difference in names, or "" if unknown."""
    names = [*only_there, *only_here]
    if not (only_there and only_here) and all(".pooler." in f".{name}" for name in names):
        return " (one has a pooler, the other was saved without: add_pooling_layer=False)"
    if names and all(map(_HEADS.match, names)):
        return " (one has the output head of a task that the other lacks)"
    return ""


def _unknown_class(source: Source, declaration: "Declaration") -> str:
    if declaration.is_known or declaration.is_conventional:
        return ""
    return (
        f" ({source.text}: its class is not known here, nor to an installed transformers, so "
        "that parameters which share a tensor cannot be told)"
    )


def _common_shapes(
    sources: Sequence[Source],
    names: Sequence[str],
    rows: Sequence[npt.NDArray[np.int32]],
) -> tuple[tuple[int, ...], ...]:
    all_shapes = [
        list(map(source.tensors.shapes.__getitem__, model_rows.tolist()))
        for source, model_rows in zip(sources, rows, strict=True)
    ]
    first = all_shapes[0]
    for source, shapes in zip(sources[1:], all_shapes[1:], strict=True):
        if shapes == first:
            continue
        name, mine, other = next(
            (name, mine, other)
            for name, mine, other in zip(names, first, shapes, strict=True)
            if mine != other
        )
        remedy, tokens = "merge models of one architecture", ""
        if naming.has_vocabulary_axis(name) and mine[1:] == other[1:]:
            remedy = (
                "map their rows by token with --tokenizer-source base or union (tokenizer_source "
                "in a recipe or in Python)"
            )
            tokens = _differing_tokens(sources[0], source)
        raise MismatchError(
            f"{list(mine)} in {sources[0].text}, {list(other)} in {source.text}{tokens}; shapes "
            "must match",
            subject=name,
            remedy=remedy,
        )
    return tuple(first)


def _differing_tokens(one: Source, other: Source) -> str:
    """Describe the tokens that only one of two models has; "" if a tokenizer cannot be read."""
    from shardmix.matching.model_tokens import differing_tokens, read_model_tokens
    from shardmix.matching.tokenizers import TokenizerFolder

    try:
        read = [
            read_model_tokens(TokenizerFolder(source.text, source.folder), max_memory=None)
            for source in (one, other)
        ]
        return f" ({differing_tokens(*read)})"
    except ShardmixError:
        return ""


def _refuse_mixed_kinds(
    sources: Sequence[Source],
    names: Sequence[str],
    rows: Sequence[npt.NDArray[np.int32]],
) -> None:
    is_float_rank = np.array([dtype in FLOAT_DTYPES for dtype in DTYPES])
    ranks = [
        source.tensors.dtype_ranks[model_rows]
        for source, model_rows in zip(sources, rows, strict=True)
    ]
    first = is_float_rank[ranks[0]]
    for source, model_ranks in zip(sources[1:], ranks[1:], strict=True):
        differing = np.flatnonzero(is_float_rank[model_ranks] != first)
        if differing.size:
            at = int(differing[0])
            raise MismatchError(
                f"{DTYPES[ranks[0][at]]} in {sources[0].text}, {DTYPES[model_ranks[at]]} in "
                f"{source.text}; integers and floats cannot be averaged with one another",
                subject=names[at],
                remedy="convert one of the models",
            )


def _listed(names: Sequence[str]) -> str:
    return listed(names, _NUM_LISTED) or "none"
