"""The memory of this process and machine: taken, available, and given back."""

import ctypes
import resource
import sys
from os import PathLike
from pathlib import Path

import psutil

from shardmix.errors import BudgetError
from shardmix.system.cgroups import group_available_nbytes
from shardmix.system.units import MIB, format_mib

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE_BLOCK_NBYTES = 1 * MIB

# Less than this is taken without asking how much is available.
_LITTLE_NBYTES = 64 * MIB


def resident_nbytes() -> int:
    """Return the bytes that the process has in memory now (its resident set)."""
    return int(psutil.Process().memory_info().rss)


def available_nbytes() -> int:
    """Return the memory available without taking any from other programs.

    Cached files count as available. In a container its limit counts, too.
    """
    on_machine = int(psutil.virtual_memory().available)
    in_group = group_available_nbytes()
    return on_machine if in_group is None else min(on_machine, in_group)


def peak_resident_nbytes() -> int:
    """Return the largest resident set of the process so far (VmHWM on Linux)."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_room(
    needed: int, *, max_memory: int | None, subject: str | PathLike[str], purpose: str
) -> None:
    """Raise `BudgetError` if taking `needed` more bytes could exceed the process's budget.

    Without a budget, four fifths of the available memory is one. The
    message begins with `subject` and `purpose`.
    """
    if max_memory is None:
        if needed <= _LITTLE_NBYTES:
            return
        budget = resident_nbytes() + available_nbytes() * 4 // 5
        limit = f"only {format_mib(budget)} can be had here"
    else:
        budget, limit = max_memory, f"--max-memory is {format_mib(max_memory)}"
    least = resident_nbytes() + needed
    if least > budget:
        raise BudgetError(
            f"{purpose} may take {format_mib(least)} in all but {limit}; later steps may take more",
            subject=subject,
            remedy="raise the budget, or use a machine with more memory",
        )


def give_back_large_blocks() -> None:
    """Make freed blocks of 1 MiB and more go back to the system, for this whole process.

    By default glibc soon keeps blocks of up to 32 MiB on its heap, and small blocks that stay leave
    holes between them. A process through which weights stream would grow with every layer
    (measured: by a sixth of the model). Does nothing with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_NBYTES)


def give_back_free_memory() -> None:
    """Make free memory within the process go back to the system.

    glibc keeps freed blocks on its heap. Memory held when chunks are sized counts against the
    budget; memory freed before should not. Does nothing with other C libraries.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
