"""Output shards: the tensors of each, and the segments that its data is divided into.

Lays out headers and offsets from opened sources; decides nothing about memory or devices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from shardmix.conventions.weight_names import MODEL, shard_pattern
from shardmix.dtypes import (
    DTYPE_RANK,
    DTYPES,
    FLOAT_DTYPES,
    WIDE_DTYPES,
    element_nbytes,
    tensor_nbytes,
)
from shardmix.formats.file_metadata import format_only, lost_metadata, merged_metadata
from shardmix.formats.matrices import Matrices
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES, encode_header
from shardmix.matching.tensors import MatchedTensors
from shardmix.methods import keep_first
from shardmix.methods.base import MergeMethod, Params
from shardmix.plan.merge_plan import CodedMatrices, OutputShard, Segment, SegmentSource
from shardmix.recipe import Recipe
from shardmix.sources.base import Source

if TYPE_CHECKING:
    from shardmix.conventions.output_quantisations import OutputQuantisation


@dataclass(frozen=True, slots=True)
class TensorParameters:
    """The method and parameters of each tensor of a part."""

    method: MergeMethod
    """The method of float tensors."""
    groups: Sequence[Params]
    """All parameter values, each for the tensors that share it."""
    rows: npt.NDArray[np.int32]
    """For each matched tensor, an index into `groups`."""
    num_groups_before: int = 0
    """Number of groups of other parts before these in `MergePlan.parameters`."""


@dataclass(frozen=True, slots=True)
class OutputTensors:
    """The output's dtypes, and the tensors of it that are written as codes."""

    dtypes: Sequence[str]
    """Safetensors dtype of each matched tensor; of one that is coded, of its values before."""
    quantisation: "OutputQuantisation | None" = None
    """The way to write codes."""
    coded: frozenset[int] = frozenset()
    """Indexes of the matched tensors that are written as codes."""

    def entries(
        self, index: int, name: str, shape: tuple[int, ...]
    ) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Yield name, dtype and shape of what a file stores of a tensor: itself, and its scales."""
        if self.quantisation is None or index not in self.coded:
            yield name, self.dtypes[index], shape
            return
        coding = self.quantisation.coding
        grid = Matrices.of(shape).grid(coding.block)
        yield name, coding.code_dtype, shape
        yield self.scales_name(name), coding.scale_dtype, (*shape[:-2], *grid)

    def scales_name(self, name: str) -> str:
        """Return the name of a tensor's scales."""
        return f"{name}{self.quantisation.scales_ending if self.quantisation else ''}"

    def nbytes(self, index: int, name: str, shape: tuple[int, ...]) -> int:
        """Return the bytes that a file stores of a tensor."""
        return sum(
            tensor_nbytes(dtype, size) for _, dtype, size in self.entries(index, name, shape)
        )


@dataclass(frozen=True, slots=True)
class FileNumbers:
    """The numbers of files and streams of one part of a source, as segments use them."""

    first: int
    """Number of its first file; the others follow."""
    decoded: int
    """Number of its stream of decoded tensors, if it has one."""


def plan_shards(
    recipe: Recipe,
    sources: Sequence[Source],
    matched: MatchedTensors,
    written: OutputTensors,
    parameters: TensorParameters,
    *,
    subfolder: str = "",
    stem: str = MODEL,
    numbers: Sequence[FileNumbers],
) -> tuple[tuple[OutputShard, ...], list[str]]:
    """Return the output's files, in order, and notes for the user.

    Each file has its header and its segments. `subfolder` is the files' folder within the output,
    and `stem` their stem. `numbers` are those of each source's files.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    columns = _SourceColumns(sources, matched, written, parameters, prefix, numbers)
    groups = _shard_groups(recipe, sources[0], matched, written, shard_pattern(stem))
    notes = lost_metadata(
        sources[0].text,
        before=sources[0].metadata,
        after=(metadata for _, _, metadata in groups),
        is_laid_out_anew=(recipe.max_shard_size or sources[0].max_shard_size) is not None,
    )
    return tuple(columns.output_shard(*group) for group in groups), notes


def _shard_groups(
    recipe: Recipe,
    first: Source,
    matched: MatchedTensors,
    written: OutputTensors,
    pattern: str,
) -> list[tuple[str, list[int], Mapping[str, str]]]:
    """Return each output file's name, its tensors (indexes into `matched.names`), its metadata."""
    metadata = first.metadata
    max_shard_size = recipe.max_shard_size or first.max_shard_size
    if max_shard_size is not None:
        from huggingface_hub import split_state_dict_into_shards_factory

        index_of = {name: index for index, name in enumerate(matched.names)}
        split = split_state_dict_into_shards_factory(
            index_of,  # its values stand for the tensors; sizes come from the headers
            get_storage_size=lambda index: written.nbytes(
                index, matched.names[index], matched.shapes[index]
            ),
            filename_pattern=pattern,
            max_shard_size=max_shard_size,
        )
        is_one = len(metadata) == len(split.filename_to_tensors) == 1
        common = merged_metadata(metadata[0]) if is_one else format_only(metadata)
        return [
            (filename, [index_of[name] for name in names], common)
            for filename, names in split.filename_to_tensors.items()
        ]
    files = first.tensors.files[matched.rows[0]]
    # A tensor that the first model does not store has no shard there: it ends the last one.
    files[len(files) - matched.num_added :] = len(metadata) - 1
    filled = np.flatnonzero(np.bincount(files))  # `np.unique` would import all of `numpy.ma`
    return [
        (
            pattern.format(suffix=f"-{number:05d}-of-{len(filled):05d}" if len(filled) > 1 else ""),
            np.flatnonzero(files == file).tolist(),
            merged_metadata(metadata[file]),
        )
        for number, file in enumerate(filled.tolist(), start=1)
    ]


