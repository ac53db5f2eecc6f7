"""What a merge leaves of its files in the system's page cache.

What it reads and writes pushes other programs' files out, in a merge larger than the cache for
nothing: before the cache could be of use, its beginning is gone. Of such a merge pages are dropped
behind it. Only hints; on Linux.
"""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardmix.system.buffers import HUGE_PAGE_NBYTES
from shardmix.system.memory import available_nbytes
from shardmix.system.units import MIB

DROPPED_AT_ONCE_NBYTES = 32 * MIB
"""How much of a file is dropped by one call: short ranges would take time and leave pages."""
_MOST_RANGES = 8192  # known at a time, some 3 MB; more only where files are read in no order


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Whose pages stay in the cache, as long as the system has room."""

    keeps_sources: bool
    """Those of the files that are read."""
    keeps_output: bool
    """Those of the files that are written."""


def plan_cache_use(*, read_nbytes: int, write_nbytes: int, fsync: bool) -> CacheUse:
    """Keep what fits into half of the memory that is available, the output before the sources.

    Without `fsync` output is kept in any case: what is not on the disk cannot be dropped.
    """
    room = available_nbytes() // 2
    return CacheUse(
        keeps_sources=read_nbytes + write_nbytes <= room,
        keeps_output=write_nbytes <= room or not fsync,
    )


def drop_pages(descriptor: int, start: int, stop: int) -> None:
    """Drop a file's pages from the cache where they are neither dirty nor mapped.

    Large pages that lie only partly in the range stay. Dirty ones begin to be written back.
    """
    if hasattr(os, "posix_fadvise") and start < stop:
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


class PassedRanges:
    """Ranges of files that several threads are done with: dropped many neighbours at a time."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        # (File, where a range starts or stops) → its other end; no range touches another.
        self._stop_of: dict[tuple[int, int], int] = {}
        self._start_of: dict[tuple[int, int], int] = {}

    def add(self, file: int, start: int, stop: int) -> None:
        """Take a range of a file for done with; what was mapped there may still be, at its ends."""
        with self._lock:
            if len(self._stop_of) >= _MOST_RANGES:
                # What is forgotten is dropped at the end.
                self._stop_of.clear()
                self._start_of.clear()
            start, stop = self._joined(file, start, stop)
            # Whole huge pages: the neighbours' ranges will have the rest.
            first = start + -start % HUGE_PAGE_NBYTES
            last = stop - stop % HUGE_PAGE_NBYTES
            is_long = last - first >= DROPPED_AT_ONCE_NBYTES
            left = [(start, first), (last, stop)] if is_long else [(start, stop)]
            for left_start, left_stop in left:
                if left_start < left_stop:
                    self._stop_of[file, left_start] = left_stop
                    self._start_of[file, left_stop] = left_start
        if is_long:
            self._drop(file, first, last)

    def _joined(self, file: int, start: int, stop: int) -> tuple[int, int]:
        """Return a range with those that it touches, which are then no longer known."""
        if (file, start) in self._start_of:
            before = self._start_of.pop((file, start))
            del self._stop_of[file, before]
            start = before
        if (file, stop) in self._stop_of:
            after = self._stop_of.pop((file, stop))
            del self._start_of[file, after]
            stop = after
        return start, stop

    def end(self) -> None:
        """Drop what is left of the files, now that nobody is at them any more."""
        for file, path in enumerate(self._paths):
            with suppress(OSError):
                self._drop(file, 0, Path(path).stat().st_size)

    def _drop(self, file: int, start: int, stop: int) -> None:
        with suppress(OSError):
            descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                drop_pages(descriptor, start, stop)
            finally:
                os.close(descriptor)
