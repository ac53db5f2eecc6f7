"""What machine this is, and its page cache and cores brought to a known state. Linux.

A measurement starts from a full page cache, as any machine has that has been up for a day. Then
whatever a tool allocates comes from reclaimed cache pages, for every tool alike. With free memory
it would depend on when that was freed: the host of a virtual machine takes free memory back after
some milliseconds, and the first touch of what it took costs more than the copy itself. A program
that writes at once after the old output was deleted then looks up to four times faster than one
that imports its libraries first.
"""

import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.lib.processes import run

PACKAGES = (
    *("shardmix", "mergekit", "LM_Cocktail", "sd-mecha", "torch", "safetensors", "transformers"),
    *("accelerate", "numpy", "llvmlite"),
)
VERSIONS_PROGRAM = """
import importlib.metadata, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK_BYTES = 1024**2
FREE_SHARE = 0.02
"""Free memory, as a share of all, below which the cache counts as full."""


def facts(work_dir: Path, pythons: Sequence[str]) -> list[str]:
    """Return the machine's facts and the versions in each python, one line each."""
    free = os.statvfs(work_dir)
    lines = [
        f"cpu      {field('/proc/cpuinfo', 'model name') or platform.machine()}",
        f"cores    {len(os.sched_getaffinity(0))}, load {os.getloadavg()[0]:.2f}",
        f"memory   {memory_bytes('MemTotal') / 1024**3:.1f} GiB",
        f"kernel   {platform.system()} {platform.release()}",
        f"disk     {_file_system(work_dir)}, {free.f_bavail * free.f_frsize / 1e9:.0f} GB free",
    ]
    for python in dict.fromkeys(pythons):
        answer = run([python, "-c", VERSIONS_PROGRAM, *PACKAGES])
        found = {"python": "not found"} if answer.returncode else answer.report()
        lines.append("versions " + ", ".join(f"{name} {number}" for name, number in found.items()))
    return lines


def print_facts(work_dir: Path, *pythons: str) -> None:
    """Print the facts, and an empty line."""
    print("\n".join(facts(work_dir, pythons)), end="\n\n")


def field(path: str, key: str) -> str:
    """Return the value of the first `key : value` line of a file in /proc; empty without one."""
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def memory_bytes(name: str) -> int:
    """Return a figure of the kernel's about memory."""
    return int(field("/proc/meminfo", f"{name}:").split()[0]) * 1024


def _file_system(folder: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [words for words in mounts if folder.resolve().is_relative_to(words[1])]
    return max(holding, key=lambda words: len(words[1]))[2]


def wait_until_idle(*, limit_s: float = 20.0, busy_share: float = 0.2) -> float:
    """Wait for other processes to calm down; return the share of cores busy at the end."""
    deadline = time.monotonic() + limit_s
    while True:
        before = _cpu_ticks()
        time.sleep(0.3)
        after = _cpu_ticks()
        busy = 1 - (after[0] - before[0]) / max(1, after[1] - before[1])
        if busy <= busy_share or time.monotonic() >= deadline:
            return round(busy, 3)


def _cpu_ticks() -> tuple[int, int]:
    """(idle, all) ticks since the machine started; what waits for the disk counts as idle."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return ticks[3] + ticks[4], sum(ticks)


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
        self._size = 2 * memory_bytes("MemTotal") // BLOCK_BYTES * BLOCK_BYTES
        self._position = 0
        with path.open("wb") as file:
            file.truncate(self._size)

    def fill(self) -> None:
        """Read until next to nothing is free, or as much as the memory holds was read."""
        buffer = bytearray(BLOCK_BYTES)
        read = 0
        with self._path.open("rb", buffering=0) as file:
            while memory_bytes("MemFree") > FREE_SHARE * self._size / 2 and read < self._size:
                for _ in range(64):
                    read += os.preadv(file.fileno(), [buffer], self._position)
                    self._position = (self._position + BLOCK_BYTES) % self._size
