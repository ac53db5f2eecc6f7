"""What is told of a plan, of a finished merge and of a model: flat, typed, ready for JSON.

The field names are those of the `--json` output. Reads no files.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shardmix.anomalies import LeafAnomalies
from shardmix.conventions.declarations import declaration_of
from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.naming import ties_word_embeddings
from shardmix.execute.executor import ExecutionResult
from shardmix.execute.task_queue import nonfinite_finding
from shardmix.formats.safetensors_layout import TensorInfo
from shardmix.matching.ties import NamedModel, shared_with
from shardmix.plan.merge_plan import MergePlan
from shardmix.scoring.report import ScoreReport
from shardmix.sources.checkpoint import Checkpoint

_MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class ShardReport:
    """One output file."""

    name: str
    """File name."""
    bytes: int
    """Its size."""
    num_tensors: int
    """How many tensors it stores."""
    bytes_read: int
    """Source bytes that go into it."""
    sources: tuple[str, ...]
    """The files that those bytes are read from."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What a checkpoint holds."""

    source: str
    """As named by the user."""
    path: str
    """Where it lies."""
    num_tensors: int
    """Tensors stored."""
    num_parameters: int
    """Elements of all tensors stored; a tied one counts once."""
    bytes: int
    """Size of the weight files."""
    dtypes: dict[str, int]
    """Elements by safetensors dtype."""
    shards: tuple[ShardReport, ...]
    """The weight files."""
    tie_word_embeddings: bool | None
    """What the config says; None where it says nothing."""
    tied: dict[str, str]
    """Parameter that is not stored → the stored one that it shares."""
    tensors: tuple[TensorInfo, ...]
    """All tensors, by file and within it by offset."""


def describe_model(checkpoint: Checkpoint) -> ModelReport:
    """Return what a checkpoint holds."""
    parts = checkpoint.parts
    tensors = tuple(
        replace(tensor, name=f"{part.place}/{tensor.name}") if part.place else tensor
        for part in parts
        for tensor in part.tensors()
    )
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.num_elements
    tied = {
        f"{prefix}{absent}": f"{prefix}{stored}"
        for part in parts
        for prefix in (f"{part.place}/" if part.place else "",)
        for absent, stored in _tied(part).items()
    }
    return ModelReport(
        source=checkpoint.source,
        path=str(checkpoint.shards[0].path if checkpoint.is_single_file else checkpoint.root),
        num_tensors=len(tensors),
        num_parameters=sum(dtypes.values()),
        bytes=sum(shard.nbytes for part in parts for shard in part.shards),
        dtypes=dtypes,
        shards=tuple(
            ShardReport(
                shard.path.relative_to(part.root).as_posix(),
                shard.nbytes,
                int((part.table.files == index).sum()),
                shard.nbytes,
                (),
            )
            for part in parts
            for index, shard in enumerate(part.shards)
        ),
        tie_word_embeddings=ties_word_embeddings(checkpoint.config),
        tied=tied,
        tensors=tensors,
    )


