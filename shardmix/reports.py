"""Reports of a plan, of a finished merge and of a model: flat, typed, ready for JSON.

The field names are those of the `--json` output. Reads no files.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardmix.anomalies import LeafAnomalies
from shardmix.conventions.declarations import declaration_of
from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.naming import ties_word_embeddings
from shardmix.execute.merge import MergeOutcome
from shardmix.execute.write_pass import nonfinite_finding
from shardmix.formats.safetensors_layout import TensorInfo
from shardmix.matching.ties import NamedModel, shared_with
from shardmix.methods import keep_first
from shardmix.plan.merge_plan import MergePlan
from shardmix.recipe.parameters import source_weights
from shardmix.recipe.yaml_file import recipe_to_dict
from shardmix.scoring.report import ScoreReport
from shardmix.sources.base import Source

_MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class ShardReport:
    """One output file."""

    name: str
    """File name."""
    bytes: int
    """Its size."""
    num_tensors: int
    """Number of tensors that it stores."""
    bytes_read: int
    """Source bytes that go into it."""
    sources: tuple[str, ...]
    """Source files of those bytes."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The tensors and shards of a model."""

    source: str
    """The user's name for it."""
    path: str
    """Its path."""
    num_tensors: int
    """Number of tensors stored."""
    num_parameters: int
    """Elements of all tensors stored; a tied one counts once."""
    bytes: int
    """Size of the weight files."""
    dtypes: dict[str, int]
    """Elements by safetensors dtype."""
    shards: tuple[ShardReport, ...]
    """The weight files."""
    tie_word_embeddings: bool | None
    """The config's value, or None if it has none."""
    tied: dict[str, str]
    """Parameter that is not stored → the stored one that it shares."""
    tensors: tuple[TensorInfo, ...]
    """All tensors, by file and within it by offset."""


def describe_model(source: Source) -> ModelReport:
    """Return the report of a source."""
    parts = source.parts
    tensors = tuple(
        replace(tensor, name=f"{part.subfolder}/{tensor.name}") if part.subfolder else tensor
        for part in parts
        for tensor in part.tensors
    )
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.num_elements
    tied = {
        f"{prefix}{absent}": f"{prefix}{stored}"
        for part in parts
        for prefix in (f"{part.subfolder}/" if part.subfolder else "",)
        for absent, stored in _tied(part).items()
    }
    return ModelReport(
        source=source.text,
        path=str(_location(source)),
        num_tensors=len(tensors),
        num_parameters=sum(dtypes.values()),
        bytes=sum(file.nbytes for part in parts for file in part.identity.files),
        dtypes=dtypes,
        shards=tuple(
            ShardReport(
                file.name,
                file.nbytes,
                int((part.tensors.files == index).sum()),
                file.nbytes,
                (),
            )
            for part in parts
            for index, file in enumerate(part.identity.files)
        ),
        tie_word_embeddings=ties_word_embeddings(source.config),
        tied=tied,
        tensors=tensors,
    )


def _location(source: Source) -> Path:
    """Return what a model is on the disk: its folder, or its one file."""
    return source.root / source.identity.files[0].name if source.is_single_file else source.root


def _tied(part: Source) -> dict[str, str]:
    rows = {name: row for row, name in enumerate(part.tensors.names)}
    return shared_with(NamedModel(part.config, declaration_of(part.config), rows))


@dataclass(frozen=True, slots=True)
class ParametersReport:
    """Parameters of the merge method, resolved, and the tensors that share them."""

    num_tensors: int
    """Number of tensors of floats that have them."""
    first_tensor: str
    """Name of the first of these, in output order."""
    shared: dict[str, float | bool | str]
    """Values for all models, by name."""
    by_model: tuple[dict[str, float | bool | str], ...]
    """Values of each model, in the recipe's order, without the base model."""


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """The facts of a merge that its plan decides. Sizes in bytes."""

    output: str
    """The output folder, or "" if a plan names none."""
    num_tensors: int
    """Tensors in the output."""
    num_models: int
    """Models merged."""
    bytes_written: int
    """Bytes of the output's weight files."""
    device: str
    """cpu, cuda (all GPUs) or cuda:N; a plan's warning says so if it may still become cpu."""
    io: str
    """Way to read sources: mmap or pread."""
    backend: str
    """Backend of the arithmetic: torch or llvm."""
    strip_bytes: int
    """Size of one chunk's accumulator; no buffer of a chunk is larger."""
    workers: int
    """Threads, each with a chunk of its own."""
    projected_peak_bytes: int
    """Upper bound of the process's peak resident memory."""
    weights: tuple[float | None, ...]
    """Weights in source order."""
    shards: tuple[ShardReport, ...]
    """The weight files."""
    digest: str
    """Digest of the output's files: xxh3, blake3 or sha256."""
    left_out: tuple[LeftOut, ...]
    """Files and folders of the config source that are left out, with the reasons."""


