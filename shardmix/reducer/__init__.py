"""The arithmetic: a strip of every source to a strip of output. Knows buffers, not files.

    out = round_to_out_dtype(Σ float32(wᵢ) · float32(xᵢ))

in source order, every product and every sum rounded by itself, one rounding at the end; float64
throughout where any source is float64. The result depends on the values alone: not on how they
were cut into strips, nor on which backend computes it. There are two, chosen by the plan: torch
(every dtype, CPU and GPU) and, where numba is installed, compiled loops (bfloat16 and float32 on
the CPU: faster, and no torch in the process). A backend is imported when it is loaded, not before.

Whether a strip is finite costs no pass of its own. What is not finite is counted afterwards, by
whoever asks (`nonfinite`).
"""

from contextlib import AbstractContextManager
from typing import Protocol

from shardmix.plan import AGREE, LINEAR, NUMBA, MergePlan, Run
from shardmix.reducer.agree import AgreeReducer
from shardmix.reducer.nonfinite import NonfiniteCounts
from shardmix.safetensors_layout import element_nbytes

__all__ = [
    "Backend",
    "NonfiniteCounts",
    "Reducer",
    "load_backend",
    "make_reducers",
    "strip_num_elements",
]

_AGREE_STRIP_NBYTES = 1 << 16  # integers are few: small buffers do


class Reducer(Protocol):
    """Reduces the strips of one worker: `begin`, then `add` for each source, then `finish`."""

    def begin(self, run: Run, num_elements: int) -> None:
        """Start a strip of a run."""

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the strip into."""

    def add(self, source: int, raw: memoryview) -> None:
        """Take in a source's bytes, in source order; `raw` may be reused afterwards."""

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""

    @property
    def disagreeing(self) -> frozenset[int]:
        """Sources whose values differ from the first one's, where they should be the same."""

    @property
    def is_finite(self) -> bool:
        """Whether the strip last finished holds neither NaN nor infinity."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the strip last finished; where it is not finite."""


class Backend(Protocol):
    """What computes weighted sums; made once for a merge."""

    def make_reducer(self, *, strip_nbytes: int) -> Reducer:
        """Return a reducer for LINEAR runs, with its buffers allocated; called by each worker."""

    def finding(self) -> str | None:
        """Say why it cannot work here, or None if it can."""

    def running(self) -> AbstractContextManager[None]:
        """Surround a merge, to leave the library's settings as they were."""

    def peak_vram_nbytes(self) -> int:
        """Return the GPU memory reserved at most; 0 on the CPU."""


def load_backend(plan: MergePlan) -> Backend:
    """Import and ready a plan's backend, so that what it takes in memory can be measured."""
    if plan.settings.backend == NUMBA:
        from shardmix.reducer.numba_sum import NumbaBackend

        return NumbaBackend(run for run in plan.runs() if run.reduction == LINEAR)
    from shardmix.reducer.torch_sum import TorchBackend

    return TorchBackend(plan.settings.device)


def make_reducers(backend: Backend, *, strip_nbytes: int) -> dict[str, Reducer]:
    """Return one worker's reducer for each kind of run."""
    return {
        LINEAR: backend.make_reducer(strip_nbytes=strip_nbytes),
        AGREE: AgreeReducer(strip_nbytes=min(strip_nbytes, _AGREE_STRIP_NBYTES)),
    }


def strip_num_elements(run: Run, *, strip_nbytes: int) -> int:
    """Return how many elements of a run one strip holds, at least one."""
    widest = max(element_nbytes(dtype) for dtype in (*run.dtypes, run.out_dtype))
    if run.reduction == AGREE:
        return max(1, min(strip_nbytes, _AGREE_STRIP_NBYTES) // widest)
    return max(1, strip_nbytes // max(widest, 4))  # sums are at least float32
