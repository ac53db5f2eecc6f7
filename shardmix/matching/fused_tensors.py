"""Tensors that one model stores in one piece and another in several: mostly experts.

transformers stacks single experts when it loads a model, and files store them in either form. Here
the single piece is split into several: they lie one after the other in it. Changes tables, not
files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from shardmix.conventions.tensor_names import (
    FUSIONS,
    ROW,
    STACKED,
    STACKED_PARTS,
    TAKEN_APART,
    class_names,
    plain_ending,
    whole_ending,
)
from shardmix.dtypes import DTYPES, tensor_nbytes
from shardmix.formats.safetensors_layout import TensorInfo
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import Source
from shardmix.sources.rearranged import RearrangedSource

if TYPE_CHECKING:
    from shardmix.conventions.declarations import Renaming

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    shape: Shape


def split_alike(sources: Sequence[Source]) -> tuple[Sequence[Source], list[str]]:
    """Return the sources with fused tensors in pieces, if any model has the pieces; and notes.

    Models that agree are returned unchanged.
    """
    stored = [set(source.tensors.names) for source in sources]
    if all(names == stored[0] for names in stored):
        return sources, []
    from shardmix.conventions.declarations import (
        declaration_of,  # models that agree need none of it
    )

    declarations = [declaration_of(source.config, source.folder) for source in sources]
    fused = [
        whole_ending(renaming)
        for own in declarations
        for renaming in own.renames
        if renaming.ops in FUSIONS
    ]
    if not any(text in name for text in set(fused) for names in stored for name in names):
        return sources, []
    named = [
        dict(zip(class_names(source.tensors.names, own), source.tensors, strict=True))
        for source, own in zip(sources, declarations, strict=True)
    ]
    found, notes = [], []
    for model, (source, own) in enumerate(zip(sources, declarations, strict=True)):
        others = [other for number, other in enumerate(named) if number != model]
        divided = {
            info.name: pieces
            for renaming in own.renames
            for name, info in named[model].items()
            if (pieces := _pieces(renaming, name, info.shape, others))
        }
        if divided:
            notes.append(
                f"{source.text}: stores {next(iter(divided))} in one piece, other models in "
                "several; the output stores the pieces, which transformers reads as well"
            )
            source = RearrangedSource(source, *_divide(source.tensors, divided))
        found.append(source)
    return found, notes


def _pieces(
    renaming: "Renaming", name: str, shape: Shape, others: Sequence[Mapping[str, TensorInfo]]
) -> list[_Piece]:
    """Return another model's pieces of a tensor, in the order of their data in it."""
    if renaming.ops not in FUSIONS:
        return []
    parts = renaming.to if renaming.ops == TAKEN_APART else renaming.sources
    head, end, tail = name.rpartition(whole_ending(renaming))
    if not end or (tail and not tail.startswith(".")):
        return []
    names = [head + plain_ending(part) + tail for part in parts]
    if renaming.ops in (STACKED, STACKED_PARTS):
        num_experts = shape[0] if len(shape) > 1 else 0
        # A stranger's file may name any number; pieces are tensors of some model.
        if num_experts * len(parts) > max(map(len, others)):
            return []
        names = [each.replace("*", str(at), 1) for at in range(num_experts) for each in names]
    for other in others:
        if name in other or not names or not all(each in other for each in names):
            continue
        pieces = [_Piece(other[each].name, other[each].shape) for each in names]
        if _fills(renaming, pieces, shape):
            return pieces
    return []


def _fills(renaming: "Renaming", pieces: Sequence[_Piece], shape: Shape) -> bool:
    """Return True if pieces, one after the other, are a tensor of a shape."""
    if renaming.ops in (ROW, TAKEN_APART):
        rows = sum(piece.shape[0] if piece.shape else 0 for piece in pieces)
        return rows == shape[0] and all(piece.shape[1:] == shape[1:] for piece in pieces)
    num_parts = len(pieces) // shape[0]
    part = shape[1:] if renaming.ops == STACKED else (shape[1] // num_parts, *shape[2:])
    is_even = renaming.ops == STACKED or shape[1] % num_parts == 0
    return is_even and all(piece.shape == part for piece in pieces)


def _divide(
    table: TensorTable, divided: Mapping[str, Sequence[_Piece]]
) -> tuple[TensorTable, list[int], list[int]]:
    """Return the pieces, of each the row that it is a part of, and its first element there."""
    names: list[str] = []
    shapes: list[Shape] = []
    rows: list[int] = []
    firsts: list[int] = []
    starts: list[int] = []
    nbytes: list[int] = []
    for row, name in enumerate(table.names):
        dtype = DTYPES[table.dtype_ranks[row]]
        start, first = int(table.starts[row]), 0
        for piece in divided.get(name, (_Piece(name, table.shapes[row]),)):
            size = tensor_nbytes(dtype, piece.shape)
            names.append(piece.name)
            shapes.append(piece.shape)
            rows.append(row)
            firsts.append(first)
            starts.append(start)
            nbytes.append(size)
            start += size
            first += math.prod(piece.shape)
        if start != int(table.starts[row]) + int(table.nbytes[row]):
            raise AssertionError(f"{name}: its pieces are not all of it")
    pieces = replace(
        table.take(rows),
        names=tuple(names),
        shapes=tuple(shapes),
        starts=np.array(starts, np.int64),
        nbytes=np.array(nbytes, np.int64),
    )
    return pieces, rows, firsts
