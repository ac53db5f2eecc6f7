"""Brings the page cache to the state that a measurement should start from. Linux.

A measurement starts from a full page cache, as any machine has that has been up for a day. Then
whatever a tool allocates comes from reclaimed cache pages, for every tool alike. With free memory
it would depend on when that was freed: the host of a virtual machine takes free memory back after
some milliseconds, and the first touch of what it took costs more than the copy itself. A program
that writes at once after the old output was deleted then looks up to four times faster than one
that imports its libraries first.
"""

import os
from collections.abc import Iterable
from pathlib import Path

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
MEMORY_FACTS = Path("/proc/meminfo")

FREE_SHARE = 0.02
"""Free memory, as a share of all, below which the cache counts as full."""
BLOCK_BYTES = 1024**2
BLOCKS_BETWEEN_LOOKS = 64


def can_drop_caches() -> bool:
    """Whether this process may empty the page cache (root on Linux)."""
    return os.access(DROP_CACHES, os.W_OK)


def drop_caches() -> None:
    """Write dirty pages back, then empty the page cache."""
    os.sync()
    DROP_CACHES.write_text("3")


def read_into_cache(folders: Iterable[Path]) -> None:
    """Read every file of the folders once, so that it is in the page cache."""
    buffer = bytearray(BLOCK_BYTES)
    for folder in folders:
        for path in sorted(folder.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


class Filler:
    """A sparse file, twice as large as memory, whose cached pages fill the page cache.

    It takes no disk. Each filling goes on where the last one ended, at pages long reclaimed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory_bytes = _memory("MemTotal")
        self._size = 2 * self._memory_bytes // BLOCK_BYTES * BLOCK_BYTES
        self._position = 0
        with path.open("wb") as file:
            file.truncate(self._size)

    def fill(self) -> None:
        """Read until next to nothing is free, or as much as the memory holds was read."""
        buffer = bytearray(BLOCK_BYTES)
        read = 0
        with self._path.open("rb", buffering=0) as file:
            while _memory("MemFree") > FREE_SHARE * self._memory_bytes and read < self._size:
                for _ in range(BLOCKS_BETWEEN_LOOKS):
                    read += os.preadv(file.fileno(), [buffer], self._position)
                    self._position = (self._position + BLOCK_BYTES) % self._size


def _memory(name: str) -> int:
    """A figure of the kernel's, in bytes."""
    for line in MEMORY_FACTS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{MEMORY_FACTS} does not tell {name}")
