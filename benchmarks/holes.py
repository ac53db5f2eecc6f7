"""Sparse files: which ranges hold data, and ranges given back to the disk. Linux.

A hole reads as zeros and takes no room. Knows bytes, not models.
"""

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]
"""First byte, and one past the last."""

PAGE_BYTES = 4096

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

_libc = ctypes.CDLL(None, use_errno=True)


def data_ranges(descriptor: int) -> Iterator[Range]:
    """Yield the ranges of an open file that are no holes, in order."""
    position, size = 0, os.fstat(descriptor).st_size
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, position


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as disjoint ranges, in order."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        elif start < stop:
            joined.append((start, stop))
    return joined


def gaps(ranges: Sequence[Range], size: int, *, align: int = PAGE_BYTES) -> list[Range]:
    """What disjoint, ordered ranges leave of a file: whole pages alone."""
    found, position = [], 0
    for start, stop in (*ranges, (size, size)):
        first, last = -(-position // align) * align, min(start, size) // align * align
        if first < last:
            found.append((first, last))
        position = stop
    return found


def punch(descriptor: int, start: int, stop: int) -> None:
    """Make a range a hole; pages that wait to be written are dropped with it. Raises OSError."""
    result = _libc.fallocate(
        descriptor, _KEEP_SIZE_AND_PUNCH, ctypes.c_int64(start), ctypes.c_int64(stop - start)
    )
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
