"""The shard planner: from a recipe and opened checkpoints to a `MergePlan`.

Decides names, dtypes, output shards, every offset and the memory before a byte of weights is read.
Pure but for looking up files beside the weights and how much memory is in use.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from huggingface_hub import split_state_dict_into_shards_factory

from shardmix.checkpoint import CONFIG_NAME, Checkpoint
from shardmix.companions import find_companions, unmerged_weights
from shardmix.errors import RecipeError
from shardmix.matching import MatchedTensors, match_tensors
from shardmix.memory import BEST_STRIP_NBYTES, MemoryPlan, fit_memory, reserved_nbytes
from shardmix.plan import (
    AGREE,
    LINEAR,
    NUMBA,
    NUMBA_DTYPES,
    TORCH,
    MergePlan,
    OutputShard,
    Run,
    RunSettings,
    SourceFile,
)
from shardmix.recipe import OUT_DTYPES, Recipe
from shardmix.safetensors_layout import (
    DTYPE_RANK,
    DTYPES,
    FLOAT_DTYPES,
    HEADER_LENGTH_NBYTES,
    element_nbytes,
    encode_header,
    tensor_nbytes,
)

_FILENAME_PATTERN = "model{suffix}.safetensors"
_TORCH_NAMES = {"F64": "float64", **{dtype: name for name, dtype in OUT_DTYPES.items()}}


@dataclass(frozen=True, slots=True)
class Donor:
    """The model that gives the output its config, tokenizer and other companion files."""

    name: str
    """What the model card may call it."""
    folder: Path
    """Its folder."""
    tied: bool | None
    """What its config says of `tie_word_embeddings`."""


def plan_merge(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    donor: Donor,
    settings: RunSettings,
    *,
    output: Path | None,
) -> MergePlan:
    """Plan a merge of the recipe's checkpoints, given in its order.

    Raises `MismatchError` where the models do not fit, `BudgetError` where the memory budget
    cannot hold one smallest strip.
    """
    matched = match_tensors(checkpoints, base_tied=donor.tied)
    out_dtypes = _output_dtypes(recipe.dtype, checkpoints[0], matched)
    shards = _plan_shards(recipe, checkpoints, matched, out_dtypes)
    settings = _decided(settings, shards)
    companions = find_companions(donor.folder)
    companion_nbytes = sum((donor.folder / name).stat().st_size for name in companions)
    warnings = [*matched.notes]
    for name in unmerged_weights(companions):
        warnings.append(f"{name}: copied, not merged; only the model's main weights are")
    if CONFIG_NAME not in companions:
        warnings.append(
            f"no {CONFIG_NAME} in {donor.folder.name}: the output holds weights alone and will not "
            "load with from_pretrained; name a model that has one with --base"
        )
    return MergePlan(
        sources=recipe.sources,
        public_names=tuple(public_name(checkpoint) for checkpoint in checkpoints),
        hub_ids=tuple(checkpoint.hub_id for checkpoint in checkpoints),
        weights=recipe.weights,
        dtype=recipe.dtype,
        max_shard_size=recipe.max_shard_size,
        output=str(output) if output is not None else "",
        base_name=donor.name,
        base_folder=str(donor.folder.absolute()),
        companions=companions,
        config_dtype=_main_float_dtype(matched, out_dtypes),
        untie_word_embeddings=matched.untie_word_embeddings,
        files=tuple(
            SourceFile(str(shard.path.absolute()), shard.nbytes)
            for checkpoint in checkpoints
            for shard in checkpoint.shards
        ),
        shards=shards,
        disk_needed_nbytes=sum(shard.file_nbytes for shard in shards) + companion_nbytes,
        settings=settings,
        memory=plan_memory(settings),
        warnings=tuple(warnings),
    )


def plan_memory(settings: RunSettings) -> MemoryPlan:
    """Fit strips and workers to the budgets and to what the process holds at this moment.

    Raises `BudgetError` where one smallest strip does not fit.
    """
    return fit_memory(
        reserved=reserved_nbytes(library=settings.backend, on_cuda=settings.on_cuda),
        on_cuda=settings.on_cuda,
        best_strip=BEST_STRIP_NBYTES["cuda" if settings.on_cuda else settings.backend],
        workers=settings.workers,
        max_memory=settings.max_memory_nbytes,
        max_vram=settings.max_vram_nbytes,
    )


def _output_dtypes(dtype: str, first: Checkpoint, matched: MatchedTensors) -> list[str]:
    kept = [DTYPES[rank] for rank in first.table.dtype_ranks[matched.rows[0]].tolist()]
    if dtype == "keep":
        return kept
    return [OUT_DTYPES[dtype] if own in FLOAT_DTYPES else own for own in kept]


def _main_float_dtype(matched: MatchedTensors, out_dtypes: Sequence[str]) -> str:
    """Return the torch name of the float dtype of most of the output; "" where it has none."""
    nbytes: dict[str, int] = {}
    for shape, dtype in zip(matched.shapes, out_dtypes, strict=True):
        if dtype in FLOAT_DTYPES:
            nbytes[dtype] = nbytes.get(dtype, 0) + tensor_nbytes(dtype, shape) + 1
    return _TORCH_NAMES[max(nbytes, key=lambda dtype: nbytes[dtype])] if nbytes else ""


def public_name(checkpoint: Checkpoint) -> str:
    """Return what may be published of a source: its Hub id, or its own name without a path."""
    if checkpoint.hub_id is not None:
        return checkpoint.source
    if checkpoint.is_single_file:
        return checkpoint.shards[0].path.name
    return checkpoint.folder.resolve().name


def _plan_shards(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    matched: MatchedTensors,
    out_dtypes: Sequence[str],
) -> tuple[OutputShard, ...]:
    columns = _SourceColumns(recipe, checkpoints, matched, out_dtypes)
    groups = _shard_groups(recipe, checkpoints[0], matched, out_dtypes)
    return tuple(columns.output_shard(filename, members) for filename, members in groups)


def _shard_groups(
    recipe: Recipe, first: Checkpoint, matched: MatchedTensors, out_dtypes: Sequence[str]
) -> list[tuple[str, list[int]]]:
    """Return each output file's name and its tensors, as indexes into `matched.names`."""
    if recipe.max_shard_size is not None:
        index_of = {name: index for index, name in enumerate(matched.names)}
        split = split_state_dict_into_shards_factory(
            index_of,  # its values stand for the tensors; sizes come from the headers
            get_storage_size=lambda index: tensor_nbytes(out_dtypes[index], matched.shapes[index]),
            filename_pattern=_FILENAME_PATTERN,
            max_shard_size=recipe.max_shard_size,
        )
        return [
            (filename, [index_of[name] for name in names])
            for filename, names in split.filename_to_tensors.items()
        ]
    groups: dict[int, list[int]] = {}
    stored = set(first.table.names)
    last_file = len(first.shards) - 1
    files = first.table.files[matched.rows[0]].tolist()
    for index, name in enumerate(matched.names):
        # A head that the first model leaves out has no shard of its own there: it ends the last.
        groups.setdefault(files[index] if name in stored else last_file, []).append(index)
    ordered = [groups[file] for file in sorted(groups)]
    if len(ordered) == 1:
        return [(_FILENAME_PATTERN.format(suffix=""), ordered[0])]
    return [
        (_FILENAME_PATTERN.format(suffix=f"-{number:05d}-of-{len(ordered):05d}"), members)
        for number, members in enumerate(ordered, start=1)
    ]


