"""What a merge leaves of its files in the system's page cache.

What it reads and writes pushes other programs' files out, in a merge larger than the cache for
nothing: before the cache could be of use, its beginning is gone. Of such a merge pages are dropped
behind it. Only hints; on Linux.
"""

import os
from contextlib import suppress
from dataclasses import dataclass

from shardmix.memory import available_nbytes
from shardmix.units import MIB

DROPPED_AT_ONCE_NBYTES = 32 * MIB
"""How much is dropped by one call; what was written that long ago is mostly on the disk."""
_LARGEST_PAGE_NBYTES = 2 * MIB


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Whose pages stay in the cache, as long as the system has room."""

    keeps_sources: bool
    """Those of the files that are read."""
    keeps_output: bool
    """Those of the files that are written. Where they are not forced to disk they stay anyway."""


def plan_cache_use(*, read_nbytes: int, write_nbytes: int) -> CacheUse:
    """Keep what fits into half of the memory that is available, the output before the sources."""
    room = available_nbytes() // 2
    return CacheUse(
        keeps_sources=read_nbytes + write_nbytes <= room, keeps_output=write_nbytes <= room
    )


def drop_pages(descriptor: int, start: int, stop: int) -> None:
    """Drop a file's pages from the cache where they are neither dirty nor mapped."""
    if hasattr(os, "posix_fadvise") and start < stop:
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


class Trail:
    """The pages that a pass through a file leaves behind: dropped many at a time, or kept."""

    def __init__(self, descriptor: int, *, keep: bool) -> None:
        self._descriptor = descriptor
        self._keep = keep
        self._start = self._stop = 0

    def passed(self, start: int, stop: int) -> None:
        """Take a range for done with. It need not go on where the last one ended."""
        if self._keep:
            return
        if start != self._stop:
            self.end()
            self._start = start
        self._stop = stop
        # A large page is dropped as a whole or not at all.
        whole = stop - stop % _LARGEST_PAGE_NBYTES
        if whole - self._start >= DROPPED_AT_ONCE_NBYTES:
            drop_pages(self._descriptor, self._start, whole)
            self._start = whole

    def advance(self, nbytes: int) -> None:
        """Take what follows the last range for done with."""
        self.passed(self._stop, self._stop + nbytes)

    def end(self) -> None:
        """Drop what is left."""
        drop_pages(self._descriptor, self._start, self._stop)
        self._start = self._stop
