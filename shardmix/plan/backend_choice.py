"""The choice of device, backend and way to read, for all that the user left to auto."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

from shardmix.dtypes import LLVM_DTYPES, element_nbytes
from shardmix.errors import RecipeError
from shardmix.methods import keep_first
from shardmix.options import LLVM, TORCH, RunSettings
from shardmix.plan.merge_plan import OutputShard

MEASURED_FROM_NBYTES = 200 * 10**9
"""Source bytes of a merge from which on a GPU is tried if nobody named a device.

To load torch's build for CUDA and to make a context takes seconds. A GPU can only save the
arithmetic: with kernels a tenth of a merge's time, which went at 6.6 GB/s on two cores
(docs/performance.md). So of 200 GB, half a minute, it can save three seconds; of less, not even the
time of the trial.
"""


def decide(settings: RunSettings, shards: Sequence[OutputShard]) -> RunSettings:
    """Return the settings with every `auto` decided.

    Sources are read by pread: as fast as mapping, in less memory. Kernels do the arithmetic if
    llvmlite is installed and they know all the dtypes. Raises `RecipeError` if they were asked for
    and cannot. If a GPU may pay, it is assumed until the merge starts by measuring.
    """
    io, backend = settings.io, settings.backend
    if settings.device == "auto":
        is_open = backend != LLVM and _summed_nbytes(shards) >= MEASURED_FROM_NBYTES
        device = "cuda" if is_open else "cpu"
        settings = replace(settings, device=device, is_device_open=is_open)
    if io == "auto":
        io = "pread"
    finding = _llvm_finding(settings, shards)
    if backend == LLVM and finding is not None:
        raise RecipeError(
            finding,
            subject="backend llvm",
            remedy="use --backend torch (backend='torch')",
        )
    if backend == "auto":
        backend = LLVM if finding is None else TORCH
    return replace(settings, io=io, backend=backend)


def _summed_nbytes(shards: Sequence[OutputShard]) -> int:
    """Return the bytes of all sources that are merged, and not only compared."""
    return sum(
        segment.num_elements * sum(map(element_nbytes, segment.dtypes))
        for shard in shards
        for segment in shard.merged
        if segment.method != keep_first.NAME
    )


def _llvm_finding(settings: RunSettings, shards: Sequence[OutputShard]) -> str | None:
    """Return why kernels cannot do the arithmetic, or None if they can."""
    if settings.on_cuda:
        return "it sums on the CPU alone"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed (pip install llvmlite)"
    dtypes = {
        dtype
        for shard in shards
        for segment in shard.merged
        if segment.method != keep_first.NAME
        for dtype in (*segment.dtypes, segment.out_dtype)
    }
    others = sorted(dtypes - LLVM_DTYPES)
    return f"it does not know {', '.join(others)}" if others else None
