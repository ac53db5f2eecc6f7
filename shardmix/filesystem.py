"""What the disks are like: free space, and whether a path lies on a network file system."""

import shutil
from pathlib import Path

import psutil

MAX_IO_NBYTES = 0x7FFFF000
"""What one read or write call moves at most on Linux; more takes several."""

# File systems on which a mapped page is as good as memory. On others (NFS, SMB, FUSE) a file that
# shrinks or a server that goes away turns a page fault into a fatal signal.
_LOCAL_FILESYSTEMS = frozenset(
    ["apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"]
)


def free_nbytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write where `path` is, or would be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def on_local_filesystem(path: Path) -> bool:
    """Tell whether a path lies on a file system of this machine; an unknown kind counts as not."""
    resolved = path.resolve()
    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    for folder in (resolved, *resolved.parents):
        if folder in mounts:
            return mounts[folder] in _LOCAL_FILESYSTEMS
    return False
