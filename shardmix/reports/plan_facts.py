"""Common parts of the reports of a plan and of its merge, and the report of one file."""

from dataclasses import dataclass
from typing import Any

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.output_quantisations import OUTPUT_QUANTISATIONS
from shardmix.plan.merge_plan import MergePlan
from shardmix.recipe.parameters import source_weights


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
class QuantizedReport:
    """The tensors of the output that are written as codes."""

    quantization: str
    """Name of the quantisation."""
    num_tensors: int
    """Number of tensors, their scales not counted."""
    rule: str
    """The choice of tensors, in words."""
    not_converted: tuple[str, ...]
    """Modules of matrices that stay float, as the config names them."""


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
    """Algorithm of the output files' digests: one of `hashing.ALGORITHMS`."""
    quantized: QuantizedReport | None
    """The tensors that are quantised, or None."""
    left_out: tuple[LeftOut, ...]
    """Files and folders of the config source that are left out, with the reasons."""


def plan_facts(plan: MergePlan) -> dict[str, Any]:
    """Return the fields of `PlanFacts` by name."""
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
        "quantized": _quantized(plan),
        "left_out": plan.left_out,
    }


def _quantized(plan: MergePlan) -> QuantizedReport | None:
    if plan.quantised is None:
        return None
    return QuantizedReport(
        quantization=plan.quantised.quantisation,
        num_tensors=plan.quantised.num_tensors,
        rule=OUTPUT_QUANTISATIONS[plan.quantised.quantisation].rule,
        not_converted=plan.quantised.unconverted,
    )


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
