"""A memory control group of a given size, version 1 or 2, made for one benchmark's processes."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
V2_NAMES = {
    "memory.limit_in_bytes": "memory.max",
    "memory.memsw.limit_in_bytes": "memory.swap.max",
    "memory.max_usage_in_bytes": "memory.peak",
    "memory.oom_control": "memory.events",
}


class NoMemoryGroupError(Exception):
    """Memory groups can't be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group that bounds what its processes and their page cache hold together."""

    folder: Path
    is_v2: bool

    def file(self, name: str) -> Path:
        """Return one of the group's files, by its name in version 1."""
        return self.folder / (V2_NAMES[name] if self.is_v2 else name)

    def wrap(self, command: Sequence[str | Path]) -> list[str]:
        """Return the command line that enters the group, then becomes `command`."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *map(str, command)]

    def charged(self) -> tuple[int, int]:
        """Return the most bytes charged to the group, page cache included, and its OOM kills."""
        peak = self.file("memory.max_usage_in_bytes")
        events = self.file("memory.oom_control").read_text().splitlines()
        kills = dict(map(str.split, events)).get("oom_kill", 0)
        return int(peak.read_text()) if peak.exists() else 0, int(kills)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group of that limit, swap included; raises NoMemoryGroupError if it can't be."""
    is_v2 = not (ROOT / "memory" / "memory.limit_in_bytes").exists()
    folder = (ROOT if is_v2 else ROOT / "memory") / f"shardmix-benchmark-{os.getpid()}"
    group = MemoryGroup(folder, is_v2)
    with contextlib.ExitStack() as stack:
        try:
            subtree = ROOT / "cgroup.subtree_control"
            if is_v2 and "memory" not in subtree.read_text().split():
                subtree.write_text("+memory")
                stack.callback(subtree.write_text, "-memory")
            folder.mkdir()
            stack.callback(_remove, folder)
            group.file("memory.limit_in_bytes").write_text(str(limit_bytes))
            with_swap = group.file("memory.memsw.limit_in_bytes")
            if with_swap.exists():
                with_swap.write_text("0" if is_v2 else str(limit_bytes))
        except OSError as error:
            raise NoMemoryGroupError(f"no memory control group: {error}") from error
        yield group


def _remove(folder: Path) -> None:
    """Remove a group; the kernel takes a moment to let go of a process that has ended."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            return folder.rmdir()
        time.sleep(0.1)
    return folder.rmdir()
