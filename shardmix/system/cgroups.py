"""The memory that the control groups of a process leave it: in a container, less than the
machine's.

Linux, groups of version 1 and 2:
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_NBYTES = 1 << 60  # version 1 says more than this if there is no limit


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of a version's files and fields."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]


_VERSION_1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_VERSION_2 = _Names(
    ("memory.max", "memory.high"),
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
)


def group_available_nbytes() -> int | None:
    """Return the bytes left in the tightest group, cached files given up; None without a limit."""
    rooms = (_available_nbytes(folder, names) for folder, names in _groups())
    return min((room for room in rooms if room is not None), default=None)


def _groups() -> Iterator[tuple[Path, _Names]]:
    """Yield the folders of the process's memory groups, and of the groups that enclose them."""
    try:
        lines = os.fsdecode(_MEMBERSHIP.read_bytes()).splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if line.startswith("0::"):
            root, names = _ROOT, _VERSION_2
        elif "memory" in controllers.split(","):
            root, names = _ROOT / "memory", _VERSION_1
        else:
            continue
        # In a container the path may be the host's; the container's own group is then the root.
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder, names
            folder = folder.parent
        yield root, names


def _available_nbytes(folder: Path, names: _Names) -> int | None:
    limit = min((_limit_nbytes(folder / name) for name in names.limits), default=_UNLIMITED_NBYTES)
    if limit >= _UNLIMITED_NBYTES:
        return None
    with suppress(OSError, ValueError):
        used = int((folder / names.usage).read_text())
        fields = dict(
            line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines()
        )
        reclaimable = sum(int(fields.get(name, 0)) for name in names.reclaimable)
        return max(0, limit - used + reclaimable)
    return None


def _limit_nbytes(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return _UNLIMITED_NBYTES