class _SourceColumns:
    """Where every output tensor lies in every source, in columns, to find runs quickly."""

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: Sequence[Checkpoint],
        matched: MatchedTensors,
        out_dtypes: Sequence[str],
    ) -> None:
        self._names = matched.names
        self._shapes = matched.shapes
        self._out_dtypes = out_dtypes
        self._out_ranks = np.array([DTYPE_RANK[dtype] for dtype in out_dtypes])
        self._is_float = np.array([dtype in FLOAT_DTYPES for dtype in out_dtypes])
        self._weights = recipe.weights
        self._files, self._starts, self._nbytes, self._ranks = [], [], [], []
        first_file = 0
        for checkpoint, rows in zip(checkpoints, matched.rows, strict=True):
            table = checkpoint.table
            self._files.append(table.files[rows] + first_file)
            self._starts.append(table.starts[rows])
            self._nbytes.append(table.nbytes[rows])
            self._ranks.append(table.dtype_ranks[rows])
            first_file += len(checkpoint.shards)

    def output_shard(self, filename: str, members: Sequence[int]) -> OutputShard:
        """Lay out one output file and divide its data into runs."""
        index_of = {self._names[index]: index for index in members}
        header = encode_header(
            (self._names[index], self._out_dtypes[index], self._shapes[index]) for index in members
        )
        filled = [tensor for tensor in header.tensors if tensor.nbytes]
        order = np.array([index_of[tensor.name] for tensor in filled], dtype=np.int64)
        bounds = self._run_bounds(order)
        runs = tuple(
            self._run(order[start:stop], filled[start].start) for start, stop in pairwise(bounds)
        )
        return OutputShard(
            filename=filename,
            header=header.encoded[HEADER_LENGTH_NBYTES:].decode(),
            file_nbytes=header.file_nbytes,
            read_nbytes=sum(int(nbytes[order].sum()) for nbytes in self._nbytes),
            tensor_names=tuple(tensor.name for tensor in header.tensors),
            runs=runs,
        )

    def _run_bounds(self, order: npt.NDArray[np.int64]) -> list[int]:
        """Divide tensors in output order where one is not the next of its neighbour everywhere."""
        if not order.size:
            return [0]
        before, after = order[:-1], order[1:]
        joined = self._is_float[before] & self._is_float[after]
        joined &= self._out_ranks[before] == self._out_ranks[after]
        for files, starts, nbytes, ranks in zip(
            self._files, self._starts, self._nbytes, self._ranks, strict=True
        ):
            joined &= files[before] == files[after]
            joined &= ranks[before] == ranks[after]
            joined &= starts[before] + nbytes[before] == starts[after]
        return [0, *(np.flatnonzero(~joined) + 1).tolist(), int(order.size)]

    def _run(self, members: npt.NDArray[np.int64], out_offset: int) -> Run:
        first = int(members[0])
        out_dtype = self._out_dtypes[first]
        num_elements = int(self._nbytes[0][members].sum()) // element_nbytes(
            DTYPES[self._ranks[0][first]]
        )
        return Run(
            name=self._names[first],
            num_tensors=len(members),
            num_elements=num_elements,
            reduction=LINEAR if out_dtype in FLOAT_DTYPES else AGREE,
            out_dtype=out_dtype,
            out_offset=out_offset,
            dtypes=tuple(DTYPES[ranks[first]] for ranks in self._ranks),
            files=tuple(int(files[first]) for files in self._files),
            offsets=tuple(int(starts[first]) for starts in self._starts),
            weights=self._weights,
        )


