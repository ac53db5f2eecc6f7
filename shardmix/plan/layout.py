"""Output shards: the tensors of each, and the segments that its data is divided into.

Lays out headers and offsets from opened sources; decides nothing about memory or devices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES, encode_header
from shardmix.matching.tensors import MatchedTensors
from shardmix.methods import keep_first
from shardmix.methods.base import MergeMethod, Params
from shardmix.plan.merge_plan import OutputShard, Segment, SegmentSource
from shardmix.recipe import Recipe
from shardmix.sources.base import Source


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
    out_dtypes: Sequence[str],
    parameters: TensorParameters,
    *,
    subfolder: str = "",
    stem: str = MODEL,
    numbers: Sequence[FileNumbers],
) -> tuple[tuple[OutputShard, ...], list[str]]:
    """Return the output's files, in order, and notes for the user.

    Each file has its header and its segments. `out_dtypes` are safetensors dtypes, one for each of
    the matched tensors. `subfolder` is the files' folder within the output, and `stem` their stem.
    `numbers` are those of each source's files.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    columns = _SourceColumns(sources, matched, out_dtypes, parameters, prefix, numbers)
    groups = _shard_groups(recipe, sources[0], matched, out_dtypes, shard_pattern(stem))
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
    out_dtypes: Sequence[str],
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
            get_storage_size=lambda index: tensor_nbytes(out_dtypes[index], matched.shapes[index]),
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
        out_dtypes: Sequence[str],
        parameters: TensorParameters,
        prefix: str,
        numbers: Sequence[FileNumbers],
    ) -> None:
        self._prefix = prefix
        self._names = matched.names
        self._shapes = matched.shapes
        self._out_dtypes = out_dtypes
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
        index_of = {self._names[index]: index for index in members}
        header = encode_header(
            (
                (self._names[index], self._out_dtypes[index], self._shapes[index])
                for index in members
            ),
            metadata,
        )
        order = np.fromiter(map(index_of.__getitem__, header.names), np.int64, len(members))
        offsets = np.array(header.offsets)
        is_filled = offsets[1:] > offsets[:-1]
        order, starts = order[is_filled], offsets[:-1][is_filled]
        segments = tuple(
            self._segment(order[start:stop], int(starts[start]))
            for start, stop in pairwise(self._segment_bounds(order))
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
        """Divide tensors in output order into stretches that are contiguous in every file."""
        if not order.size:
            return [0]
        before, after = order[:-1], order[1:]
        joined = self._is_float[before] & (self._out_ranks[before] == self._out_ranks[after])
        joined &= self._is_copied[before] == self._is_copied[after]
        joined &= self._group_of[before] == self._group_of[after]
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
        )
