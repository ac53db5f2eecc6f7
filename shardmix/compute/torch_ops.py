"""The arithmetic on torch's tensors, on any device: weighted sums, methods, rounding.

Multiply, then add, as two operations: so CPU and GPU give the same bits. torch's `add(alpha=)`
fuses them on some machines. Allocates next to nothing.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from shardmix.anomalies import NonfiniteCounts
from shardmix.compute.nonfinite import count_nonfinite
from shardmix.dtypes import FLOAT_DTYPES, WIDE_DTYPES, torch_name
from shardmix.methods.base import combined
from shardmix.methods.ops import CountingOps
from shardmix.methods.registry import merge_method
from shardmix.plan.merge_plan import Segment

TORCH_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name(name)) for name in FLOAT_DTYPES
}


class ChunkSum:
    """A chunk's accumulator and a buffer for widened values, shared by all classes for sums."""

    disagreeing: frozenset[int] = frozenset()
    is_finite = True
    _sum: torch.Tensor
    _wide: torch.Tensor
    _finished: memoryview

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment."""
        self._start = start
        self._segment = segment
        self._num_elements = num_elements
        dtype = sum_dtype(segment)
        self._accumulator = typed(self._sum, dtype, num_elements)
        self._values = typed(self._wide, dtype, num_elements)

    def read(self, descriptors: Sequence[int]) -> None:
        """Do nothing: others read."""

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Count in a range of elements of the last finished chunk."""
        return count_nonfinite(self._finished, self._segment.out_dtype, self._sums, start, stop)

    def _sums(self, piece: slice) -> npt.NDArray[np.floating]:
        return self._accumulator[piece].cpu().numpy()  # no copy if it is on the CPU


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
    """Return float64 values in float32, towards zero, with the last bit set if inexact."""
    rounded = typed(scratch.view(torch.uint8), torch.float32, values.numel())
    rounded.copy_(values)
    bits = rounded.view(torch.int32)
    # In pieces, since this path is rare and its temporaries should stay small.
    step = _CUDA_PIECE if values.is_cuda else _PIECE
    for start in range(0, values.numel(), step):
        piece = slice(start, start + step)
        wide, back = values[piece], rounded[piece].double()
        inexact = back != wide  # also a NaN, which is still one with its last bit set
        too_large = back.abs() > wide.abs()
        bits[piece] -= (inexact & too_large).int()
        bits[piece] |= inexact.int()
    return rounded


_PIECE = 4096
_CUDA_PIECE = 1 << 15
"""A GPU's piece: its fifteen calls cost more than its elements. Temporaries below 1 MiB."""


def canonicalise_nans(out: torch.Tensor) -> None:
    """Give every NaN one bit pattern (quiet, positive), whatever operation made it.

    An operation's pattern depends on the processor, and on whether an element fell into a vector or
    into the rest of a chunk. torch's vector and scalar conversions to bfloat16 differ, for example
    (0xFFFF and 0x7FC0).
    """
    out.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=-math.inf)


def is_finite(out: torch.Tensor) -> bool:
    """Return True if values on the CPU are all finite.

    A sum is not finite if any value isn't: one cheap pass finds the rare case. The sum may also
    overflow by itself; the extremes cannot, but take twice as long.
    """
    return math.isfinite(out.sum().item()) or are_finite(torch.aminmax(out))


def are_finite(extremes: Iterable[torch.Tensor]) -> bool:
    """Return True if values with these extremes are all finite: both are NaN if any value is."""
    return all(math.isfinite(extreme.item()) for extreme in extremes)


def sum_dtype(segment: Segment) -> torch.dtype:
    """Return the dtype that a segment is summed in: float64 if a source has it."""
    return torch.float32 if WIDE_DTYPES.isdisjoint(segment.dtypes) else torch.float64


def typed(buffer: torch.Tensor, dtype: torch.dtype, num_elements: int) -> torch.Tensor:
    """Return the first elements of a buffer of bytes."""
    return buffer[: num_elements * dtype.itemsize].view(dtype)


