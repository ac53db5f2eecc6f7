"""Which tensor of one model corresponds to which of another, or why they cannot be merged.

Works on headers alone. Handles what transformers leaves out of a checkpoint: tied parameters and
buffers that it computes by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardmix import naming
from shardmix.checkpoint import Checkpoint
from shardmix.errors import MismatchError, SourceError
from shardmix.safetensors_layout import DTYPES, FLOAT_DTYPES, INTEGER_DTYPES

_NUM_LISTED = 3

# Integers that quantised codes are packed into (MLX, HQQ, quanto and others, each with names of its
# own). Models have matrices of int64 and booleans, but not of these.
_PACKING_DTYPES = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})


@dataclass(frozen=True, slots=True)
class MatchedTensors:
    """The tensors of the output, and where each comes from in every model."""

    names: tuple[str, ...]
    """In the order of the first model's files; a head that it lacks comes last."""
    shapes: tuple[tuple[int, ...], ...]
    """One shape a name, the same in every model."""
    rows: tuple[npt.NDArray[np.int32], ...]
    """For each model, for each name: the row in that model's tensor table."""
    untie_word_embeddings: bool
    """The output must say that its head is not tied, since some model's isn't."""
    notes: tuple[str, ...]
    """What was left out or taken from elsewhere, for the user."""


def check_mergeable(checkpoint: Checkpoint) -> None:
    """Raise `SourceError` where a model's weights are none to average: quantised, FP8, complex."""
    source, table = checkpoint.source, checkpoint.table
    if not table.names:
        raise SourceError(f"{source}: holds no tensors")
    method = naming.quantisation_method(checkpoint.config)
    if method is not None:
        raise SourceError(
            f"{source}: is quantised ({method}, in config.json); a weighted sum of quantised codes "
            "would be silently wrong: merge the unquantised checkpoints"
        )
    # One tensor of each kind is enough to look at: 90,000 experts have few.
    endings = [name.rpartition(".")[2] for name in table.names]
    columns = zip(table.dtype_ranks.tolist(), endings, map(len, table.shapes), strict=True)
    kinds = {kind: row for row, kind in enumerate(columns)}
    for (rank, ending, _), row in kinds.items():
        dtype, name = DTYPES[rank], table.names[row]
        if dtype not in FLOAT_DTYPES and dtype not in INTEGER_DTYPES:
            raise SourceError(
                f"{source}: {name} {list(table.shapes[row])} is {dtype}; a weighted sum of it "
                "would be silently wrong: merge checkpoints in float16, bfloat16, float32 or "
                "float64"
            )
        packed = dtype in _PACKING_DTYPES and len(table.shapes[row]) >= 2
        if naming.marks_quantisation(ending, dtype) or (
            packed and not naming.is_computed_buffer(name)
        ):
            raise SourceError(
                f"{source}: holds {name}, a mark of quantised weights; a weighted sum of quantised "
                "codes would be silently wrong: merge the unquantised checkpoints"
            )


def match_tensors(checkpoints: Sequence[Checkpoint], *, base_tied: bool | None) -> MatchedTensors:
    """Match all models' tensors by name, resolving ties.

    `base_tied` is what the output's config will say of `tie_word_embeddings`. Raises
    `MismatchError` where tensors are missing, shapes differ, or floats meet integers.
    """
    row_of = [
        {name: row for row, name in enumerate(checkpoint.table.names)} for checkpoint in checkpoints
    ]
    notes: list[str] = []
    names = list(checkpoints[0].table.names)
    partial = _names_not_in_all(row_of)
    left_out = dict.fromkeys(name for name in partial if naming.is_computed_buffer(name))
    if left_out:
        notes.append(
            f"left out {_listed(list(left_out))}: not in every model; transformers computes it "
            "by itself"
        )
        names = [name for name in names if name not in left_out]
        partial = [name for name in partial if name not in left_out]
    aliases = [
        _aliases(checkpoint, rows, partial)
        for checkpoint, rows in zip(checkpoints, row_of, strict=True)
    ]
    _refuse_missing(checkpoints, row_of, partial, aliases)

    # A head that only some models store must be stored in the output, unless all of them tie it.
    untie = False
    says_tied = [naming.ties_word_embeddings(checkpoint.config) for checkpoint in checkpoints]
    heads = {name for name in (*names, *partial) if naming.is_tied_head(name)}
    for head in sorted(heads):
        untied = [
            head in rows and tied is not True for rows, tied in zip(row_of, says_tied, strict=True)
        ]
        if not any(untied):
            continue
        if head not in row_of[0]:
            names.append(head)
        # A config that is silent means what its class defaults to, which may be a tie.
        silent_base = base_tied is None and False in says_tied
        if base_tied is True or silent_base or not all(untied):
            untie = True
            notes.append(
                f"{head}: stored by some models and tied to the input embedding in others; the "
                "output stores the merged head and its config says tie_word_embeddings: false"
            )
    rows = tuple(
        np.fromiter(
            (rows_by_name[stored] for stored in map(alias.get, names, names)),
            dtype=np.int32,
            count=len(names),
        )
        for rows_by_name, alias in zip(row_of, aliases, strict=True)
    )
    shapes = _common_shapes(checkpoints, names, rows)
    _refuse_mixed_kinds(checkpoints, names, rows)
    return MatchedTensors(tuple(names), shapes, rows, untie, tuple(notes))


