"""Elements that lie apart, gathered in bounded memory. Knows ranges of bytes and strides.

A range of a tensor's elements is divided into boxes of whole rows; each is read in pieces of one
buffer.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from shardmix.system.buffers import buffer_for_reading

BUFFER_NBYTES = 1 << 20
"""Memory of a gatherer."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Width of an element → the dtype that moves it."""
# Up to here a range is read with all that lies between the wanted elements: it costs less than
# another call.
_CHEAP_NBYTES = 16 << 10


class Ranges(Protocol):
    """Files, or tensors, that are read by ranges of bytes."""

    def view(self, file: int, offset: int, into: memoryview) -> memoryview:
        """Return bytes of a file from `offset` on, as many as `into` has, perhaps in it."""

    def close(self) -> None:
        """Close all files."""


class Gatherer:
    """Reads elements that are some strides apart."""

    def __init__(self, files: Ranges) -> None:
        self._files = files
        self._buffer: memoryview | None = None

    def gather(self, file: int, offset: int, strides: Sequence[int], out: npt.NDArray[Any]) -> None:
        """Fill an array from elements that are `strides` apart, the first at byte `offset`.

        Strides count elements. Raises `SourceError`.
        """
        if out.size == 0:
            return
        width = out.itemsize
        spans = [(size - 1) * stride for size, stride in zip(out.shape, strides, strict=True)]
        nbytes = (sum(spans) + 1) * width
        steps = tuple(stride * width for stride in strides)
        if nbytes == out.nbytes and out.flags.c_contiguous and _is_in_order(out, steps):
            self._files.view(file, offset, memoryview(out.data).cast("B"))
            return
        gap = max(
            (step for size, step in zip(out.shape, steps, strict=True) if size > 1), default=0
        )
        # Halves of elements that lie close together would span as much as the whole.
        most = BUFFER_NBYTES if gap <= _CHEAP_NBYTES else min(2 * out.nbytes, BUFFER_NBYTES)
        if nbytes <= max(_CHEAP_NBYTES, most):
            if self._buffer is None:
                self._buffer = buffer_for_reading(BUFFER_NBYTES)
            raw = self._files.view(file, offset, self._buffer[:nbytes])
            out[...] = np.ndarray(out.shape, out.dtype, raw, strides=steps)
            return
        # Halves along the dimension whose elements are furthest apart.
        axis = int(np.argmax(spans))
        half = out.shape[axis] // 2
        first, second = np.split(out, [half], axis)
        self.gather(file, offset, strides, first)
        self.gather(file, offset + half * strides[axis] * width, strides, second)

    def close(self) -> None:
        """Close all files."""
        self._files.close()


def _is_in_order(out: npt.NDArray[Any], steps: Sequence[int]) -> bool:
    """Return True if elements follow one another in a file as in a contiguous array."""
    return all(
        size == 1 or step == own
        for size, step, own in zip(out.shape, steps, out.strides, strict=True)
    )


def boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """Divide a range of a tensor's elements, in the order of its shape, into boxes.

    Yields of each box its first element and the one past its last, the first one's indexes, and the
    box's shape.
    """
    while start < stop:
        # The largest box that begins here: whole rows of the last dimensions.
        inner, dimensions = 1, len(shape)
        while (
            dimensions
            and start % (inner * shape[dimensions - 1]) == 0
            and inner * shape[dimensions - 1] <= stop - start
        ):
            inner *= shape[dimensions - 1]
            dimensions -= 1
        count = 1
        if dimensions:
            at = start // inner % shape[dimensions - 1]
            count = min((stop - start) // inner, shape[dimensions - 1] - at)
        before = (1,) * (dimensions - 1)
        box = (*before, count, *shape[dimensions:]) if dimensions else shape
        origin, rest = [], start
        for size in reversed(shape):
            origin.append(rest % size)
            rest //= size
        yield start, start + count * inner, tuple(reversed(origin)), box
        start += count * inner