def _tied(part: Checkpoint) -> dict[str, str]:
    rows = {name: row for row, name in enumerate(part.table.names)}
    return shared_with(NamedModel(part.config, declaration_of(part.config), rows))


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What a merge would do. Sizes in bytes."""

    output: str
    """The output folder; empty where none was named."""
    num_tensors: int
    """Tensors in the output."""
    num_models: int
    """Models merged."""
    bytes_read: int
    """Weights to read."""
    bytes_written: int
    """Weight files to write."""
    device: str
    """cpu, cuda (all GPUs) or cuda:N; a warning says so where it may still become cpu."""
    io: str
    """How sources are read: mmap or pread."""
    backend: str
    """What does the sums: torch or llvm."""
    strip_bytes: int
    """Size of one chunk's accumulator; no buffer of a chunk is larger."""
    workers: int
    """Threads, each with a chunk of its own."""
    reserved_bytes: int
    """Of the projected peak, what Python, torch and the process itself take."""
    projected_peak_bytes: int
    """Resident memory of the process at its peak, at most."""
    projected_vram_bytes: int
    """GPU memory that torch will have reserved at its peak, at most, on one GPU."""
    keeps_sources_cached: bool
    """What is read may stay in the page cache; where all that is read and written is more than half
    of the available memory, it is dropped from there behind the merge."""
    keeps_output_cached: bool
    """What is written may stay; likewise, where that alone is more and is forced to disk."""
    weights: tuple[float, ...]
    """In source order."""
    sources: tuple[str, ...]
    """As named by the user."""
    shards: tuple[ShardReport, ...]
    """The files to write."""
    auxiliary_files: tuple[str, ...]
    """Files that go along with the weights."""
    left_out: tuple[LeftOut, ...]
    """Files and folders that do not, and why."""
    plan_digest: str
    """Plans of one digest write the same bytes from the same sources."""
    warnings: tuple[str, ...]
    """What to know beforehand."""
    digest: str
    """What the output's files are to be hashed with: xxh3, blake3 or sha256."""
    disk_needed_bytes: int
    """What the output takes."""
    disk_free_bytes: int | None
    """Room on the output's disk, staged files included; None where no output was named."""


@dataclass(frozen=True, slots=True)
class NonfiniteReport:
    """What a tensor of an output holds that is not finite."""

    name: str
    """The tensor."""
    num_nan: int
    """Values that are not a number."""
    num_inf: int
    """Values that are infinite."""
    num_overflowed: int
    """Of these, the values that rounding to the output's dtype made so."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge did. Sizes in bytes."""

    output: str
    """The output folder."""
    num_tensors: int
    """Tensors in the output."""
    num_models: int
    """Models merged."""
    bytes_read: int
    """Weights read."""
    bytes_kept: int
    """Weights not read, since an earlier run had done their part of the output."""
    bytes_written: int
    """Weight files of the output."""
    seconds: float
    """From the first read until the output was in place."""
    device: str
    """cpu, cuda or cuda:N."""
    io: str
    """How sources were read: mmap or pread."""
    backend: str
    """What does the sums: torch or llvm."""
    strip_bytes: int
    """Size of one chunk's accumulator; no buffer of a chunk is larger."""
    workers: int
    """Threads, each with a chunk of its own."""
    projected_peak_bytes: int
    """What the peak was promised to stay within."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM)."""
    peak_vram_bytes: int
    """GPU memory that torch had reserved at most, on one GPU; 0 on the CPU."""
    weights: tuple[float, ...]
    """In source order, as used."""
    shards: tuple[ShardReport, ...]
    """The files written."""
    digest: str
    """What the output's files are hashed with: xxh3, blake3 or sha256."""
    provenance_sha256: str
    """SHA-256 (hex) of the output's shardmix.json: noted elsewhere, it finds all later edits."""
    nonfinite: tuple[NonfiniteReport, ...]
    """Tensors of the output that hold NaN or Inf."""
    left_out: tuple[LeftOut, ...]
    """Files and folders of the model that gives the config that stay behind, and why."""
    warnings: tuple[str, ...]
    """What to know about the output."""
    notes: tuple[str, ...] = ()
    """What else there is to know, though nothing is amiss: who may read the output."""
    scores: ScoreReport | None = None
    """Where the weights come from examples: the losses that they follow from."""


_OPEN = (
    "the device is assumed: the merge begins by measuring whether the CPU is faster (--device "
    "names one); the projected peak is that of whichever takes more"
)