def _names_not_in_all(row_of: Sequence[dict[str, int]]) -> list[str]:
    first = row_of[0].keys()
    if all(rows.keys() == first for rows in row_of[1:]):
        return []
    union = dict.fromkeys(name for rows in row_of for name in rows)
    return [name for name in union if not all(name in rows for rows in row_of)]


def _aliases(
    checkpoint: Checkpoint, row_of: dict[str, int], partial: Sequence[str]
) -> dict[str, str]:
    """Return absent name → stored name for what this model ties."""
    aliases = {}
    for name in partial:
        if name in row_of:
            continue
        if naming.is_tied_head(name) and naming.ties_word_embeddings(checkpoint.config) is False:
            continue
        stored = naming.tie_source(name, row_of)
        if stored is not None:
            aliases[name] = stored
    return aliases


def _refuse_missing(
    checkpoints: Sequence[Checkpoint],
    row_of: Sequence[dict[str, int]],
    partial: Sequence[str],
    aliases: Sequence[dict[str, str]],
) -> None:
    def lacks(model: int) -> list[str]:
        return [
            name for name in partial if name not in row_of[model] and name not in aliases[model]
        ]

    for model in range(len(checkpoints)):
        missing = lacks(model)
        if not missing:
            continue
        # Name two models: the one that lacks tensors, and one that has the first of them.
        other = next(i for i, rows in enumerate(row_of) if missing[0] in rows)
        here, there = checkpoints[model].source, checkpoints[other].source
        only_there = [name for name in missing if name in row_of[other]]
        only_here = [name for name in lacks(other) if name in row_of[model]]
        raise MismatchError(
            f"tensor sets differ: only in {there}: {_listed(only_there)}; "
            f"only in {here}: {_listed(only_here)}; models of a merge must have one architecture "
            "and the same tensor names"
        )


def _common_shapes(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    rows: Sequence[npt.NDArray[np.int32]],
) -> tuple[tuple[int, ...], ...]:
    all_shapes = [
        list(map(checkpoint.table.shapes.__getitem__, model_rows.tolist()))
        for checkpoint, model_rows in zip(checkpoints, rows, strict=True)
    ]
    first = all_shapes[0]
    for checkpoint, shapes in zip(checkpoints[1:], all_shapes[1:], strict=True):
        if shapes == first:
            continue
        name, mine, other = next(
            (name, mine, other)
            for name, mine, other in zip(names, first, shapes, strict=True)
            if mine != other
        )
        remedy = "the models have different architectures and cannot be merged"
        if naming.has_vocabulary_axis(name) and mine[1:] == other[1:]:
            remedy = (
                "this looks like a resized vocabulary: give both models the same tokens first "
                "(model.resize_token_embeddings in transformers)"
            )
        raise MismatchError(
            f"{name}: {list(mine)} in {checkpoints[0].source}, {list(other)} in "
            f"{checkpoint.source}; shapes must match; {remedy}"
        )
    return tuple(first)


def _refuse_mixed_kinds(
    checkpoints: Sequence[Checkpoint],
    names: Sequence[str],
    rows: Sequence[npt.NDArray[np.int32]],
) -> None:
    is_float_rank = np.array([dtype in FLOAT_DTYPES for dtype in DTYPES])
    ranks = [
        checkpoint.table.dtype_ranks[model_rows]
        for checkpoint, model_rows in zip(checkpoints, rows, strict=True)
    ]
    first = is_float_rank[ranks[0]]
    for checkpoint, model_ranks in zip(checkpoints[1:], ranks[1:], strict=True):
        differing = np.flatnonzero(is_float_rank[model_ranks] != first)
        if differing.size:
            at = int(differing[0])
            raise MismatchError(
                f"{names[at]}: {DTYPES[ranks[0][at]]} in {checkpoints[0].source}, "
                f"{DTYPES[model_ranks[at]]} in {checkpoint.source}; integers and floats cannot be "
                "averaged with one another; convert one of the models"
            )


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(names[:_NUM_LISTED]) + more
