"""Prepares a plan: loads its backend, tries its device, or falls back.

Settings that nobody asked for are chosen again if they do not work here or turn out slower. Reads
no source.
"""

from collections.abc import Callable
from dataclasses import replace

from shardmix.compute.backend import Backend, load_backend
from shardmix.errors import BudgetError, RecipeError
from shardmix.options import TORCH, MergeOptions
from shardmix.plan.memory_budget import MemoryPlan, plan_memory
from shardmix.plan.merge_plan import MergePlan

Replan = Callable[[MergeOptions], MergePlan]
"""Plans the same merge with other options."""


def ready(
    plan: MergePlan, options: MergeOptions, replan: Replan
) -> tuple[MergePlan, Backend, tuple[str, ...]]:
    """Return a plan with its memory measured, its backend, and notes for the user.

    If a backend or a device that nobody asked for does not work here, or is slower, another is
    chosen and `replan` called. Raises `RecipeError` if one that was asked for does not work.
    """
    backend, finding = _load(plan)
    notes: tuple[str, ...] = ()
    if backend is not None and plan.settings.is_device_open:
        return _faster(plan, backend, options, replan)
    if backend is None:
        # Our own choice may change; the user's may not.
        fall_back, option = (
            ({"device": "cpu"}, "device")
            if plan.settings.on_cuda
            else ({"backend": TORCH}, "backend")
        )
        if options.get(option, "auto") != "auto":
            raise RecipeError(
                f"{finding}",
                remedy=f"use --{option} {fall_back[option]}, or leave it to auto",
            )
        options = {**options, **fall_back}  # type: ignore[typeddict-item]
        notes = (f"{finding}; merged with {option} {fall_back[option]} instead",)
        plan = replan(options)
        backend = load_backend(plan)
    # With the backend loaded, its memory is known rather than estimated.
    return plan.with_memory(_memory(plan)), backend, notes


def _faster(
    plan: MergePlan, backend: Backend, options: MergeOptions, replan: Replan
) -> tuple[MergePlan, Backend, tuple[str, ...]]:
    """Try the plan's GPU and the CPU; return the result of `ready` for the faster one."""
    options = {**options, "device": "cpu"}
    on_cpu, cpu_backend, notes = ready(replan(options), options, replan)
    try:
        trial_memory = _memory(plan)
    except BudgetError as error:  # with everything loaded, it takes more than estimated
        return on_cpu, cpu_backend, (*notes, f"on the CPU, since on a GPU {error}")
    closed = replace(plan.settings, is_device_open=False)
    on_gpu = replace(plan, settings=closed, memory=trial_memory)
    from shardmix.execute import calibrate_pass

    (chosen, backend), note = calibrate_pass.faster((on_cpu, cpu_backend), (on_gpu, backend))
    memory = _memory(chosen)
    # The trial's memory is part of the process's peak as well.
    peak = max(memory.projected_peak_nbytes, trial_memory.projected_peak_nbytes)
    chosen = chosen.with_memory(replace(memory, projected_peak_nbytes=peak))
    return chosen, backend, (*notes, note)


def _memory(plan: MergePlan) -> MemoryPlan:
    return plan_memory(
        plan.settings,
        num_tensors=plan.num_tensors,
        readers=plan.readers,
        gathering=plan.gathering,
        coding=plan.coding,
        earlier_peak=0 if plan.low_rank is None else plan.low_rank.peak_nbytes,
    )


def _load(plan: MergePlan) -> tuple[Backend | None, str | None]:
    """Return the plan's backend, or None and the reason that it does not work here."""
    try:
        backend = load_backend(plan)
    except (ImportError, OSError, RuntimeError) as error:  # installed, but broken
        reason = " ".join(str(error).split())
        return None, f"{plan.settings.backend} cannot be used here ({reason})"
    finding = backend.finding()
    return (backend, None) if finding is None else (None, finding)
