"""The report of a plan."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from shardmix.methods import keep_first
from shardmix.plan.merge_plan import MergePlan
from shardmix.recipe.yaml_file import recipe_to_dict
from shardmix.reports.plan_facts import PlanFacts, plan_facts

_OPEN = (
    "the device is assumed: the merge begins by measuring whether the CPU is faster (--device "
    "names one); the projected peak is that of whichever takes more"
)


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
    parameters: tuple[ParametersReport, ...]
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


def describe_plan(plan: MergePlan, *, disk_free: int | None) -> PlanReport:
    """Return the report of a plan."""
    return PlanReport(
        **plan_facts(plan),
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
        for segment in shard.merged:
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
