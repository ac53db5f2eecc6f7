"""The weighted sum as kernels compiled by LLVM: bfloat16, float16 and float32, on the CPU.

One pass over all sources at once, and no torch in the process. The bits are torch's. Where sources
are read, not mapped, a kernel does it.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from shardmix.anomalies import NonfiniteCounts
from shardmix.compute.llvm_assembly import FAILED
from shardmix.compute.llvm_compile import LEAST_INFINITE, Kernels, finding
from shardmix.dtypes import element_nbytes
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import PAGE_NBYTES, address, buffer_of_pages, offset_in_page

# For its place within a page, each part of a buffer takes up to so many bytes more.
_PLACING_NBYTES = 2 * PAGE_NBYTES
_SUM_NBYTES = 4


class LlvmBackend:
    """Compiles the kernels that some segments need, and makes reducers."""

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._kernels = Kernels()
        # Now: then no worker compiles, and what it takes is there when memory is measured.
        combinations = {(segment.dtypes, segment.out_dtype) for segment in segments}
        for dtypes, out_dtype in combinations:
            self._kernels.kernel(dtypes, out_dtype)
        self._most_sources = max((len(dtypes) for dtypes, _ in combinations), default=0)

    def make_reducers(self, *, chunk_nbytes: int) -> "tuple[CompiledSum]":
        """Return one worker's reducer, with all its buffers allocated."""
        num_parts = self._most_sources + 2
        nbytes = BUFFERS_PER_WORKER * chunk_nbytes + num_parts * _PLACING_NBYTES
        return (CompiledSum(self._kernels, buffer_nbytes=nbytes),)

    def finding(self) -> str | None:
        """Say why kernels cannot be had on this processor, or None if they can."""
        return finding()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave everything as it is."""
        yield

    def peak_vram_nbytes(self) -> int:
        """Return 0: there is no GPU in it."""
        return 0


class CompiledSum:
    """The weighted sum of one worker: its sources' bytes wait until the last one is there."""

    disagreeing: frozenset[int] = frozenset()
    is_finite = True

    def __init__(self, kernels: Kernels, *, buffer_nbytes: int) -> None:
        self._kernels = kernels
        self._buffer = buffer_of_pages(buffer_nbytes)
        self._laid_out: tuple[Segment | None, int, int] = None, 0, 0

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment."""
        same_segment, same_place, same_number = self._laid_out
        place = start % PAGE_NBYTES  # elements of any size: all positions are then alike, too
        if segment is not same_segment or num_elements != same_number or place != same_place:
            self._lay_out(segment, start, num_elements)
            self._laid_out = segment, place, num_elements
        self._start = start

    def _lay_out(self, segment: Segment, start: int, num_elements: int) -> None:
        """Give each source, the output and the unrounded sum their part of the buffer."""
        widths = [
            *map(element_nbytes, segment.dtypes),
            element_nbytes(segment.out_dtype),
            _SUM_NBYTES,
        ]
        files_parts = [*segment.offsets, segment.out_offset, 0]
        begins, end = [], 0
        for width, offset in zip(widths, files_parts, strict=True):
            page = end + -end % PAGE_NBYTES
            begins.append(page + offset_in_page(offset + start * width))
            end = begins[-1] + num_elements * width
        if end > len(self._buffer):  # a few elements of very many sources
            self._buffer = buffer_of_pages(end)
        views = [
            self._buffer[begin : begin + num_elements * width]
            for begin, width in zip(begins, widths, strict=True)
        ]
        *self._staging, self._out, self._sums = views
        *staging, self._out_address, self._sums_address = map(address, views)
        num_sources = len(segment.dtypes)
        self._own_addresses = (ctypes.c_void_p * num_sources)(*staging)
        self._given_addresses = (ctypes.c_void_p * num_sources)()
        self._weights = (ctypes.c_float * num_sources)(*segment.weights)
        self._descriptors = (ctypes.c_int32 * num_sources)()
        self._positions = (ctypes.c_int64 * num_sources)()
        self._kernel = self._kernels.kernel(segment.dtypes, segment.out_dtype)
        self._widths = tuple(widths[:num_sources])
        self._segment, self._num_elements = segment, num_elements

    def read(self, descriptors: Sequence[int]) -> tuple[memoryview, float] | None:
        """Do all of the chunk at once: read the sources from these files, and sum them.

        Returns the output bytes and the seconds that reading took; or None where a file could not
        be read.
        """
        self._addresses = self._own_addresses
        self._descriptors[:] = list(descriptors)
        self._positions[:] = [
            offset + self._start * width
            for offset, width in zip(self._segment.offsets, self._widths, strict=True)
        ]
        nanoseconds = ctypes.c_int64()
        largest = self._kernel.read_and_sum(
            self._descriptors,
            self._positions,
            self._addresses,
            self._weights,
            self._out_address,
            self._num_elements,
            nanoseconds,
        )
        return None if largest == FAILED else (self._end(largest), nanoseconds.value / 1e9)

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""
        return self._staging[source]

    def add(self, source: int, raw: memoryview) -> None:
        """Take a source's bytes, in source order; they must stay as they are until `finish`."""
        self._given_addresses[source] = address(raw)

    def finish(self) -> memoryview:
        """Return the chunk's output bytes, valid until the next `begin`."""
        self._addresses = self._given_addresses
        return self._end(
            self._kernel.weighted_sum(
                self._addresses, self._weights, self._out_address, self._num_elements
            )
        )

    def _end(self, largest: int) -> memoryview:
        self.is_finite = largest < LEAST_INFINITE[self._segment.out_dtype]
        if not self.is_finite:
            # Also unrounded, and now, while the sources are there: to tell what rounding did.
            kernel = self._kernels.kernel(self._segment.dtypes, "F32")
            kernel.weighted_sum(
                self._addresses, self._weights, self._sums_address, self._num_elements
            )
        return self._out

    def wait(self) -> None:
        """Return at once: `finish` has done it all."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the chunk last finished."""
        # numpy is imported for the rare chunk that is not finite.
        from shardmix.compute.nonfinite import as_float32, count_nonfinite

        sums = as_float32(self._sums)
        return count_nonfinite(self._out, self._segment.out_dtype, sums.__getitem__, start, stop)
