"""The arithmetic, and the only place that has any: a strip of every source to a strip of output.

    out = round_to_out_dtype(Σ float32(wᵢ) · float32(xᵢ))

in source order, every product and every sum rounded by itself (multiply, then add: a fused
multiply-add would give other bits on other machines), one rounding at the end; float64 throughout
where any source is float64. The result depends on the values alone, not on how they were cut into
strips, and is the same on CPU and GPU. Knows buffers, not files.
"""

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from shardmix.plan import AGREE, LINEAR, Run
from shardmix.safetensors_layout import element_nbytes

TORCH_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NUMPY_INTEGERS: dict[str, npt.DTypeLike] = {
    "BOOL": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
}
_WIDEST_NBYTES = 8


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


def make_reducers(device: str, *, strip_nbytes: int) -> dict[str, Reducer]:
    """Return a worker's reducer for each kind of run, sharing buffers allocated here, once.

    `device` is cpu, cuda or cuda:N.
    """
    on_cuda = device != "cpu"
    nbytes = max(strip_nbytes, _WIDEST_NBYTES)
    num_staging = 2 if on_cuda else 1
    staging = [
        torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(num_staging)
    ]
    out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda)
    linear: Reducer = (
        CudaLinearReducer(torch.device(device), staging, out)
        if on_cuda
        else CpuLinearReducer(staging[0], out)
    )
    return {LINEAR: linear, AGREE: AgreeReducer(staging[0], out)}


def strip_num_elements(run: Run, *, strip_nbytes: int) -> int:
    """Return how many elements of a run one strip holds, at least one."""
    if run.reduction == AGREE:
        widest = max(element_nbytes(dtype) for dtype in run.dtypes)
    else:
        widest = max(_sum_dtype(run).itemsize, element_nbytes(run.out_dtype))
    return max(1, strip_nbytes // widest)


class CpuLinearReducer:
    """The weighted sum on the CPU."""

    disagreeing: frozenset[int] = frozenset()

    def __init__(self, staging: torch.Tensor, out: torch.Tensor) -> None:
        self._staging = staging.numpy().data
        self._out = out
        self._wide = torch.empty_like(out)
        self._sum = torch.empty_like(out)

    def begin(self, run: Run, num_elements: int) -> None:
        """Start a strip of a run."""
        self._run = run
        self._num_elements = num_elements
        dtype = _sum_dtype(run)
        self._accumulator = _typed(self._sum, dtype, num_elements)
        self._values = _typed(self._wide, dtype, num_elements)

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the strip into."""
        return self._staging[: self._num_elements * element_nbytes(self._run.dtypes[source])]

    def add(self, source: int, raw: memoryview) -> None:
        """Take in a source's bytes, in source order; `raw` may be reused afterwards."""
        values = torch.frombuffer(raw, dtype=TORCH_DTYPES[self._run.dtypes[source]])
        accumulate(
            self._accumulator, self._values, values, self._run.weights[source], first=source == 0
        )

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""
        out = _typed(self._out, TORCH_DTYPES[self._run.out_dtype], self._num_elements)
        round_into(out, self._accumulator, self._values)
        # A sum is not a number if any value isn't: one cheap pass finds the rare case.
        if math.isnan(self._accumulator.sum().item()):
            canonicalise_nans(out)
        return self._out.numpy().data[: out.nbytes]


class CudaLinearReducer:
    """The weighted sum on a GPU: pinned double buffers in, copies and kernels on its own stream.

    The next source is read into one buffer while the other one travels.
    """

    disagreeing: frozenset[int] = frozenset()

    def __init__(
        self, device: torch.device, staging: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        self._stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
        self._staging = staging
        self._staging_bytes = [buffer.numpy().data for buffer in staging]
        self._copied = [torch.cuda.Event() for _ in staging]  # type: ignore[no-untyped-call]
        self._pinned_out = out
        with torch.cuda.device(device), torch.cuda.stream(self._stream):
            # One allocation, cut by hand: the allocator's rounding then costs once.
            arena = torch.empty(4 * out.numel(), dtype=torch.uint8, device=device)
        self._raw, self._wide, self._sum, self._out = arena.view(4, -1)

    def begin(self, run: Run, num_elements: int) -> None:
        """Start a strip of a run."""
        self._run = run
        self._num_elements = num_elements
        dtype = _sum_dtype(run)
        self._accumulator = _typed(self._sum, dtype, num_elements)
        self._values = _typed(self._wide, dtype, num_elements)

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
        self._stream.synchronize()
        return self._pinned_out.numpy().data[: out.nbytes]


class AgreeReducer:
    """Integers and booleans: the first source's values; the others are compared with them."""

    def __init__(self, staging: torch.Tensor, out: torch.Tensor) -> None:
        self._staging = staging.numpy().data
        self._out = out.numpy().data
        self._disagreeing: set[int] = set()

    def begin(self, run: Run, num_elements: int) -> None:
        """Start a strip of a run."""
        self._run = run
        self._num_elements = num_elements
        self._disagreeing.clear()

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the strip into."""
        return self._staging[: self._num_elements * element_nbytes(self._run.dtypes[source])]

    def add(self, source: int, raw: memoryview) -> None:
        """Keep the first source's bytes; compare another source's values with them."""
        if source == 0:
            self._kept = self._out[: len(raw)]
            self._kept[:] = raw
        elif not np.array_equal(self._integers(0, self._kept), self._integers(source, raw)):
            self._disagreeing.add(source)

    def finish(self) -> memoryview:
        """Return the strip's output bytes, valid until the next `begin`."""
        return self._kept

    @property
    def disagreeing(self) -> frozenset[int]:
        """Sources whose values differ from the first one's in this strip."""
        return frozenset(self._disagreeing)

    def _integers(self, source: int, raw: memoryview) -> npt.NDArray[np.generic]:
        return np.frombuffer(raw, dtype=_NUMPY_INTEGERS[self._run.dtypes[source]])


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
    """Round a finished sum to the output's dtype, once, to nearest even; may change the inputs.

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


def _sum_dtype(run: Run) -> torch.dtype:
    return torch.float64 if "F64" in run.dtypes else torch.float32


def _typed(buffer: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
    return buffer[: num_elements * dtype.itemsize].view(dtype)
