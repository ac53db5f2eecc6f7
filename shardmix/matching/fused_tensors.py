"""Tensors that one model stores in one piece and another in several: mostly experts.

transformers stacks single experts when it loads a model, and files store them in either form. Here
the single piece is split into several. Most lie one after the other in it; the rows of others
alternate, and some files store a matrix transposed. Changes tables, not files.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from shardmix.conventions.tensor_names import (
    STACKED,
    STACKED_PARTS,
    class_names,
    is_matched,
    plain_ending,
    takes_apart,
    whole_endings,
)
from shardmix.dtypes import DTYPES, element_nbytes, tensor_nbytes
from shardmix.formats.safetensors_layout import TensorInfo
from shardmix.formats.tensor_table import TensorTable, View
from shardmix.sources.base import Source

if TYPE_CHECKING:
    from shardmix.conventions.declarations import Renaming

Shape = tuple[int, ...]

# The last one: experts of text and of images, numbered through.
_STACKED = (STACKED, STACKED_PARTS, (("ErnieFuseAndSplitTextVisionExperts", 0, 1),))
_JOINED = (("Concatenate",), ("Chunk",), ("Split",))
_ALTERNATING = ("Interleave", "Chunk")
_TURNED = ("Transpose",)
_DIVIDED = ("Interleave",)
_FUSIONS = frozenset((*_JOINED, _ALTERNATING, _TURNED, _DIVIDED))


@dataclass(frozen=True, slots=True)
class _Part:
    """The elements of a tensor that are another one."""

    first: int
    """The first element."""
    shape: Shape
    """Its dimensions; one of the tensor's may be divided in two."""
    strides: tuple[int, ...]
    """Distance between neighbours in each, in elements."""

    @property
    def is_contiguous(self) -> bool:
        """True if the elements follow one another."""
        return self.strides == _strides(self.shape)


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    shape: Shape
    part: _Part


def split_alike(sources: Sequence[Source]) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """Return the sources with fused tensors in pieces, if any model has the pieces; and notes.

    Models that agree are returned unchanged.
    """
    if all(_has_same_tensors(source.tensors, sources[0].tensors) for source in sources[1:]):
        return tuple(sources), ()
    from shardmix.conventions.declarations import (
        declaration_of,  # models that agree need none of it
    )

    declarations = [declaration_of(source.config, source.folder) for source in sources]
    fused = {
        text
        for own in declarations
        for renaming in own.renames
        if is_fusion(renaming)
        for text in whole_endings(renaming)
    }
    names = {name for source in sources for name in source.tensors.names}
    if not any(text in name for text in fused for name in names):
        return tuple(sources), ()
    named = [
        dict(zip(class_names(source.tensors.names, own), source.tensors, strict=True))
        for source, own in zip(sources, declarations, strict=True)
    ]
    found, notes = [], []
    for model, (source, own) in enumerate(zip(sources, declarations, strict=True)):
        others = [other for number, other in enumerate(named) if number != model]
        divided = {}
        for renaming in own.renames:
            if not is_fusion(renaming):
                continue
            for name, info in named[model].items():
                pieces = _pieces(renaming, name, info.shape, others) or (
                    _turned(renaming, name, info.shape, named[0]) if model else []
                )
                if pieces:
                    divided[info.name] = pieces
        if divided:
            # Imported here: it loads what reads weights.
            from shardmix.sources.rearranged import RearrangedSource

            notes.append(_note(source, divided))
            source = RearrangedSource(source, *_divide(source.tensors, divided))
        found.append(source)
    return tuple(found), tuple(notes)


def is_fusion(renaming: "Renaming") -> bool:
    """Return True if a conversion of transformers only joins, takes apart or turns tensors."""
    return renaming.ops in _STACKED or renaming.kinds in _FUSIONS


