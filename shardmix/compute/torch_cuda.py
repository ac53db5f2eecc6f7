"""Merging on a GPU: two chunks in flight; copies in, kernels and copies out overlap.

A GPU saves the arithmetic and nothing else: sources are read, and the output is written and hashed,
by the same workers. So it matters that nobody waits. A worker queues one chunk, reads the next, and
only then waits for the first and writes it, in order. Copies in, kernels and copies out have a
stream each, and events between them keep their order. Tests run this without a GPU:
`tests/support/simulated_cuda.py` queues torch's operations and runs them as late and in as many
orders as CUDA allows, so that a missing event changes the bytes.

Pinned memory is four chunk-sized buffers a worker, as on the CPU: two that sources are read into in
turn, and an output for each chunk. GPU memory is seven: two input buffers, one scratch for widened
values (kernels run in order, so one suffices), two accumulators, two outputs; and 2 MiB for
operations. `--max-vram` covers what torch reserves on each GPU; the process's context, some
hundreds of MB, is the driver's and not in it. Knows one worker and one GPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardmix.anomalies import NonfiniteCounts
from shardmix.compute.nonfinite import count_nonfinite
from shardmix.compute.torch_ops import (
    TORCH_DTYPES,
    ChunkSum,
    PieceOps,
    accumulate,
    are_finite,
    canonicalise_nans,
    factors_in,
    round_into,
    sum_dtype,
    typed,
)
from shardmix.dtypes import WIDEST_NBYTES, element_nbytes
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER, VRAM_BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import Segment

NUM_IN_FLIGHT = 2
_NUM_ARRIVALS = 2
_ALIGNMENT = 512  # of every buffer on the GPU
_WIDEST_ALIGNMENT = 8  # of parts of one


def cuda_sums(
    device: torch.device, *, chunk_nbytes: int, cuda: Any = torch.cuda
) -> "tuple[CudaSum, ...]":
    """Return one worker's objects for sums, one for each chunk in flight, with all their buffers.

    `cuda` has Stream, Event and stream, as `torch.cuda`. The worker itself must call it.
    """
    lanes = _Lanes(device, chunk_nbytes=chunk_nbytes, cuda=cuda)
    *arrived, wide, sum_0, sum_1, out_0, out_1 = lanes.gpu_buffers
    arrivals = lanes.arrivals(arrived)
    return tuple(
        CudaSum(wide, sums, out, arrivals, departure)
        for sums, out, departure in zip(
            (sum_0, sum_1), (out_0, out_1), lanes.departures(), strict=True
        )
    )


class _Lanes:
    """The memory and the streams that the chunks of one worker share."""

    def __init__(self, device: torch.device, *, chunk_nbytes: int, cuda: Any) -> None:
        self._cuda = cuda
        nbytes = -(-max(chunk_nbytes, WIDEST_NBYTES) // _ALIGNMENT) * _ALIGNMENT
        is_pinned = device.type == "cuda"
        # Separately: the allocator rounds each up to a power of two, and chunks are powers of two.
        self._pinned = [
            torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=is_pinned)
            for _ in range(BUFFERS_PER_WORKER)
        ]
        self._kernels, self._inward, self._outward = (cuda.Stream(device=device) for _ in range(3))
        with cuda.stream(self._kernels):
            # One allocation, divided here: the allocator's rounding then costs only once.
            arena = torch.empty(VRAM_BUFFERS_PER_WORKER * nbytes, dtype=torch.uint8, device=device)
        if arena.is_cuda:
            # If a merge is stopped, copies may still use the buffer when it is given back.
            for stream in (self._inward, self._outward):
                arena.record_stream(stream)
        self.gpu_buffers = arena.view(VRAM_BUFFERS_PER_WORKER, -1)
        """Chunk-sized buffers on the GPU, neighbours in memory."""

    def arrivals(self, buffers: list[torch.Tensor]) -> "_Arrivals":
        """Return the way in, with these buffers on the GPU to arrive in."""
        pinned = self._pinned[:_NUM_ARRIVALS]
        return _Arrivals(pinned, buffers, self._kernels, self._inward, self._cuda)

    def departures(self) -> "list[_Departure]":
        """Return the way out of each chunk in flight."""
        return [
            _Departure(pinned, self.gpu_buffers.device, self._kernels, self._outward, self._cuda)
            for pinned in self._pinned[_NUM_ARRIVALS:]
        ]


class _Arrivals:
    """Sources on their way to a GPU: into pinned buffers in turn, and on into GPU buffers.

    All chunks in flight share them, since a worker reads one source at a time.
    """

    def __init__(
        self,
        pinned: list[torch.Tensor],
        arrived: list[torch.Tensor],
        kernels: Any,
        stream: Any,
        cuda: Any,
    ) -> None:
        self.stream = stream
        self._kernels = kernels
        self._cuda = cuda
        self._pinned = pinned
        self._pinned_bytes = [buffer.numpy() for buffer in pinned]
        self._arrived = arrived
        # The host waits for the former, asleep rather than spinning; the latter make copies wait
        # for kernels.
        self._has_left = [cuda.Event(blocking=True) for _ in pinned]
        self._is_used = [cuda.Event() for _ in pinned]
        self._turn = 0

    def staging(self, nbytes: int) -> memoryview:
        """Return the buffer to read the next source into, once its last content has left."""
        self._has_left[self._turn].synchronize()
        return self._pinned_bytes[self._turn][:nbytes].data

    def send(
        self,
        raw: memoryview,
        dtype: torch.dtype,
        num_elements: int,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queue the copy of the buffer from `staging`; return the values on the GPU.

        Kernels queued from here on find them there, until `used` if they are in a buffer of the
        arrivals. `into` is another, free buffer. `raw` may be reused at once.
        """
        turn = self._turn
        staged, given = self._pinned_bytes[turn][: len(raw)], np.frombuffer(raw, np.uint8)
        if given.ctypes.data != staged.ctypes.data:
            # Mapped: the page may be unmapped before the copy has run. Releases the GIL.
            np.copyto(staged, given)
        values = self._arrived_values(dtype, num_elements) if into is None else into
        with self._cuda.stream(self.stream):
            if into is None:
                self.stream.wait_event(self._is_used[turn])
            values.copy_(typed(self._pinned[turn], dtype, num_elements), non_blocking=True)
            self._has_left[turn].record(self.stream)
        self._kernels.wait_event(self._has_left[turn])
        return values

    def _arrived_values(self, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
        return typed(self._arrived[self._turn], dtype, num_elements)

    def used(self) -> None:
        """Mark the values last sent as used: all kernels that need them are queued."""
        self._is_used[self._turn].record(self._kernels)
        self._turn = (self._turn + 1) % _NUM_ARRIVALS


class _Departure:
    """A chunk's output on its way back: into pinned memory, and its extremes with it."""

    def __init__(
        self, pinned: torch.Tensor, device: torch.device, kernels: Any, stream: Any, cuda: Any
    ) -> None:
        self.kernels = kernels
        """The stream that computes the output."""
        self.cuda = cuda
        self._pinned, self._stream = pinned, stream
        self._is_computed = cuda.Event()
        self._is_back = cuda.Event(blocking=True)
        with cuda.stream(kernels):
            self._extremes = torch.empty(2 * WIDEST_NBYTES, dtype=torch.uint8, device=device)
        self._pinned_extremes = torch.empty(
            2 * WIDEST_NBYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
        )

    def send(self, out: torch.Tensor) -> memoryview:
        """Queue an output, behind the kernels that compute it; return its buffer on the host."""
        self._dtype = out.dtype
        extremes = typed(self._extremes, out.dtype, 2)
        with self.cuda.stream(self.kernels):
            canonicalise_nans(out)
            torch.aminmax(out, out=(extremes[0], extremes[1]))
            self._is_computed.record(self.kernels)
        with self.cuda.stream(self._stream):
            self._stream.wait_event(self._is_computed)
            typed(self._pinned, out.dtype, out.numel()).copy_(out, non_blocking=True)
            typed(self._pinned_extremes, out.dtype, 2).copy_(extremes, non_blocking=True)
            self._is_back.record(self._stream)
        return self._pinned.numpy().data[: out.nbytes]

    def wait(self) -> bool:
        """Wait until the output is back; return True if all of it is finite."""
        self._is_back.synchronize()
        return are_finite(typed(self._pinned_extremes, self._dtype, 2))


class CudaSum(ChunkSum):
    """One of a worker's chunks in flight.

    Kernels of all its chunks run in order on one stream and so can share `wide`. Before `begin` the
    worker has waited for this object's last chunk: its sum and its output are free.
    """

    def __init__(
        self,
        wide: torch.Tensor,
        sums: torch.Tensor,
        out: torch.Tensor,
        arrivals: _Arrivals,
        departure: _Departure,
    ) -> None:
        self._wide, self._sum, self._out = wide, sums, out
        self._arrivals, self._departure = arrivals, departure

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part into, once its last copy has left."""
        return self._arrivals.staging(
            self._num_elements * element_nbytes(self._segment.dtypes[source])
        )

    def add(self, source: int, raw: memoryview) -> None:
        """Queue a source's copy and its part of the sum; `raw` may be reused afterwards."""
        dtype = TORCH_DTYPES[self._segment.dtypes[source]]
        with self._departure.cuda.stream(self._departure.kernels):
            values = self._arrivals.send(raw, dtype, self._num_elements)
            accumulate(
                self._accumulator,
                self._values,
                values,
                self._segment.factors[source],
                first=source == 0,
            )
            self._arrivals.used()

    def finish(self) -> memoryview:
        """Queue the rest; return the buffer of the output bytes, valid once `wait` has returned."""
        out = typed(self._out, TORCH_DTYPES[self._segment.out_dtype], self._num_elements)
        with self._departure.cuda.stream(self._departure.kernels):
            round_into(out, self._accumulator, self._values)
        self._finished = self._departure.send(out)
        return self._finished

    def wait(self) -> None:
        """Wait until the chunk's output bytes are there."""
        self.is_finite = self._departure.wait()


def cuda_methods(
    device: torch.device, *, chunk_nbytes: int, cuda: Any = torch.cuda
) -> "tuple[CudaMethod, ...]":
    """Return one worker's objects for any method, one for each chunk in flight.

    They take as much memory as `cuda_sums`: three buffers hold a chunk's sources and its output,
    and one is scratch, in which kernels work in order.
    """
    lanes = _Lanes(device, chunk_nbytes=chunk_nbytes, cuda=cuda)
    buffers = lanes.gpu_buffers
    chunks, scratch = (buffers[:3].view(-1), buffers[3:6].view(-1)), buffers[6]
    arrivals = lanes.arrivals([])
    return tuple(
        CudaMethod(chunk, scratch, arrivals, departure)
        for chunk, departure in zip(chunks, lanes.departures(), strict=True)
    )


class CudaMethod:
    """One of a worker's chunks in flight, of any method: kernels start once all sources are there.

    Kernels of all its chunks run in order on one stream and so can share `scratch`.
    """

    disagreeing: frozenset[int] = frozenset()
    is_finite = True

    def __init__(
        self,
        chunk: torch.Tensor,
        scratch: torch.Tensor,
        arrivals: _Arrivals,
        departure: _Departure,
    ) -> None:
        self._chunk, self._scratch = chunk, scratch
        self._arrivals, self._departure = arrivals, departure
        self._kind: tuple[Segment | None, int] = None, 0

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment."""
        if self._kind[0] is segment and self._kind[1] == num_elements:
            return
        self._kind = segment, num_elements
        self._segment = segment
        self._factors = factors_in(sum_dtype(segment), segment.factors)
        self._ops = PieceOps(self._scratch, segment)
        self._values, end = [], 0
        for name in (*segment.dtypes, segment.out_dtype):
            part = TORCH_DTYPES[name]
            stop = end + num_elements * part.itemsize
            self._values.append(self._chunk[end:stop].view(part))
            end = stop + -stop % _WIDEST_ALIGNMENT
        self._out = self._values.pop()

    def read(self, descriptors: Sequence[int]) -> None:
        """Do nothing: others read."""

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part into, once its last copy has left."""
        return self._arrivals.staging(self._values[source].nbytes)

    def add(self, source: int, raw: memoryview) -> None:
        """Queue a source's copy; `raw` may be reused afterwards."""
        values = self._values[source]
        self._arrivals.send(raw, values.dtype, values.numel(), into=values)
        self._arrivals.used()

    def finish(self) -> memoryview:
        """Queue the rest; return the buffer of the output bytes, valid once `wait` has returned."""
        with self._departure.cuda.stream(self._departure.kernels):
            self._ops.combine(self._values, self._factors, self._out)
        self._finished = self._departure.send(self._out)
        return self._finished

    def wait(self) -> None:
        """Wait until the chunk's output bytes are there."""
        self.is_finite = self._departure.wait()

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the last finished chunk."""
        return count_nonfinite(
            self._finished, self._segment.out_dtype, self._unrounded, start, stop
        )

    def _unrounded(self, piece: slice) -> npt.NDArray[np.floating]:
        """Compute a piece again: its sources stay in place until the next `begin`."""
        parts = []
        with self._departure.cuda.stream(self._departure.kernels):
            for start in range(piece.start, piece.stop, self._ops.length):
                part = slice(start, min(start + self._ops.length, piece.stop))
                values = [value[part] for value in self._values]
                parts.append(self._ops.piece(values, self._factors).cpu())
        return torch.cat(parts).numpy()
