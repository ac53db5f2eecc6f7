"""The report of a finished merge."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmix.anomalies import LeafAnomalies
from shardmix.execute.merge import MergeOutcome
from shardmix.plan.low_rank import LowRankReport, describe_low_rank
from shardmix.plan.merge_plan import MergePlan
from shardmix.reports.plan_facts import PlanFacts, plan_facts

if TYPE_CHECKING:
    from shardmix.scoring.report import ScoreReport

_MOST_NAMED = 10


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
    """Bytes read from the models' files. Of models that are decoded, fewer or more than of their
    weights."""
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
    low_rank: LowRankReport | None = None
    """Ranks and errors of an adapter's factors, parameter by parameter; None without factors."""
    scores: "ScoreReport | None" = None
    """Losses behind the weights, if these come from examples."""


def describe_merge(
    plan: MergePlan,
    result: MergeOutcome,
    *,
    warnings: tuple[str, ...],
    notes: tuple[str, ...],
) -> MergeReport:
    """Return the report of a finished merge; `warnings` come after the plan's own."""
    return MergeReport(
        **plan_facts(plan),
        bytes_read=result.num_bytes_read,
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
        low_rank=None if plan.low_rank is None else describe_low_rank(plan.low_rank),
    )


def _nonfinite_warnings(plan: MergePlan, anomalies: LeafAnomalies) -> Iterator[str]:
    """Yield a warning for the first tensors with NaN or Inf: all of a model may have some."""
    found = anomalies.nonfinite
    for name in heapq.nsmallest(_MOST_NAMED, found):
        yield f"{name}: {plan.nonfinite_finding(name, found[name])}"
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