def _has_same_tensors(table: TensorTable, other: TensorTable) -> bool:
    """Return True if the names and shapes are the same, in any order."""
    if (table.names, table.shapes) == (other.names, other.shapes):
        return True
    if len(table) != len(other) or set(table.names) != set(other.names):
        return False
    shapes = dict(zip(other.names, other.shapes, strict=True))
    return all(map(lambda name, shape: shapes[name] == shape, table.names, table.shapes))


def _note(source: Source, divided: Mapping[str, Sequence[_Piece]]) -> str:
    several = next((name for name, pieces in divided.items() if len(pieces) > 1), None)
    if several is None:
        return (
            f"{source.text}: stores {next(iter(divided))} with its elements in another order than "
            "other models; the output has the others' order, which transformers reads as well"
        )
    return (
        f"{source.text}: stores {several} in one piece, other models in several; the output stores "
        "the pieces, which transformers reads as well"
    )


def _pieces(
    renaming: "Renaming", name: str, shape: Shape, others: Sequence[Mapping[str, TensorInfo]]
) -> list[_Piece]:
    """Return another model's pieces of a tensor, in the order of their data in it."""
    for kind, ending in enumerate(whole_endings(renaming)):
        head, end, tail = name.rpartition(ending)
        if not end or (tail and not tail.startswith(".")):
            continue
        is_apart = takes_apart(renaming)
        if is_apart and not is_matched(renaming, name):
            continue
        endings = [
            head + plain_ending(part) + tail
            for part in (renaming.to if is_apart else renaming.sources)
        ]
        for other in others:
            if name in other:
                continue
            names = _numbered(renaming, endings, kind, shape, other)
            if not names or not all(each in other for each in names):
                continue
            if not is_apart and not is_matched(renaming, names[0]):
                continue
            infos = [other[each] for each in names]
            parts = _parts(renaming, shape, [info.shape for info in infos])
            if parts:
                return [
                    _Piece(info.name, info.shape, part)
                    for info, part in zip(infos, parts, strict=True)
                ]
    return []


def _numbered(
    renaming: "Renaming",
    endings: Sequence[str],
    kind: int,
    shape: Shape,
    other: Mapping[str, TensorInfo],
) -> list[str]:
    """Return the names of all pieces, those with a star once for each expert."""
    if renaming.ops in _STACKED:
        num_experts = shape[0] if len(shape) > 1 else 0
        # A stranger's file may name any number; pieces are tensors of some model.
        if num_experts * len(endings) > len(other):
            return []
        first = kind * num_experts
        return [
            each.replace("*", str(first + at), 1) for at in range(num_experts) for each in endings
        ]
    if renaming.kinds in _JOINED and "*" in endings[0]:
        names = (endings[0].replace("*", str(at), 1) for at in range(len(other)))
        return list(_while_in(names, other))
    return list(endings)


def _while_in(names: Iterator[str], other: Mapping[str, TensorInfo]) -> Iterator[str]:
    for name in names:
        if name not in other:
            return
        yield name


def _turned(
    renaming: "Renaming", name: str, shape: Shape, first: Mapping[str, TensorInfo]
) -> list[_Piece]:
    """Return a tensor as the first model has it, if it has it transposed under the same name.

    transformers reads either if the class's shape tells which one it is.
    """
    if renaming.kinds != _TURNED or not renaming.ops[0][3] or name not in first:
        return []
    info = first[name]
    if info.shape == shape or not is_matched(renaming, name):
        return []
    parts = _parts(renaming, shape, [info.shape])
    return [_Piece(info.name, info.shape, parts[0])] if parts else []