class _Group:
    """Tensors with the same parameters: the sources that count for them, and their factors."""

    def __init__(self, method: MergeMethod, params: Params) -> None:
        needs = method.needs(params)
        self.is_whole = bool(needs.statistics)
        """True if its tensors are not joined, since each has factors of its own."""
        self.narrow, self.narrow_factors = _counted(method, params, is_wide=False)
        """The sources that count, the base model among them, and their factors, in float32."""
        self.wide, self.wide_factors = _counted(method, params, is_wide=True)
        """The same for tensors that are computed in float64."""
        self._num_factors = method.num_factors
        self._has_base = needs.base_model

    def num_pending(self, sources: Sequence[int]) -> int:
        """Return the number of factors that follow from statistics of a tensor of these sources."""
        if not self.is_whole:
            return 0
        num_models = len(sources) - self._has_base
        return num_models if self._num_factors is None else self._num_factors


def _counted(
    method: MergeMethod, params: Params, *, is_wide: bool
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    needs = method.needs(params)
    models = method.contributors(params, is_wide=is_wide)
    factors = () if needs.statistics else method.factors(params, models, ())
    if needs.base_model:
        return (0, *(model + 1 for model in models)), factors
    return models, factors


class _SourceColumns:
    """The output tensors in every source, in columns, to find segments quickly."""

    def __init__(
        self,
        sources: Sequence[Source],
        matched: MatchedTensors,
        written: OutputTensors,
        parameters: TensorParameters,
        prefix: str,
        numbers: Sequence[FileNumbers],
    ) -> None:
        self._prefix = prefix
        self._names = matched.names
        self._shapes = matched.shapes
        self._written = written
        self._out_dtypes = out_dtypes = written.dtypes
        self._out_ranks = np.array([DTYPE_RANK[dtype] for dtype in out_dtypes])
        self._is_float = np.array([dtype in FLOAT_DTYPES for dtype in out_dtypes])
        self._method_name = parameters.method.name
        self._first_group = parameters.num_groups_before
        self._groups = [_Group(parameters.method, params) for params in parameters.groups]
        self._group_of = parameters.rows
        self._hold_changes = [source.holds_changes for source in sources]
        self._files, self._starts, self._nbytes, self._ranks = [], [], [], []
        for source, rows, number in zip(sources, matched.rows, numbers, strict=True):
            table = source.tensors
            files = table.files[rows] + number.first
            if table.decoded is not None:
                files[table.decoded[rows]] = number.decoded
            self._files.append(files)
            self._starts.append(table.starts[rows])
            self._nbytes.append(table.nbytes[rows])
            self._ranks.append(table.dtype_ranks[rows])
        # Tensors that are copied bit for bit.
        self._is_copied = ~self._is_float
        if parameters.method.is_copy:
            self._is_copied |= self._ranks[0] == self._out_ranks
        self._is_coded = np.zeros(len(out_dtypes), np.bool_)
        self._is_coded[list(written.coded)] = True
        self._is_copied &= ~self._is_coded
        # By source: True for tensors whose values there count.
        self._counts = [
            np.array([number in group.wide for group in self._groups])[self._group_of]
            for number in range(len(sources))
        ]
        wide_ranks = [DTYPE_RANK[name] for name in WIDE_DTYPES]
        self._is_wide = np.logical_or.reduce(
            [
                counts & np.isin(ranks, wide_ranks)
                for counts, ranks in zip(self._counts, self._ranks, strict=True)
            ]
        )

    def output_shard(
        self, filename: str, members: Sequence[int], metadata: Mapping[str, str]
    ) -> OutputShard:
        """Lay out one output file and divide its data into segments."""
        header = encode_header(
            (
                entry
                for index in members
                for entry in self._written.entries(index, self._names[index], self._shapes[index])
            ),
            metadata,
        )
        index_of = {self._names[index]: index for index in members}
        scales_of = {
            self._written.scales_name(self._names[index]): index
            for index in members
            if index in self._written.coded
        }
        is_scales = np.fromiter(map(scales_of.__contains__, header.names), np.bool_)
        index_of |= scales_of
        order = np.fromiter(map(index_of.__getitem__, header.names), np.int64, len(header.names))
        offsets = np.array(header.offsets)
        is_filled = offsets[1:] > offsets[:-1]
        order, starts, is_scales = order[is_filled], offsets[:-1][is_filled], is_scales[is_filled]
        bounds = list(pairwise(self._segment_bounds(order)))
        numbers = {
            int(order[start]): n for n, (start, _) in enumerate(bounds) if not is_scales[start]
        }
        segments = tuple(
            self._scales(int(order[start]), int(starts[start]), numbers)
            if is_scales[start]
            else self._segment(order[start:stop], int(starts[start]))
            for start, stop in bounds
        )
        return OutputShard(
            filename=self._prefix + filename,
            header=header.encoded[HEADER_LENGTH_NBYTES:].decode(),
            file_nbytes=header.file_nbytes,
            read_nbytes=sum(
                segment.num_elements * sum(map(element_nbytes, segment.dtypes))
                for segment in segments
            ),
            tensor_names=header.names,
            segments=segments,
        )

    def _segment_bounds(self, order: npt.NDArray[np.int64]) -> list[int]:
        """Divide tensors in output order into stretches that are contiguous in every file.

        A coded tensor and its scales, which have its index, are stretches of their own.
        """
        if not order.size:
            return [0]
        before, after = order[:-1], order[1:]
        joined = self._is_float[before] & (self._out_ranks[before] == self._out_ranks[after])
        joined &= self._is_copied[before] == self._is_copied[after]
        joined &= self._group_of[before] == self._group_of[after]
        joined &= ~(self._is_coded[before] | self._is_coded[after])
        if any(group.is_whole for group in self._groups):
            is_whole = np.array([group.is_whole for group in self._groups])
            joined &= ~is_whole[self._group_of[before]]
        for source, counts in enumerate(self._counts):
            if not counts.any():
                continue
            files, ranks = self._files[source], self._ranks[source]
            ends = self._starts[source] + self._nbytes[source]
            adjoin = files[before] == files[after]
            adjoin &= ranks[before] == ranks[after]
            adjoin &= ends[before] == self._starts[source][after]
            joined &= adjoin | ~counts[before]
        return [0, *(np.flatnonzero(~joined) + 1).tolist(), int(order.size)]

    def _segment(self, members: npt.NDArray[np.int64], out_offset: int) -> Segment:
        first = int(members[0])
        out_dtype = self._out_dtypes[first]
        num_elements = int(self._nbytes[0][members].sum()) // element_nbytes(
            DTYPES[self._ranks[0][first]]
        )
        is_float = out_dtype in FLOAT_DTYPES
        number = int(self._group_of[first])
        group = self._groups[number]
        if not is_float:
            # The first source's integers, and those that are compared with them.
            sources, factors = tuple(sorted({0, *group.narrow})), group.narrow_factors[:0]
        elif self._is_wide[first]:
            sources, factors = group.wide, group.wide_factors
        else:
            sources, factors = group.narrow, group.narrow_factors
        return Segment(
            name=self._prefix + self._names[first],
            num_tensors=len(members),
            num_elements=num_elements,
            method=keep_first.NAME if self._is_copied[first] else self._method_name,
            parameters=self._first_group + number,
            out_dtype=out_dtype,
            out_offset=out_offset,
            sources=tuple(
                SegmentSource(
                    source,
                    DTYPES[self._ranks[source][first]],
                    int(self._files[source][first]),
                    int(self._starts[source][first]),
                    is_float and self._hold_changes[source],
                )
                for source in sources
            ),
            factors=factors,
            num_pending=group.num_pending(sources) if is_float else 0,
            coded=self._coded(first),
        )

    def _coded(self, index: int) -> CodedMatrices | None:
        """Return the matrices of a tensor that is written as codes."""
        quantisation = self._written.quantisation
        if quantisation is None or not self._is_coded[index]:
            return None
        matrices = Matrices.of(self._shapes[index])
        return CodedMatrices(quantisation.name, matrices.count, matrices.rows, matrices.columns)

    def _scales(self, index: int, out_offset: int, numbers: Mapping[int, int]) -> Segment:
        """Return the segment of a tensor's scales, in a file of segments with these numbers."""
        assert self._written.quantisation is not None
        coding = self._written.quantisation.coding
        matrices = Matrices.of(self._shapes[index])
        rows, columns = matrices.grid(coding.block)
        return Segment(
            name=self._prefix + self._written.scales_name(self._names[index]),
            num_tensors=1,
            num_elements=matrices.count * rows * columns,
            method=self._method_name,
            parameters=self._first_group + int(self._group_of[index]),
            out_dtype=coding.scale_dtype,
            out_offset=out_offset,
            sources=(),
            factors=(),
            scales_of=numbers[index],
        )
