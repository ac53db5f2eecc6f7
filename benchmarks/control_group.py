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

ROOT = Path("/sys/fs/cgroup")


class NoMemoryGroupError(Exception):
    """Memory groups can't be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group that bounds what its processes and their page cache hold together."""

    folder: Path
    limit_bytes: int
    is_v2: bool

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command line that enters the group, then becomes `command`."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *command]

    def peak_bytes(self) -> int:
        """The most that was charged to the group, page cache included; 0 where unknown."""
        path = self.folder / ("memory.peak" if self.is_v2 else "memory.max_usage_in_bytes")
        return int(path.read_text()) if path.exists() else 0

    def oom_kills(self) -> int:
        """How many processes the kernel killed for the limit."""
        events = self.folder / ("memory.events" if self.is_v2 else "memory.oom_control")
        pairs = (line.split() for line in events.read_text().splitlines())
        return next((int(count) for name, count in pairs if name == "oom_kill"), 0)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a group of that limit, swap included; raises NoMemoryGroupError where it can't be."""
    with contextlib.ExitStack() as stack:
        try:
            if (ROOT / "memory" / "memory.limit_in_bytes").exists():
                group = _make_v1(stack, limit_bytes)
            else:
                group = _make_v2(stack, limit_bytes)
        except OSError as error:
            raise NoMemoryGroupError(f"no memory control group: {error}") from error
        yield group


def _make_v1(stack: contextlib.ExitStack, limit_bytes: int) -> MemoryGroup:
    folder = _make_folder(stack, ROOT / "memory")
    (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
    with_swap = folder / "memory.memsw.limit_in_bytes"
    if with_swap.exists():
        with_swap.write_text(str(limit_bytes))
    return MemoryGroup(folder, limit_bytes, is_v2=False)


def _make_v2(stack: contextlib.ExitStack, limit_bytes: int) -> MemoryGroup:
    subtree = ROOT / "cgroup.subtree_control"
    if "memory" not in subtree.read_text().split():
        subtree.write_text("+memory")
        stack.callback(subtree.write_text, "-memory")
    folder = _make_folder(stack, ROOT)
    (folder / "memory.max").write_text(str(limit_bytes))
    if (folder / "memory.swap.max").exists():
        (folder / "memory.swap.max").write_text("0")
    return MemoryGroup(folder, limit_bytes, is_v2=True)


def _make_folder(stack: contextlib.ExitStack, parent: Path) -> Path:
    folder = parent / f"shardmix-benchmark-{os.getpid()}"
    folder.mkdir()
    stack.callback(_remove_folder, folder)
    return folder


def _remove_folder(folder: Path) -> None:
    """Remove the group; the kernel takes a moment to let go of a process that has ended."""
    for _ in range(50):
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
    folder.rmdir()
