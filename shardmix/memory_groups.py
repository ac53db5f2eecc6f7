"""What the control groups of a process leave it of the machine's memory: in a container, less.

Linux, groups of version 1 and 2:
https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_NBYTES = 1 << 60  # what version 1 says where there is no limit is more


@dataclass(frozen=True, slots=True)
class _Names:
    """What the files and fields are called."""

    limit: str
    usage: str
    cached: tuple[str, ...]


_VERSION_1 = _Names(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_VERSION_2 = _Names("memory.max", "memory.current", ("inactive_file", "active_file"))


def group_available_nbytes() -> int | None:
    """Return what the tightest group still has, cached files given up; None without a limit."""
    rooms = (_available_nbytes(folder, names) for folder, names in _groups())
    return min((room for room in rooms if room is not None), default=None)


def _groups() -> Iterator[tuple[Path, _Names]]:
    """Yield the folders of the process's memory groups, and of those that these are part of."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _ROOT, _VERSION_2
        elif "memory" in controllers.split(","):
            root, names = _ROOT / "memory", _VERSION_1
        else:
            continue
        # Within a container the path may be one of the host's; then its own group is the root.
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder, names
            folder = folder.parent
        yield root, names


def _available_nbytes(folder: Path, names: _Names) -> int | None:
    with suppress(OSError, ValueError):
        limit = int((folder / names.limit).read_text())  # "max": none
        if limit < _UNLIMITED_NBYTES:
            used = int((folder / names.usage).read_text())
            fields = dict(
                line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines()
            )
            cached = sum(int(fields.get(name, 0)) for name in names.cached)
            return max(0, limit - used + cached)
    return None
