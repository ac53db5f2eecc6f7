"""A memory control group of a given size, version 1 or 2, made for one process and removed after.

with memory_group(512 * 1024**2) as group:
    run(group.wrap(command))
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.processes import Finished, run
from benchmarks.lib.tables import mib

ROOT = Path("/sys/fs/cgroup")


class NoMemoryGroupError(Exception):
    """Memory groups can't be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group that bounds what its processes and their page cache hold together."""

    folder: Path
    is_v2: bool

    def wrap(self, command: Sequence[str | Path]) -> list[str]:
        """Return the command line that enters the group, then becomes `command`."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *map(str, command)]

    def charged(self) -> tuple[int, int]:
        """Return the most bytes charged to the group, page cache included, and its OOM kills."""
        peak = self.folder / ("memory.peak" if self.is_v2 else "memory.max_usage_in_bytes")
        events = self.folder / ("memory.events" if self.is_v2 else "memory.oom_control")
        counts = dict(line.split() for line in events.read_text().splitlines())
        return int(peak.read_text()) if peak.exists() else 0, int(counts.get("oom_kill", 0))


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group of that limit, swap included; raises NoMemoryGroupError if it can't be."""
    is_v2 = not (ROOT / "memory" / "memory.limit_in_bytes").exists()
    folder = (ROOT if is_v2 else ROOT / "memory") / f"shardmix-benchmark-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            subtree = ROOT / "cgroup.subtree_control"
            if is_v2 and "memory" not in subtree.read_text().split():
                subtree.write_text("+memory")
                stack.callback(subtree.write_text, "-memory")
            folder.mkdir()
            stack.callback(_remove, folder)
            limit = "memory.max" if is_v2 else "memory.limit_in_bytes"
            (folder / limit).write_text(str(limit_bytes))
            with_swap = folder / ("memory.swap.max" if is_v2 else "memory.memsw.limit_in_bytes")
            if with_swap.exists():
                with_swap.write_text("0" if is_v2 else str(limit_bytes))
        except OSError as error:
            raise NoMemoryGroupError(f"no memory control group: {error}") from error
        yield MemoryGroup(folder, is_v2)


def run_within(
    group_bytes: int, command: Sequence[str | Path]
) -> tuple[Finished, tuple[object, object]]:
    """Run a command in a group of that size; 0 for none. Return what came of it, and its charge.

    The charge is in MiB, with the OOM kills, for a table's cells. Raises NoMemoryGroupError.
    """
    if not group_bytes:
        return run(command), ("-", "-")
    with memory_group(group_bytes) as group:
        finished = run(group.wrap(command))
        peak_bytes, kills = group.charged()
    return finished, (mib(peak_bytes), kills)


def _remove(folder: Path) -> None:
    """Remove a group; the kernel takes a moment to let go of a process that has ended."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            return folder.rmdir()
        time.sleep(0.1)
    return folder.rmdir()