@dataclass(frozen=True, slots=True)
class PlanReport(PlanFacts):
    """The plan of a merge. Sizes in bytes."""

    bytes_read: int
    """Weight bytes to read."""
    reserved_bytes: int
    """The part of the projected peak that Python, torch and the process itself take."""
    projected_vram_bytes: int
    """Upper bound of the GPU memory that torch reserves, on one GPU."""
    keeps_sources_cached: bool
    """True if sources may stay in the page cache. If all that is read and written is more than half
    of the available memory, they are dropped from it behind the merge."""
    keeps_output_cached: bool
    """True if the output may stay in the page cache. It is dropped if it is larger than that half
    and forced to disk."""
    recipe: dict[str, Any]
    """Recipe, in the recipe language."""
    parameters: tuple["ParametersReport", ...]
    """The method's parameters, each with the tensors that share them."""
    sources: tuple[str, ...]
    """The user's names of the models."""
    auxiliary_files: tuple[str, ...]
    """Files that go along with the weights."""
    plan_digest: str
    """Digest of the plan; plans with the same digest write the same bytes from the same sources."""
    warnings: tuple[str, ...]
    """Warnings to read beforehand."""
    disk_needed_bytes: int
    """Disk space of the output."""
    disk_free_bytes: int | None
    """Free space of the output's disk, staged files included; None if no output was named."""


@dataclass(frozen=True, slots=True)
class NonfiniteReport:
    """The values of an output's tensor that are not finite."""

    name: str
    """Name of the tensor."""
    num_nan: int
    """Number of NaNs."""
    num_inf: int
    """Number of infinities."""
    num_overflowed: int
    """Number of infinities that rounding to the output's dtype made."""


@dataclass(frozen=True, slots=True)
class MergeReport(PlanFacts):
    """The result of a merge. Sizes in bytes."""

    bytes_read: int
    """Weight bytes read."""
    bytes_kept: int
    """Weight bytes not read, since an earlier merge had written their part of the output."""
    seconds: float
    """Time from the first read until the output was complete."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM)."""
    peak_vram_bytes: int
    """Peak GPU memory that torch had reserved, on one GPU; 0 on the CPU."""
    provenance_sha256: str
    """SHA-256 (hex) of the output's shardmix.json: noted elsewhere, it reveals all later edits."""
    nonfinite: tuple[NonfiniteReport, ...]
    """Tensors of the output with NaN or Inf."""
    warnings: tuple[str, ...]
    """Warnings about the output."""
    notes: tuple[str, ...] = ()
    """Notes on the output that are no warnings, such as its permissions."""
    scores: ScoreReport | None = None
    """Losses behind the weights, if these come from examples."""


_OPEN = (
    "the device is assumed: the merge begins by measuring whether the CPU is faster (--device "
    "names one); the projected peak is that of whichever takes more"
)


def _planned(plan: MergePlan) -> dict[str, Any]:
    """Return the fields of `PlanFacts`."""
    return {
        "output": plan.output,
        "num_tensors": plan.num_tensors,
        "num_models": plan.num_models,
        "bytes_written": plan.write_nbytes,
        "device": plan.settings.device,
        "io": plan.settings.io,
        "backend": plan.settings.backend,
        "strip_bytes": plan.memory.chunk_nbytes,
        "workers": plan.memory.workers,
        "projected_peak_bytes": plan.memory.projected_peak_nbytes,
        "weights": source_weights(plan.recipe),
        "shards": _shard_reports(plan),
        "digest": plan.digest_algorithm,
        "left_out": plan.left_out,
    }


