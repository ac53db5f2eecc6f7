"""What the disks are like: free space, and how much one call moves."""

import shutil
from pathlib import Path

MAX_IO_NBYTES = 0x7FFFF000
"""What one read or write call moves at most on Linux; more takes several."""


def free_nbytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
