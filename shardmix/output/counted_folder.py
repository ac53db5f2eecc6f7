"""A folder that nothing is written to: counts how long its files would be.

Stands in the place of a `HeldFolder` for whoever writes an output. So what an output will take of a
disk is asked of those who write it, and of nobody else.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

BLOCK_NBYTES = 4096
"""What file systems mostly give to files at once, and so what the smallest file takes."""


class CountedFolder:
    """The sizes of files that would be made in a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where the folder would be; only for messages."""
        self.sizes: dict[str, int] = {}
        """Path within it → size in bytes; what is made anew counts as it was made last."""

    @contextmanager
    def create(self, name: str) -> Iterator["CountedFile"]:
        """Give a file to be written."""
        file = CountedFile()
        yield file
        self.sizes[name] = file.nbytes

    @property
    def nbytes(self) -> int:
        """What all of it takes of a disk, in whole blocks; each folder takes one."""
        folders = {parent for name in self.sizes for parent in PurePosixPath(name).parents}
        blocks = sum(-(-nbytes // BLOCK_NBYTES) for nbytes in self.sizes.values())
        return (blocks + len(folders)) * BLOCK_NBYTES


class CountedFile(io.RawIOBase):
    """A file whose bytes are counted and dropped."""

    def __init__(self) -> None:
        self.nbytes = 0
        """How many there are."""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: object) -> int:
        """Count some bytes."""
        nbytes = memoryview(data).nbytes  # type: ignore[arg-type]
        self.nbytes += nbytes
        return nbytes

    def count(self, nbytes: int) -> None:
        """Count bytes that nobody has to read for that."""
        self.nbytes += nbytes