def _decided(settings: RunSettings, shards: Sequence[OutputShard]) -> RunSettings:
    """Return the settings with every `auto` decided.

    Sources are read by pread: measured faster than mapping, and a file that shrinks or a disk that
    goes away is an error, not a fatal signal. numba sums where it is installed and knows all the
    dtypes. Raises `RecipeError` where numba was asked for and can't.
    """
    io, backend = settings.io, settings.backend
    if io == "auto":
        io = "pread"
    finding = _numba_finding(settings, shards)
    if backend == NUMBA and finding is not None:
        raise RecipeError(f"backend numba: {finding}; use --backend torch (backend='torch')")
    if backend == "auto":
        backend = NUMBA if finding is None else TORCH
    return replace(settings, io=io, backend=backend)


def _numba_finding(settings: RunSettings, shards: Sequence[OutputShard]) -> str | None:
    """Say why the sums cannot be numba's, or None if they can."""
    if settings.on_cuda:
        return "it sums on the CPU alone"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'shardmix[fast]')"
    dtypes = {
        dtype
        for shard in shards
        for run in shard.runs
        if run.reduction == LINEAR
        for dtype in (*run.dtypes, run.out_dtype)
    }
    others = sorted(dtypes - NUMBA_DTYPES)
    return f"it does not know {', '.join(others)}" if others else None
