"""The weighted sum in torch, on the CPU or a GPU: for every float dtype.

Multiply, then add, as two operations: then CPU and GPU give the same bits. torch's `add(alpha=)`
fuses them on some machines.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from shardmix.findings import NonfiniteCounts
from shardmix.placement import PAGE_NBYTES, buffer_of_pages, place_in_page
from shardmix.plan import Run
from shardmix.reducer.nonfinite import count_nonfinite
from shardmix.safetensors_layout import element_nbytes

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_WIDEST_NBYTES = 8


class TorchBackend:
    """Makes reducers for cpu, cuda or cuda:N; with torch, since this module imports it."""

    def __init__(self, device: str) -> None:
        self._device = device

    def make_reducer(self, *, strip_nbytes: int) -> "CpuSum | CudaSum":
        """Return one worker's reducer, with all its buffers allocated."""
        # Workers are the parallelism; torch's own threads would only get in their way.
        torch.set_num_threads(1)
        if self._device == "cpu":
            return CpuSum(strip_nbytes=strip_nbytes)
        device = self._cuda_device()
        torch.cuda.set_device(device)  # of this thread, also for pinned memory
        return CudaSum(device, strip_nbytes=strip_nbytes)

    def finding(self) -> str | None:
        """Say why the device cannot be used here, or None if it can."""
        if self._device == "cpu":
            return None
        if not torch.cuda.is_available():
            return f"device {self._device}: torch {torch.__version__} finds no usable CUDA device"
        if self._cuda_device().index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            return f"device {self._device}: there are only {count} CUDA devices"
        # Make the context now, so that what it takes of the host's memory is measured.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.empty(1, device=self._cuda_device())
        torch.cuda.empty_cache()
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Leave torch's settings as they were once the merge has ended."""
        num_threads = torch.get_num_threads()
        if self._device != "cpu":
            torch.cuda.reset_peak_memory_stats(self._cuda_device())
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
            if self._device != "cpu":
                torch.cuda.empty_cache()

    def peak_vram_nbytes(self) -> int:
        """Return what torch has reserved of the GPU's memory at most; 0 on the CPU."""
        if self._device == "cpu":
            return 0
        return int(torch.cuda.max_memory_reserved(self._cuda_device()))

    def _cuda_device(self) -> torch.device:
        return torch.device("cuda", torch.device(self._device).index or 0)


class _Sum:
    """What both share: an accumulator and a buffer for widened values, wherever they lie."""

    disagreeing: frozenset[int] = frozenset()
    is_finite = True
    _sum: torch.Tensor
    _wide: torch.Tensor
    _finished: memoryview

    def begin(self, run: Run, start: int, num_elements: int) -> None:
        """Start a strip of a run."""
        self._start = start
        self._run = run
        self._num_elements = num_elements
        dtype = sum_dtype(run)
        self._accumulator = _typed(self._sum, dtype, num_elements)
        self._values = _typed(self._wide, dtype, num_elements)

    def read(self, descriptors: Sequence[int]) -> None:
        """Do nothing: reading is for others."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the strip last finished."""
        return count_nonfinite(self._finished, self._run.out_dtype, self._sums, start, stop)

    def _sums(self, piece: slice) -> npt.NDArray[np.floating]:
        return self._accumulator[piece].cpu().numpy()  # no copy where it lies on the CPU


class CpuSum(_Sum):
    """The weighted sum on the CPU."""

    def __init__(self, *, strip_nbytes: int) -> None:
        nbytes = max(strip_nbytes, _WIDEST_NBYTES)
        self._wide, self._sum = (torch.empty(nbytes, dtype=torch.uint8) for _ in range(2))
        self._staging, self._out_pages = (buffer_of_pages(nbytes + PAGE_NBYTES) for _ in range(2))

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the strip into."""
        width = element_nbytes(self._run.dtypes[source])
        begin = place_in_page(self._run.offsets[source] + self._start * width)
        return self._staging[begin : begin + self._num_elements * width]

    def add(self, source: int, raw: memoryview) -> None:
        """Take in a source's bytes, in source order; `raw` may be reused afterwards."""
        values = torch.frombuffer(raw, dtype=TORCH_DTYPES[self._run.dtypes[source]])
        accumulate(
            self._accumulator, self._values, values, self._run.weights[source], first=source == 0
        )

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""
        width = element_nbytes(self._run.out_dtype)
        begin = place_in_page(self._run.out_offset + self._start * width)
        self._finished = self._out_pages[begin : begin + self._num_elements * width]
        out = torch.frombuffer(self._finished, dtype=TORCH_DTYPES[self._run.out_dtype])
        round_into(out, self._accumulator, self._values)
        # A sum is not finite if any value isn't: one cheap pass finds the rare case. It may have
        # overflowed by itself; the extremes can't, but take twice as long.
        self.is_finite = math.isfinite(out.sum().item()) or _are_finite(torch.aminmax(out))
        if not self.is_finite:
            canonicalise_nans(out)
        return self._finished


