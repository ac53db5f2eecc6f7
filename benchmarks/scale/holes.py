"""Sparse files: which ranges hold data, and ranges given back to the disk. Linux.

What is a hole in every source is zero in the output, wherever the writer is: a hole made there
before, while or after it writes leaves the same bytes. Nothing else is touched, and never a file's
first bytes, where the header comes last.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

Range = tuple[int, int]
"""First byte, and one past the last."""
PAGE_BYTES = 4096
SPARED_BYTES = 4 * 1024**2
"""Of each file's start."""
WORTHWHILE_BYTES = 32 * 1024**2
"""A file that takes so much more than its data is swept."""

_KEEP_SIZE_AND_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
_libc = ctypes.CDLL(None, use_errno=True)


def data_ranges(descriptor: int) -> Iterator[Range]:
    """Yield the ranges of an open file that are no holes, in order."""
    position, size = 0, os.fstat(descriptor).st_size
    with contextlib.suppress(OSError):  # ENXIO: nothing but a hole from here on
        while position < size:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            yield start, position


def union(ranges: Iterable[Range]) -> list[Range]:
    """Return the same bytes as disjoint ranges, in order."""
    joined: list[Range] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        elif start < stop:
            joined.append((start, stop))
    return joined


def gaps(ranges: Sequence[Range], size: int, *, align: int = PAGE_BYTES) -> list[Range]:
    """Return what disjoint, ordered ranges leave of a file: whole pages only."""
    found, position = [], 0
    for start, stop in (*ranges, (size, size)):
        first, last = -(-position // align) * align, min(start, size) // align * align
        if first < last:
            found.append((first, last))
        position = stop
    return found


def punch(descriptor: int, start: int, stop: int) -> None:
    """Make a range a hole; pages that wait to be written are dropped with it. Raises OSError."""
    place = ctypes.c_int64(start), ctypes.c_int64(stop - start)
    if _libc.fallocate(descriptor, _KEEP_SIZE_AND_PUNCH, *place):
        raise OSError(number := ctypes.get_errno(), os.strerror(number))


def zero_ranges(sources: Sequence[Path]) -> list[Range]:
    """Return where files of one size and layout all have holes, behind what is spared."""
    known: list[Range] = [(0, SPARED_BYTES)]
    for path in sources:
        with path.open("rb") as file:
            known += data_ranges(file.fileno())
    return gaps(union(known), min(path.stat().st_size for path in sources))


def sweep(
    folder: Path, zeros: Mapping[str, Sequence[Range]], *, slack_bytes: int = WORTHWHILE_BYTES
) -> None:
    """Make holes in those files of a folder that take more than what can't be zero, and a slack.

    `zeros`: by the name of a file in the folder; both may come later.
    """
    for name, ranges in zeros.items():
        # There is none if it is not begun, or if the folder has just become the output.
        with contextlib.suppress(FileNotFoundError), (folder / name).open("r+b") as file:
            status = os.fstat(file.fileno())
            data_bytes = status.st_size - sum(stop - start for start, stop in ranges)
            if status.st_blocks * 512 > data_bytes + slack_bytes:
                for start, stop in ranges:
                    punch(file.fileno(), start, stop)
