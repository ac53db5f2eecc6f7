"""The arithmetic: a chunk of every source to a chunk of output. Knows buffers, and open files by
number.

    out = round_to_out_dtype(Σ float32(wᵢ) · float32(xᵢ))

in source order; every product and every sum is rounded separately, with one rounding to nearest
even at the end; float64 throughout if any source is float64. Other methods follow the same rules.
The result depends only on the values, not on their division into chunks, nor on the backend. The
plan chooses one of two: torch (every dtype, CPU and GPU) and, if llvmlite is installed, compiled
kernels (bfloat16, float16 and float32 on the CPU: faster, and no torch in the process). A backend's
libraries are imported when it is loaded, not before.

To know if a chunk is finite costs no pass of its own. NaN and Inf are counted afterwards
(`nonfinite`), only if there are some.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from shardmix.anomalies import NonfiniteCounts
from shardmix.methods import keep_first
from shardmix.options import LLVM
from shardmix.plan.chunk_size import KEEP_FIRST_CHUNK_NBYTES
from shardmix.plan.merge_plan import MergePlan, Segment


class Combiner(Protocol):
    """Merges a worker's chunks: `begin`, then `add` for each source, `finish`, and `wait`.

    Or `begin`, `read`, and `wait`.
    """

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment: `num_elements` elements from `start` on."""

    def read(self, descriptors: Sequence[int]) -> tuple[memoryview, float] | None:
        """Read the sources from these open files and merge the chunk at once, if possible.

        Returns the chunk's output bytes, valid until the next `begin`, and the seconds that reading
        took. Returns None if `add` and `finish` must do it.
        """

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""

    def add(self, source: int, raw: memoryview) -> None:
        """Add a source's bytes, in source order; they must stay unchanged until `finish`."""

    def finish(self) -> memoryview:
        """Finish a chunk, whose sources' bytes are no longer needed.

        Returns the buffer of its output bytes, valid once `wait` has returned, until the next
        `begin`. Only a GPU leaves something to wait for.
        """

    def wait(self) -> None:
        """Wait for the chunk's output; the properties below are known only then."""

    @property
    def disagreeing(self) -> frozenset[int]:
        """Sources whose values differ from the first one's, if they should be the same."""

    @property
    def is_finite(self) -> bool:
        """True if the last finished chunk has neither NaN nor infinity."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the last finished chunk, if it is not finite."""


class Backend(Protocol):
    """The library that merges chunks; made once for a merge."""

    def make_combiners(self, *, chunk_nbytes: int) -> Sequence[Combiner]:
        """Return objects for segments of floats, with all buffers; each worker calls it.

        There is one for each chunk that a worker may have in flight; they are used in turn.
        """

    def finding(self) -> str | None:
        """Return why it cannot work here, or None if it can."""

    def running(self) -> AbstractContextManager[None]:
        """Run a merge, and restore the library's settings afterwards."""

    def peak_vram_nbytes(self) -> int:
        """Return the most GPU memory reserved; 0 on the CPU."""


def load_backend(plan: MergePlan) -> Backend:
    """Import and prepare a plan's backend, so that its memory can be measured."""
    summed = (segment for segment in plan.segments() if segment.method != keep_first.NAME)
    if plan.settings.backend == LLVM:
        from shardmix.compute.llvm_cpu import LlvmBackend

        return LlvmBackend(summed)
    from shardmix.compute.torch_cpu import TorchBackend

    return TorchBackend(plan.settings.device, summed)


class Combiners:
    """The combiners of one chunk in flight, one for floats and one for integers."""

    def __init__(self, of_floats: Combiner, *, chunk_nbytes: int) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._of_floats = of_floats
        self._keep_first: Combiner | None = None

    def __getitem__(self, method: str) -> Combiner:
        """Return the object for segments of a method."""
        if method != keep_first.NAME:
            return self._of_floats
        if self._keep_first is None:
            # Most models have no integers.
            from shardmix.compute.keep_first import KeepFirst

            chunk_nbytes = min(self._chunk_nbytes, KEEP_FIRST_CHUNK_NBYTES)
            self._keep_first = KeepFirst(chunk_nbytes=chunk_nbytes)
        return self._keep_first
