"""The pages of a merge's files in the system's page cache.

Linux keeps pages that were read and written, and drops those of others. A merge larger than the
cache leaves nothing in it that could be used again, and nothing of the user's other files either.
So output, then sources, stay cached if they fit into half of the available memory (in a container,
of its limit). Otherwise their pages are dropped behind the merge (`POSIX_FADV_DONTNEED`). Ranges of
sources that all workers have read are joined, and dropped once they come to 32 MiB of whole huge
pages, since a page that lies only partly in a range stays; and everything once more at the end. Of
an output file, pages already on the disk are dropped whenever another 32 MiB is being written back,
and all of them after fsync. Without fsync output is dirty, and stays. Dropping costs no time: the
kernel need not look for pages to give up. Pages that were cached before the merge go, too, if they
are the merge's own.

`verify` does the same with its files; scoring does not. All calls are hints, on Linux only.
`O_DIRECT` and `RWF_DONTCACHE` are slower for a merge that fits: see docs/performance.md.
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
"""Bytes of a file dropped by one call; short ranges take time and leave pages behind."""
_MOST_RANGES = 8192  # some 3 MB; more only if files are read in no order


@dataclass(frozen=True, slots=True)
class CacheUse:
    """The files whose pages stay in the cache, as long as the system has room."""

    keeps_sources: bool
    """Pages of the files that are read stay."""
    keeps_output: bool
    """Pages of the files that are written stay."""


def plan_cache_use(*, read_nbytes: int, write_nbytes: int, fsync: bool) -> CacheUse:
    """Choose the files whose pages stay: all that fit into half of the available memory.

    The output goes before the sources. Without `fsync` it stays in any case, since pages that are
    not on the disk cannot be dropped.
    """
    room = available_nbytes() // 2
    return CacheUse(
        keeps_sources=read_nbytes + write_nbytes <= room,
        keeps_output=write_nbytes <= room or not fsync,
    )


def drop_pages(descriptor: int, start: int, stop: int) -> None:
    """Drop a file's pages from the cache, except those that are dirty or mapped.

    Large pages that lie only partly in the range stay. Dirty ones begin to be written back.
    """
    if hasattr(os, "posix_fadvise") and start < stop:
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


class PassedRanges:
    """Ranges of files that all workers have passed; many neighbours are dropped at a time."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        # (File, start or stop of a range) → its other end; no two ranges touch.
        self._stop_of: dict[tuple[int, int], int] = {}
        self._start_of: dict[tuple[int, int], int] = {}

    def add(self, file: int, start: int, stop: int) -> None:
        """Add a range of a file that was passed; its ends may still be mapped."""
        with self._lock:
            if len(self._stop_of) >= _MOST_RANGES:
                # Forgotten ranges are dropped at the end.
                self._stop_of.clear()
                self._start_of.clear()
            start, stop = self._joined(file, start, stop)
            # Only whole huge pages; the rest goes with the neighbouring ranges.
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
        """Remove the ranges that touch this one; return it joined with them."""
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
        """Drop the remaining pages of all files, once no worker uses them."""
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
