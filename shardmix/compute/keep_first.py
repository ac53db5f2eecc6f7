"""Integers and booleans are not averaged: the output has the first source's, and compares
others."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shardmix.anomalies import NonfiniteCounts
from shardmix.dtypes import BY_NAME, WIDEST_NBYTES, element_nbytes
from shardmix.plan.merge_plan import Segment


class KeepFirst:
    """Integers and booleans: the first source's values; the others are compared with them."""

    is_finite = True

    def __init__(self, *, chunk_nbytes: int) -> None:
        self._staging = memoryview(bytearray(max(chunk_nbytes, WIDEST_NBYTES)))
        self._out = memoryview(bytearray(max(chunk_nbytes, WIDEST_NBYTES)))
        self._disagreeing: set[int] = set()

    def begin(self, segment: Segment, start: int, num_elements: int) -> None:
        """Start a chunk of a segment."""
        self._segment = segment
        self._num_elements = num_elements
        self._disagreeing.clear()

    def read(self, descriptors: Sequence[int]) -> None:
        """Do nothing: others read."""

    def staging(self, source: int) -> memoryview:
        """Return the buffer to read this source's part of the chunk into."""
        return self._staging[: self._num_elements * element_nbytes(self._segment.dtypes[source])]

    def add(self, source: int, raw: memoryview) -> None:
        """Copy the first source's bytes; compare another source's values with them."""
        if source == 0:
            self._kept = self._out[: len(raw)]
            self._kept[:] = raw
        elif not np.array_equal(self._integers(0, self._kept), self._integers(source, raw)):
            self._disagreeing.add(source)

    def finish(self) -> memoryview:
        """Return the chunk's output bytes, valid until the next `begin`."""
        return self._kept

    def wait(self) -> None:
        """Return at once: nothing is pending."""

    @property
    def disagreeing(self) -> frozenset[int]:
        """Sources whose values differ from the first one's in this chunk."""
        return frozenset(self._disagreeing)

    def count_nonfinite(self, start: int, stop: int) -> NonfiniteCounts:
        """Return zeros: integers are finite."""
        return NonfiniteCounts(num_nan=0, num_inf=0, num_overflowed=0)

    def _integers(self, source: int, raw: memoryview) -> npt.NDArray[np.generic]:
        return np.frombuffer(raw, dtype=BY_NAME[self._segment.dtypes[source]].numpy_name)
