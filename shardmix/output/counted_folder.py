"""A folder that writes nothing, and counts the sizes of its files.

The code that writes an output takes it in place of a `HeldFolder`. So the disk space of an output
is known from the very code that writes it.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

BLOCK_NBYTES = 4096
"""Allocation unit of most file systems, and so the size of the smallest file."""


class CountedFolder:
    """The sizes of the files that would be made in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """The path that the folder would have; only for messages."""
        self.sizes: dict[str, int] = {}
        """Path within it → size in bytes; the last write of a file counts."""

    @contextmanager
    def create(self, name: str) -> Iterator["CountedFile"]:
        """Yield a file to be written."""
        file = CountedFile()
        yield file
        self.sizes[name] = file.nbytes

    @property
    def nbytes(self) -> int:
        """Disk space of all files, in whole blocks; each folder takes one."""
        folders = {parent for name in self.sizes for parent in PurePosixPath(name).parents}
        blocks = sum(-(-nbytes // BLOCK_NBYTES) for nbytes in self.sizes.values())
        return (blocks + len(folders)) * BLOCK_NBYTES


class CountedFile(io.RawIOBase):
    """A file whose bytes are counted and dropped."""

    def __init__(self) -> None:
        self.nbytes = 0
        """Number of bytes so far."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: object) -> int:
        """Count the bytes of `data`."""
        nbytes = memoryview(data).nbytes  # type: ignore[arg-type]
        self.nbytes += nbytes
        return nbytes

    def count(self, nbytes: int) -> None:
        """Count bytes that need not be read for it."""
        self.nbytes += nbytes