class PieceOps:
    """A method's operations on pieces of a chunk, into existing buffers.

    Pieces are small, so that a method's intermediate results stay in the caches, take no memory
    that was not counted, and are the same for chunks of any length.
    """

    def __init__(
        self,
        scratch: torch.Tensor,
        segment: Segment,
    ) -> None:
        """Divide `scratch`, which holds bytes, for pieces of a segment."""
        self._method = merge_method(segment.method)
        self._are_changes = segment.are_changes
        dtype, num_values = sum_dtype(segment), len(segment.sources)
        num_results, num_masks = _counts(segment.method, segment.are_changes, len(segment.factors))
        # Besides results: each value widened, and room for rounding.
        num_buffers = num_results + num_values + 1
        element_nbytes = num_buffers * dtype.itemsize + num_masks
        self.length = max(1, scratch.numel() // element_nbytes)
        if self.length > _ALIGNED:
            self.length -= self.length % _ALIGNED
        if scratch.numel() < self.length * element_nbytes:  # of very many sources
            scratch = scratch.new_empty(self.length * element_nbytes)
        nbytes = num_buffers * dtype.itemsize * self.length
        self._buffers = scratch[:nbytes].view(dtype).view(num_buffers, self.length)
        masks = scratch[nbytes : nbytes + num_masks * self.length]
        self._masks = masks.view(torch.bool).view(num_masks, self.length)

    def combine(
        self, values: Sequence[torch.Tensor], factors: Sequence[float], out: torch.Tensor
    ) -> None:
        """Merge whole chunks, piece by piece; round to `out`'s dtype."""
        for start in range(0, out.numel(), self.length):
            piece = slice(start, start + self.length)
            result = self.piece([value[piece] for value in values], factors)
            round_into(out[piece], result, self._free())

    def piece(self, values: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
        """Return a piece's result, unrounded; valid until the next."""
        self._num_elements = len(values[0])
        self._num_used = self._num_masks_used = 0
        widened = []
        for value in values:
            widened.append(self._free())
            widened[-1].copy_(value)
        # As a second argument, torch accepts a number instead of a tensor.
        numbers = cast(Sequence[torch.Tensor], factors)
        return combined(self._method, self, widened, numbers, self._are_changes)

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a + b."""
        return torch.add(a, b, out=self._free())

    def sub(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a - b."""
        return torch.sub(a, b, out=self._free())

    def mul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a · b."""
        return torch.mul(a, b, out=self._free())

    def div(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a / b."""
        return torch.div(a, b, out=self._free())

    def abs(self, a: torch.Tensor) -> torch.Tensor:
        """Return |a|."""
        return torch.abs(a, out=self._free())

    def less(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the mask of a < b."""
        mask = self._masks[self._num_masks_used, : self._num_elements]
        self._num_masks_used += 1
        return torch.lt(a, b, out=mask)

    def select(self, mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a's element if the mask is true, else b's."""
        return torch.where(mask, a, b, out=self._free())

    def _free(self) -> torch.Tensor:
        buffer = self._buffers[self._num_used, : self._num_elements]
        self._num_used += 1
        return buffer


_ALIGNED = 64


@lru_cache(maxsize=1024)  # tensors are many, their kinds few
def _counts(method: str, are_changes: tuple[bool, ...], num_factors: int) -> tuple[int, int]:
    """Return how many arrays and how many masks a method makes of these values."""
    counted = CountingOps()
    values, factors = [counted] * len(are_changes), [counted] * num_factors
    combined(merge_method(method), counted, values, factors, are_changes)
    return counted.num_results, counted.num_masks


def factors_in(dtype: torch.dtype, factors: Sequence[float]) -> tuple[float, ...]:
    """Return factors rounded to the dtype that a method is computed in."""
    if dtype == torch.float32:
        return tuple(float(np.float32(factor)) for factor in factors)
    return tuple(factors)
