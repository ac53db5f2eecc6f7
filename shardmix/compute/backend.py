"""The arithmetic: a chunk of every source to a chunk of output. Knows buffers, and open files by
number.

    out = round_to_out_dtype(Σ float32(wᵢ) · float32(xᵢ))

in source order, every product and every sum rounded by itself, one rounding at the end; float64
throughout where any source is float64. The result depends on the values alone: not on how they
were cut into chunks, nor on which backend computes it. There are two, chosen by the plan: torch
(every dtype, CPU and GPU) and, where llvmlite is installed, compiled kernels (bfloat16, float16 and
float32 on the CPU: faster, and no torch in the process). What one needs is imported when it is
loaded, not before.

Whether a chunk is finite costs no pass of its own. What is not finite is counted afterwards, by
whoever asks (`nonfinite`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from shardmix.anomalies import NonfiniteCounts
from shardmix.compute.chunk_size import KEEP_FIRST_CHUNK_NBYTES
from shardmix.methods import keep_first
from shardmix.options import LLVM
from shardmix.plan.merge_plan import MergePlan, Segment


class Reducer(Protocol):
    """Reduces a worker's chunks: `begin`, then `add` for each source, `finish`, and `wait`.

    Or `begin`, `read`, and `wait`.
    """

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment: so many elements from `start` on."""

    def read(self, descriptors: Sequence[int]) -> tuple[memoryview, float] | None:
        """Read the sources from these open files and do the chunk at once, where it can.

        Returns the chunk's output bytes, valid until the next `begin`, and the seconds that reading
        took; or None: then `add` and `finish` do it.
        """

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""

    def add(self, source: int, raw: memoryview) -> None:
        """Take in a source's bytes, in source order; they stay as they are until `finish`."""

    def finish(self) -> memoryview:
        """End a chunk, whose sources' bytes are not needed any more.

        Returns where its output bytes are once `wait` has returned, until the next `begin`. Only a
        GPU leaves something to wait for.
        """

    def wait(self) -> None:
        """Wait for the chunk's output; only then is known what follows."""

    @property
    def disagreeing(self) -> frozenset[int]:
        """Sources whose values differ from the first one's, where they should be the same."""

    @property
    def is_finite(self) -> bool:
        """Whether the chunk last finished holds neither NaN nor infinity."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the chunk last finished; where it is not finite."""


class Backend(Protocol):
    """What computes weighted sums; made once for a merge."""

    def make_reducers(self, *, chunk_nbytes: int) -> Sequence[Reducer]:
        """Return reducers for segments of floats, with all buffers; called by each worker.

        They are one for each chunk that a worker may have in flight; to be used by turns.
        """

    def finding(self) -> str | None:
        """Say why it cannot work here, or None if it can."""

    def running(self) -> AbstractContextManager[None]:
        """Surround a merge, to leave the library's settings as they were."""

    def peak_vram_nbytes(self) -> int:
        """Return the GPU memory reserved at most; 0 on the CPU."""


def load_backend(plan: MergePlan) -> Backend:
    """Import and ready a plan's backend, so that what it takes in memory can be measured."""
    summed = (segment for segment in plan.segments() if segment.method != keep_first.NAME)
    if plan.settings.backend == LLVM:
        from shardmix.compute.llvm_cpu import LlvmBackend

        return LlvmBackend(summed)
    from shardmix.compute.torch_cpu import TorchBackend

    return TorchBackend(plan.settings.device, summed)


class Reducers:
    """The reducer for each kind of segment, for one of the chunks that a worker has in flight."""

    def __init__(self, of_floats: Reducer, *, chunk_nbytes: int) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._of_floats = of_floats
        self._keep_first: Reducer | None = None

    def __getitem__(self, method: str) -> Reducer:
        """Return the reducer for segments of a method."""
        if method != keep_first.NAME:
            return self._of_floats
        if self._keep_first is None:
            # Most models hold no integers.
            from shardmix.compute.keep_first import KeepFirst

            chunk_nbytes = min(self._chunk_nbytes, KEEP_FIRST_CHUNK_NBYTES)
            self._keep_first = KeepFirst(chunk_nbytes=chunk_nbytes)
        return self._keep_first
