"""Makes a plan ready to be carried out: loads its backend, tries its device, or falls back.

What nobody asked for is chosen anew where it cannot be used here or turns out the slower. Reads no
source.
"""

from collections.abc import Callable
from dataclasses import replace

from shardmix.compute.backend import Backend, load_backend
from shardmix.errors import BudgetError, RecipeError
from shardmix.execute import calibrate
from shardmix.options import TORCH, MergeOptions
from shardmix.plan.memory_budget import MemoryPlan, plan_memory
from shardmix.plan.merge_plan import MergePlan

Replan = Callable[[MergeOptions], MergePlan]
"""Plans the same merge with other options."""


def ready(
    plan: MergePlan, options: MergeOptions, replan: Replan
) -> tuple[MergePlan, Backend, tuple[str, ...]]:
    """Return a plan with its memory measured, its backend, and what is to be said of that.

    Where a backend or a device that nobody asked for cannot be used here, or is the slower, another
    is chosen and `replan` asked. Raises `RecipeError` where one that was asked for cannot be used.
    """
    backend, finding = _load(plan)
    notes: tuple[str, ...] = ()
    if backend is not None and plan.settings.is_device_open:
        return _faster(plan, backend, options, replan)
    if backend is None:
        # What was chosen by ourselves may be chosen anew; what was asked for may not.
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
    # With the backend loaded, what it takes is known rather than estimated.
    return plan.with_memory(_memory(plan)), backend, notes


def _faster(
    plan: MergePlan, backend: Backend, options: MergeOptions, replan: Replan
) -> tuple[MergePlan, Backend, tuple[str, ...]]:
    """Try the plan's GPU and the CPU; return what `ready` does for the faster one."""
    options = {**options, "device": "cpu"}
    on_cpu, cpu_backend, notes = ready(replan(options), options, replan)
    try:
        trial_memory = _memory(plan)
    except BudgetError as error:  # with all loaded, it is known to be more than was thought
        return on_cpu, cpu_backend, (*notes, f"on the CPU, since on a GPU {error}")
    closed = replace(plan.settings, is_device_open=False)
    on_gpu = replace(plan, settings=closed, memory=trial_memory)
    (chosen, backend), note = calibrate.faster((on_cpu, cpu_backend), (on_gpu, backend))
    memory = _memory(chosen)
    # What the trial took counts to the process's peak as well.
    peak = max(memory.projected_peak_nbytes, trial_memory.projected_peak_nbytes)
    chosen = chosen.with_memory(replace(memory, projected_peak_nbytes=peak))
    return chosen, backend, (*notes, note)


def _memory(plan: MergePlan) -> MemoryPlan:
    return plan_memory(
        plan.settings, num_tensors=plan.num_tensors, reader_nbytes=plan.reader_nbytes
    )


def _load(plan: MergePlan) -> tuple[Backend | None, str | None]:
    """Return the plan's backend, or None and why it cannot be used here."""
    try:
        backend = load_backend(plan)
    except (ImportError, OSError, RuntimeError) as error:  # installed, but broken
        reason = " ".join(str(error).split())
        return None, f"{plan.settings.backend} cannot be used here ({reason})"
    finding = backend.finding()
    return (backend, None) if finding is None else (None, finding)
