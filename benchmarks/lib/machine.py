"""What machine this is, and its page cache and cores brought to a known state. Linux."""

import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from benchmarks.lib.processes import run
from benchmarks.lib.programs import PACKAGES

VERSIONS_PROGRAM = """
import importlib.metadata, json, platform
found = {package.name: package.version for package in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version()} | found))
"""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK_BYTES = 1024**2
FREE_SHARE = 0.02
"""Free memory, as a share of all, below which the cache counts as full."""


def facts(work_dir: Path, pythons: Iterable[str]) -> list[str]:
    """Return the machine's facts and the versions in each python, one line each."""
    told = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    cpu = told.strip(": \t") or platform.machine()
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    mount = max(filter(work_dir.resolve().is_relative_to, mounts), key=len)
    lines = [
        f"cpu      {cpu}",
        f"cores    {len(os.sched_getaffinity(0))}, load {os.getloadavg()[0]:.2f}",
        f"memory   {psutil.virtual_memory().total / 1024**3:.1f} GiB",
        f"kernel   {platform.system()} {platform.release()}",
        f"disk     {mounts[mount]}, {psutil.disk_usage(str(work_dir)).free / 1e9:.0f} GB free",
    ]
    for python in dict.fromkeys(pythons) or [sys.executable]:
        answer = run([python, "-c", VERSIONS_PROGRAM])
        found = {"python": "not found"} if answer.returncode else answer.report()
        told = [f"{name} {found[name]}" for name in ("python", *PACKAGES) if name in found]
        lines.append("versions " + ", ".join(told))
    return lines


def wait_until_idle(*, limit_s: float = 20.0, busy_share: float = 0.2) -> float:
    """Wait for other processes to calm down; return the share of cores busy at the end."""
    deadline = time.monotonic() + limit_s
    while True:
        # What waits for the disk counts as idle.
        busy = psutil.cpu_percent(interval=0.3) / 100
        if busy <= busy_share or time.monotonic() >= deadline:
            return round(busy, 3)


def can_drop_caches() -> bool:
    """Return whether this process may empty the page cache (root on Linux)."""
    return os.access(DROP_CACHES, os.W_OK)


def drop_caches() -> None:
    """Write dirty pages back, then empty the page cache."""
    os.sync()
    DROP_CACHES.write_text("3")


def read_into_cache(folders: Iterable[Path]) -> None:
    """Read every file of the folders once, so that it is in the page cache."""
    buffer = bytearray(BLOCK_BYTES)
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class Filler:
    """A sparse file, twice as large as memory, whose cached pages fill the page cache.

    It takes no disk. Each filling goes on where the last one ended, at pages long reclaimed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory_bytes = psutil.virtual_memory().total // BLOCK_BYTES * BLOCK_BYTES
        self._position = 0
        with path.open("wb") as file:
            file.truncate(2 * self._memory_bytes)

    def fill(self) -> None:
        """Read until next to nothing is free, or as much as the memory holds was read, twice."""
        buffer, read = bytearray(BLOCK_BYTES), 0
        least, size = FREE_SHARE * self._memory_bytes, 2 * self._memory_bytes
        with self._path.open("rb", buffering=0) as file:
            while psutil.virtual_memory().free > least and read < size:
                for _ in range(64):
                    read += os.preadv(file.fileno(), [buffer], self._position)
                    self._position = (self._position + BLOCK_BYTES) % size
