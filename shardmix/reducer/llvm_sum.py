"""The weighted sum as kernels compiled by LLVM: bfloat16, float16 and float32, on the CPU.

One pass over all sources at once, and no torch in the process. The bits are torch's.
"""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from shardmix.findings import NonfiniteCounts
from shardmix.memory import BUFFERS_PER_WORKER
from shardmix.plan import Run
from shardmix.reducer.kernels import LEAST_INFINITE, Kernels, finding
from shardmix.safetensors_layout import element_nbytes

_ALIGNMENT = 4  # of the widest element; strips are of such lengths that most parts have more


class LlvmBackend:
    """Compiles the kernels that some runs need, and makes reducers."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._kernels = Kernels()
        # Now: then no worker compiles, and what it takes is there when memory is measured.
        for dtypes, out_dtype in {(run.dtypes, run.out_dtype) for run in runs}:
            self._kernels.kernel(dtypes, out_dtype)

    def make_reducers(self, *, strip_nbytes: int) -> "tuple[CompiledSum]":
        """Return one worker's reducer, with all its buffers allocated."""
        return (CompiledSum(self._kernels, strip_nbytes=strip_nbytes),)

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

    def __init__(self, kernels: Kernels, *, strip_nbytes: int) -> None:
        self._kernels = kernels
        self._buffer = memoryview(bytearray(BUFFERS_PER_WORKER * strip_nbytes))
        self._num_elements = -1

    def begin(self, run: Run, num_elements: int) -> None:
        """Start a strip of a run."""
        if num_elements != self._num_elements or run is not self._run:
            self._lay_out(run, num_elements)

    def _lay_out(self, run: Run, num_elements: int) -> None:
        """Give each source, the output and the unrounded sum their part of the buffer."""
        parts = [
            (num_elements * nbytes, num_elements * nbytes + -num_elements * nbytes % _ALIGNMENT)
            for nbytes in map(element_nbytes, (*run.dtypes, run.out_dtype, "F32"))
        ]
        needed = sum(taken for _, taken in parts)
        if needed > len(self._buffer):  # a few elements of very many sources
            self._buffer = memoryview(bytearray(needed))
        views, start = [], 0
        for nbytes, taken in parts:
            views.append(self._buffer[start : start + nbytes])
            start += taken
        *self._staging, self._out, self._sums = views
        num_sources = len(run.dtypes)
        self._addresses = (ctypes.c_void_p * num_sources)(*map(_address, self._staging))
        self._weights = (ctypes.c_float * num_sources)(*run.weights)
        self._out_address = _address(self._out)
        self._kernel = self._kernels.kernel(run.dtypes, run.out_dtype)
        self._run, self._num_elements = run, num_elements

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the strip into."""
        return self._staging[source]

    def add(self, source: int, raw: memoryview) -> None:
        """Take a source's bytes, in source order; they must stay as they are until `finish`."""
        self._addresses[source] = _address(raw)

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""
        largest = self._kernel(
            self._addresses, self._weights, self._out_address, self._num_elements
        )
        self.is_finite = largest < LEAST_INFINITE[self._run.out_dtype]
        if not self.is_finite:
            # Also unrounded, and now, while the sources are there: to tell what rounding did.
            kernel = self._kernels.kernel(self._run.dtypes, "F32")
            kernel(self._addresses, self._weights, _address(self._sums), self._num_elements)
        return self._out

    def wait(self) -> None:
        """Return at once: `finish` has done it all."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the strip last finished."""
        # numpy is imported for the rare strip that is not finite.
        from shardmix.reducer.nonfinite import as_float32, count_nonfinite

        sums = as_float32(self._sums)
        return count_nonfinite(self._out, self._run.out_dtype, sums.__getitem__, start, stop)


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
