"""Methods as kernels compiled by LLVM: bfloat16, float16 and float32, on the CPU.

One pass over all sources at once, and no torch in the process. The bits are torch's. If sources are
read, not mapped, a kernel also reads them, with the C library's `pread`. A kernel is compiled when
a merge starts, in 10 to 30 ms: so there is no cache on disk that could be stale or somebody else's,
and no compiler is needed. (numba takes half a second to import and a second or more at its first
use.)
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from shardmix.anomalies import NonfiniteCounts
from shardmix.compute.llvm_assembly import FAILED
from shardmix.compute.llvm_compile import LEAST_INFINITE, Kernels
from shardmix.compute.llvm_kind import KernelKind
from shardmix.compute.staged_chunk import StagedChunk
from shardmix.dtypes import element_nbytes
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import address
from shardmix.system.llvm import finding

_FLOAT32_NBYTES = 4


class LlvmBackend:
    """Compiles the kernels that some segments need, and makes the workers' objects."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._kernels = Kernels()
        # Now: no worker compiles later, and the memory for it is measured.
        kinds = {KernelKind.of(segment) for segment in segments}
        for kind in kinds:
            self._kernels.kernel(kind)
        self._most_sources = max((len(kind.dtypes) for kind in kinds), default=0)

    def make_combiners(self, *, chunk_nbytes: int) -> "tuple[CompiledMethod]":
        """Return one worker's object, with all its buffers allocated."""
        staged = StagedChunk(chunk_nbytes=chunk_nbytes, most_sources=self._most_sources)
        return (CompiledMethod(self._kernels, staged),)

    def finding(self) -> str | None:
        """Return why kernels do not work on this processor, or None if they do."""
        return finding()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Change nothing."""
        yield

    def peak_vram_nbytes(self) -> int:
        """Return 0: there is no GPU in it."""
        return 0


class CompiledMethod:
    """A method for one worker: its sources' bytes wait until the last one is there."""

    disagreeing: frozenset[int] = frozenset()
    is_finite = True

    def __init__(self, kernels: Kernels, staged: StagedChunk) -> None:
        self._kernels = kernels
        self._staged = staged
        self._widths: dict[KernelKind, tuple[int, ...]] = {}

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment."""
        if not self._staged.is_divided(segment, start, num_elements):
            self._prepare(segment, start, num_elements)
        self._start = start

    def _prepare(self, segment: Segment, start: int, num_elements: int) -> None:
        """Look up the kernel for chunks of this kind, and set its addresses."""
        kind = KernelKind.of(segment)
        if kind not in self._widths:
            widths = map(element_nbytes, (*kind.dtypes, kind.out_dtype))
            self._widths[kind] = (*widths, _FLOAT32_NBYTES)
        widths_of_kind = self._widths[kind]
        self._staged.divide(segment, start, num_elements, widths_of_kind)
        num_sources = len(segment.sources)
        own = map(address, self._staged.sources)
        self._out_address, self._unrounded_address = (
            address(self._staged.out),
            address(self._staged.unrounded),
        )
        self._own_addresses = (ctypes.c_void_p * num_sources)(*own)
        self._given_addresses = (ctypes.c_void_p * num_sources)()
        # An array of length 0 has no address.
        self._factors = (ctypes.c_float * max(1, len(segment.factors)))(*segment.factors)
        self._descriptors = (ctypes.c_int32 * num_sources)()
        self._positions = (ctypes.c_int64 * num_sources)()
        self._kernel = self._kernels.kernel(kind)
        # The output's and the unrounded width are left over.
        self._steps = [*zip([s.offset for s in segment.sources], widths_of_kind, strict=False)]
        self._segment, self._num_elements = segment, num_elements

    def read(self, descriptors: Sequence[int]) -> tuple[memoryview, float] | None:
        """Read the sources from these files and merge them, all in one call.

        Returns the output bytes and the seconds that reading took, or None if a file could not be
        read.
        """
        self._addresses = self._own_addresses
        self._descriptors[:] = list(descriptors)
        self._positions[:] = [offset + self._start * width for offset, width in self._steps]
        nanoseconds = ctypes.c_int64()
        largest = self._kernel.read_and_merge(
            self._descriptors,
            self._positions,
            self._addresses,
            self._factors,
            self._out_address,
            self._num_elements,
            nanoseconds,
        )
        return None if largest == FAILED else (self._end(largest), nanoseconds.value / 1e9)

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""
        return self._staged.sources[source]

    def add(self, source: int, raw: memoryview) -> None:
        """Add a source's bytes, in source order; they must stay unchanged until `finish`."""
        self._given_addresses[source] = address(raw)

    def finish(self) -> memoryview:
        """Return the chunk's output bytes, valid until the next `begin`."""
        self._addresses = self._given_addresses
        return self._end(
            self._kernel.merge(
                self._addresses, self._factors, self._out_address, self._num_elements
            )
        )

    def _end(self, largest: int) -> memoryview:
        self.is_finite = largest < LEAST_INFINITE[self._segment.out_dtype]
        if not self.is_finite:
            # Also unrounded, and now, while the sources are there: to see the effect of
            # rounding.
            kernel = self._kernels.kernel(KernelKind.of(self._segment, out_dtype="F32"))
            kernel.merge(
                self._addresses, self._factors, self._unrounded_address, self._num_elements
            )
        return self._staged.out

    def wait(self) -> None:
        """Return at once: `finish` leaves nothing pending."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the last finished chunk."""
        # numpy is imported for the rare chunk that is not finite.
        from shardmix.compute.nonfinite import as_float32, count_nonfinite

        unrounded = as_float32(self._staged.unrounded)
        return count_nonfinite(
            self._staged.out, self._segment.out_dtype, unrounded.__getitem__, start, stop
        )