class CudaSum(_Sum):
    """The weighted sum on a GPU: pinned double buffers in, copies and kernels on its own stream.

    The next source is read into one buffer while the other one travels.
    """

    def __init__(self, device: torch.device, *, strip_nbytes: int) -> None:
        nbytes = max(strip_nbytes, 2 * _WIDEST_NBYTES)  # there is room for the extremes, too
        staging = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
        self._staging = staging
        self._staging_bytes = [buffer.numpy().data for buffer in staging]
        self._copied = [torch.cuda.Event() for _ in staging]  # type: ignore[no-untyped-call]
        self._pinned_out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._pinned_extremes = torch.empty(2 * _WIDEST_NBYTES, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            # One allocation, cut by hand: the allocator's rounding then costs once.
            arena = torch.empty(4 * nbytes, dtype=torch.uint8, device=device)
        self._raw, self._wide, self._sum, self._out = arena.view(4, -1)

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part into, once its last copy has left."""
        slot = source % len(self._staging)
        self._copied[slot].synchronize()
        nbytes = self._num_elements * element_nbytes(self._run.dtypes[source])
        return self._staging_bytes[slot][:nbytes]

    def add(self, source: int, raw: memoryview) -> None:
        """Queue a source's copy and its part of the sum; `raw` may be reused afterwards."""
        slot = source % len(self._staging)
        staged = self._staging_bytes[slot][: len(raw)]
        if np.frombuffer(raw, np.uint8).ctypes.data != np.frombuffer(staged, np.uint8).ctypes.data:
            staged[:] = raw  # mapped: the page may be given back before the copy has run
        dtype = TORCH_DTYPES[self._run.dtypes[source]]
        with torch.cuda.stream(self._stream):
            values = _typed(self._raw, dtype, self._num_elements)
            values.copy_(_typed(self._staging[slot], dtype, self._num_elements), non_blocking=True)
            self._copied[slot].record(self._stream)
            accumulate(
                self._accumulator,
                self._values,
                values,
                self._run.weights[source],
                first=source == 0,
            )

    def finish(self) -> memoryview:
        """Wait for the strip and return its output bytes, valid until the next `begin`."""
        dtype = TORCH_DTYPES[self._run.out_dtype]
        with torch.cuda.stream(self._stream):
            out = _typed(self._out, dtype, self._num_elements)
            round_into(out, self._accumulator, self._values)
            canonicalise_nans(out)
            _typed(self._pinned_out, dtype, self._num_elements).copy_(out, non_blocking=True)
            # The widened values have been used: their buffer takes the extremes, so that the
            # allocator gives no more than the reduction's few KiB.
            on_gpu = _typed(self._wide, dtype, 2)
            torch.aminmax(out, out=(on_gpu[0], on_gpu[1]))
            extremes = _typed(self._pinned_extremes, dtype, 2)
            extremes.copy_(on_gpu, non_blocking=True)
        self._stream.synchronize()
        self.is_finite = _are_finite(extremes)
        self._finished = self._pinned_out.numpy().data[: out.nbytes]
        return self._finished


def accumulate(
    accumulator: torch.Tensor,
    scratch: torch.Tensor,
    values: torch.Tensor,
    weight: float,
    *,
    first: bool,
) -> None:
    """Add weight · values to the accumulator, or start it with them.

    `accumulator` and `scratch` have the dtype of the sum, `values` any float dtype, all one length.
    """
    if accumulator.dtype == torch.float32:
        weight = float(np.float32(weight))
    product = accumulator if first else scratch
    product.copy_(values)
    product.mul_(weight)
    if not first:
        accumulator.add_(scratch)


def round_into(out: torch.Tensor, accumulator: torch.Tensor, scratch: torch.Tensor) -> None:
    """Round a finished sum to the output's dtype, once, to nearest even; may change `scratch`.

    torch converts float64 to 16 bits by way of float32, which rounds twice. Rounding that first
    step to odd makes the second one right (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd", 2008).
    """
    if accumulator.dtype == torch.float64 and out.dtype.itemsize == 2:
        accumulator = _round_to_odd(accumulator, scratch)
    out.copy_(accumulator)


def _round_to_odd(values: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return float64 values in float32, towards zero, the last bit set where that was inexact."""
    rounded = _typed(scratch.view(torch.uint8), torch.float32, values.numel())
    rounded.copy_(values)
    bits = rounded.view(torch.int32)
    # In pieces, since this path is rare and its temporaries should stay small.
    for start in range(0, values.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        wide, back = values[piece], rounded[piece].double()
        inexact = (back != wide) & ~wide.isnan()
        too_large = back.abs() > wide.abs()
        bits[piece] -= (inexact & too_large).int()
        bits[piece] |= inexact.int()
    return rounded


_PIECE = 4096


def canonicalise_nans(out: torch.Tensor) -> None:
    """Give every NaN one bit pattern (quiet, positive), whatever operation made it.

    Which pattern an operation gives depends on the processor, and on whether an element fell into
    a vector or into the rest of a strip.
    """
    out.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)


def _are_finite(extremes: Iterable[torch.Tensor]) -> bool:
    """Say whether values with these extremes are all finite: both are NaN if any value is."""
    return all(math.isfinite(extreme.item()) for extreme in extremes)


def sum_dtype(run: Run) -> torch.dtype:
    """Return the dtype that a run is summed in: float64 where a source has it."""
    return torch.float64 if "F64" in run.dtypes else torch.float32


def _typed(buffer: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
    return buffer[: num_elements * dtype.itemsize].view(dtype)