def describe_plan(plan: MergePlan, *, disk_free: int | None) -> PlanReport:
    """Return what a plan means to people."""
    return PlanReport(
        output=plan.output,
        num_tensors=plan.num_tensors,
        num_models=plan.num_models,
        bytes_read=plan.read_nbytes,
        bytes_written=plan.write_nbytes,
        device=plan.settings.device,
        io=plan.settings.io,
        backend=plan.settings.backend,
        strip_bytes=plan.memory.chunk_nbytes,
        workers=plan.memory.workers,
        reserved_bytes=plan.memory.reserved_nbytes,
        projected_peak_bytes=plan.memory.projected_peak_nbytes,
        projected_vram_bytes=plan.memory.projected_vram_nbytes,
        keeps_sources_cached=plan.cache_use.keeps_sources,
        keeps_output_cached=plan.cache_use.keeps_output,
        weights=plan.weights,
        sources=plan.sources,
        shards=_shard_reports(plan),
        auxiliary_files=plan.auxiliary_files,
        left_out=plan.left_out,
        plan_digest=plan.digest(),
        digest=plan.digest_algorithm,
        warnings=(*plan.warnings, *([_OPEN] if plan.settings.is_device_open else [])),
        disk_needed_bytes=plan.disk_needed_nbytes,
        disk_free_bytes=disk_free,
    )


def describe_merge(
    plan: MergePlan,
    result: ExecutionResult,
    *,
    warnings: tuple[str, ...],
    notes: tuple[str, ...],
) -> MergeReport:
    """Return what carrying out a plan came to; `warnings` come after the plan's own."""
    return MergeReport(
        output=plan.output,
        num_tensors=plan.num_tensors,
        num_models=plan.num_models,
        bytes_read=plan.read_nbytes - result.num_bytes_kept,
        bytes_kept=result.num_bytes_kept,
        bytes_written=plan.write_nbytes,
        seconds=result.seconds,
        device=plan.settings.device,
        io=plan.settings.io,
        backend=plan.settings.backend,
        strip_bytes=plan.memory.chunk_nbytes,
        workers=plan.memory.workers,
        projected_peak_bytes=plan.memory.projected_peak_nbytes,
        peak_rss_bytes=result.peak_resident_nbytes,
        peak_vram_bytes=result.peak_vram_nbytes,
        weights=plan.weights,
        shards=_shard_reports(plan),
        digest=plan.digest_algorithm,
        provenance_sha256=result.provenance_sha256,
        nonfinite=tuple(
            NonfiniteReport(name, *result.findings.nonfinite[name])
            for name in sorted(result.findings.nonfinite)
        ),
        left_out=plan.left_out,
        warnings=(
            *plan.warnings,
            *warnings,
            *_nonfinite_warnings(plan, result.findings),
            *_disagreements(plan, result.findings),
        ),
        notes=notes,
    )


def _nonfinite_warnings(plan: MergePlan, findings: LeafAnomalies) -> Iterator[str]:
    """Name the tensors that hold NaN or Inf: the first ones, since it may be all of a model."""
    found = findings.nonfinite
    for name in heapq.nsmallest(_MOST_NAMED, found):
        yield f"{name}: {nonfinite_finding(name, found[name], plan)}"
    if len(found) > _MOST_NAMED:
        yield f"{len(found) - _MOST_NAMED} more tensors hold NaN or Inf; --json lists them"


def _disagreements(plan: MergePlan, findings: LeafAnomalies) -> Iterator[str]:
    """Say which integer tensors differ between models: the first ones, as above."""
    sources, found = plan.sources, findings.disagreeing
    for name in heapq.nsmallest(_MOST_NAMED, found):
        models = found[name]
        yield (
            f"{name}: differs in {', '.join(sources[model] for model in models)}; integers are not "
            f"averaged: {sources[0]}'s were kept"
        )
    if len(found) > _MOST_NAMED:
        num_more = len(found) - _MOST_NAMED
        yield f"{num_more} more tensors of integers differ; {sources[0]}'s were kept"


def _shard_reports(plan: MergePlan) -> tuple[ShardReport, ...]:
    return tuple(
        ShardReport(
            name=shard.filename,
            bytes=shard.file_nbytes,
            num_tensors=len(shard.tensor_names),
            bytes_read=shard.read_nbytes,
            sources=tuple(
                plan.files[file].path
                for file in sorted({f for segment in shard.segments for f in segment.files})
            ),
        )
        for shard in plan.shards
    )