def describe_plan(plan: MergePlan, *, disk_free: int | None) -> PlanReport:
    """Return the report of a plan."""
    return PlanReport(
        **_planned(plan),
        bytes_read=plan.read_nbytes,
        reserved_bytes=plan.memory.reserved_nbytes,
        projected_vram_bytes=plan.memory.projected_vram_nbytes,
        keeps_sources_cached=plan.cache_use.keeps_sources,
        keeps_output_cached=plan.cache_use.keeps_output,
        recipe=recipe_to_dict(plan.recipe),
        parameters=_parameters(plan),
        sources=tuple(source.text for source in plan.sources),
        auxiliary_files=plan.auxiliary_files,
        plan_digest=plan.digest(),
        warnings=(*plan.warnings, *([_OPEN] if plan.settings.is_device_open else [])),
        disk_needed_bytes=plan.disk_needed_nbytes,
        disk_free_bytes=disk_free,
    )


def _parameters(plan: MergePlan) -> tuple[ParametersReport, ...]:
    """Return the parameters that tensors of floats have, in output order."""
    first: dict[int, str] = {}
    num_tensors: Counter[int] = Counter()
    for shard in plan.shards:
        for segment in shard.segments:
            if segment.method != keep_first.NAME:
                first.setdefault(segment.parameters, segment.name)
                num_tensors[segment.parameters] += segment.num_tensors
    return tuple(
        ParametersReport(
            num_tensors=num_tensors[group],
            first_tensor=name,
            shared=dict(plan.parameters[group].shared),
            by_model=tuple(map(dict, plan.parameters[group].by_model)),
        )
        for group, name in first.items()
    )


def describe_merge(
    plan: MergePlan,
    result: MergeOutcome,
    *,
    warnings: tuple[str, ...],
    notes: tuple[str, ...],
) -> MergeReport:
    """Return the report of a finished merge; `warnings` come after the plan's own."""
    return MergeReport(
        **_planned(plan),
        bytes_read=plan.read_nbytes - result.num_bytes_kept,
        bytes_kept=result.num_bytes_kept,
        seconds=result.seconds,
        peak_rss_bytes=result.peak_resident_nbytes,
        peak_vram_bytes=result.peak_vram_nbytes,
        provenance_sha256=result.provenance_sha256,
        nonfinite=tuple(
            NonfiniteReport(name, *result.anomalies.nonfinite[name])
            for name in sorted(result.anomalies.nonfinite)
        ),
        warnings=(
            *plan.warnings,
            *warnings,
            *_nonfinite_warnings(plan, result.anomalies),
            *_disagreements(plan, result.anomalies),
        ),
        notes=notes,
    )


def _nonfinite_warnings(plan: MergePlan, anomalies: LeafAnomalies) -> Iterator[str]:
    """Yield a warning for the first tensors with NaN or Inf: all of a model may have some."""
    found = anomalies.nonfinite
    for name in heapq.nsmallest(_MOST_NAMED, found):
        yield f"{name}: {nonfinite_finding(name, found[name], plan)}"
    if len(found) > _MOST_NAMED:
        yield f"{len(found) - _MOST_NAMED} more tensors hold NaN or Inf; --json lists them"


def _disagreements(plan: MergePlan, anomalies: LeafAnomalies) -> Iterator[str]:
    """Yield a warning for the first integer tensors that differ between models."""
    sources, found = [source.text for source in plan.sources], anomalies.disagreeing
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
    paths: list[tuple[str, ...]] = [(file.path,) for file in plan.files]
    paths += [tuple(file.path for file in each.identity.files) for each in plan.decoders]
    return tuple(
        ShardReport(
            name=shard.filename,
            bytes=shard.file_nbytes,
            num_tensors=len(shard.tensor_names),
            bytes_read=shard.read_nbytes,
            sources=tuple(
                path
                for number in sorted({f for segment in shard.segments for f in segment.files})
                for path in paths[number]
            ),
        )
        for shard in plan.shards
    )