def _parts(renaming: "Renaming", whole: Shape, shapes: Sequence[Shape]) -> list[_Part]:
    """Return the elements of a tensor that each piece has; empty if they are not all of it."""
    kinds, ops = renaming.kinds, renaming.ops
    strides = _strides(whole)
    if ops in _STACKED:
        return _stacked_parts(whole, shapes)
    axis = int(ops[0][1])
    is_inverse = kinds[0] == "Interleave" and bool(ops[0][2])
    if axis >= len(whole) or is_inverse:
        return []
    before, size, after = whole[:axis], whole[axis], whole[axis + 1 :]
    if kinds in _JOINED:
        sizes = [shape[axis] if len(shape) == len(whole) else -1 for shape in shapes]
        is_even = kinds != ("Chunk",) or len(set(sizes)) == 1
        if not is_even or sum(sizes) != size:
            return []
        firsts = [sum(sizes[:number]) * strides[axis] for number in range(len(sizes))]
        parts = [
            _Part(first, (*before, length, *after), strides)
            for first, length in zip(firsts, sizes, strict=True)
        ]
    elif kinds == _ALTERNATING and len(shapes) == 2 and size % 2 == 0:
        steps = (*strides[:axis], 2 * strides[axis], *strides[axis + 1 :])
        shape = (*before, size // 2, *after)
        parts = [_Part(number * strides[axis], shape, steps) for number in range(2)]
    elif kinds == _DIVIDED and size % 2 == 0 and shapes == [whole]:
        steps = (*strides[:axis], strides[axis], 2 * strides[axis], *strides[axis + 1 :])
        return [_Part(0, (*before, 2, size // 2, *after), steps)]
    elif kinds == _TURNED and int(ops[0][2]) < len(whole):
        order = list(range(len(whole)))
        other = int(ops[0][2])
        order[axis], order[other] = other, axis
        parts = [_Part(0, tuple(whole[at] for at in order), tuple(strides[at] for at in order))]
    else:
        return []
    is_all = [part.shape for part in parts] == list(shapes)
    return parts if is_all else []


def _stacked_parts(whole: Shape, shapes: Sequence[Shape]) -> list[_Part]:
    """Return the parts of stacked experts: of each, one or several parts in a row."""
    num_parts, rest = divmod(len(shapes), whole[0])
    if rest or whole[1] % num_parts:
        return []
    shape = (whole[1] // num_parts, *whole[2:])
    if any(each != shape for each in shapes):
        return []
    size, strides = math.prod(shape), _strides(shape)
    return [_Part(number * size, shape, strides) for number in range(len(shapes))]


def _strides(shape: Shape) -> tuple[int, ...]:
    """Return the distances of neighbours in a tensor whose elements follow one another."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _divide(
    table: TensorTable, divided: Mapping[str, Sequence[_Piece]]
) -> tuple[TensorTable, list[int], list[int], dict[int, View]]:
    """Return the pieces, of each the row that it is a part of and its first element there.

    The last result has the way that the elements of those pieces lie that do not follow one
    another.
    """
    names: list[str] = []
    shapes: list[Shape] = []
    rows: list[int] = []
    firsts: list[int] = []
    starts: list[int] = []
    nbytes: list[int] = []
    views: dict[int, View] = {}
    for row, name in enumerate(table.names):
        dtype, shape = DTYPES[table.dtype_ranks[row]], table.shapes[row]
        pieces = divided.get(name) or (_Piece(name, shape, _Part(0, shape, _strides(shape))),)
        for piece in pieces:
            first = piece.part.first
            if not piece.part.is_contiguous:
                offset = first * element_nbytes(dtype)
                views[len(names)] = View(offset, piece.part.strides, piece.part.shape)
            names.append(piece.name)
            shapes.append(piece.shape)
            rows.append(row)
            firsts.append(first)
            starts.append(int(table.starts[row]) + tensor_nbytes(dtype, (first,)))
            nbytes.append(tensor_nbytes(dtype, piece.shape))
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
            raise AssertionError(f"{name}: its pieces are not all of it")
    pieces_table = replace(
        table.take(rows),
        names=tuple(names),
        shapes=tuple(shapes),
        starts=np.array(starts, np.int64),
        nbytes=np.array(nbytes, np.int64),
    )
    return pieces_table, rows, firsts, views
