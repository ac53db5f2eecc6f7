"""Writes a shard in place: strips at their offsets, in any order, into a file sized beforehand.

No shard is ever buffered. Knows bytes and offsets, not tensors.
"""

import errno
import os
import threading
from pathlib import Path

from shardmix.errors import OutputError
from shardmix.filesystem import MAX_IO_NBYTES
from shardmix.safetensors_layout import HEADER_LENGTH_NBYTES


class ShardWriter:
    """One output file, open for strips from several threads."""

    def __init__(self, path: Path, *, file_nbytes: int) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor = -1
        try:
            self._descriptor = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
            )
            os.truncate(self._descriptor, file_nbytes)
        except OSError as error:
            self.close()
            raise _output_error(path, error) from None

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes at an offset of the file, however many calls that takes."""
        written = 0
        try:
            while written < len(data):
                part = data[written : written + MAX_IO_NBYTES]
                written += os.pwrite(self._descriptor, part, offset + written)
        except OSError as error:
            raise _output_error(self._path, error) from None

    def finish(self, header: str, *, fsync: bool) -> None:
        """Write the header, force the file to disk if wanted, and close it.

        The header comes last: until then the file is not valid safetensors.
        """
        encoded = header.encode()
        self.write(HEADER_LENGTH_NBYTES, memoryview(encoded))
        self.write(0, memoryview(len(encoded).to_bytes(HEADER_LENGTH_NBYTES, "little")))
        try:
            if fsync:
                os.fsync(self._descriptor)
            self.close()  # network disks may say only now that they are full
        except OSError as error:
            raise _output_error(self._path, error) from None

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _output_error(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path.parent}: the disk is full ({error.strerror}); free some space, or write "
            "elsewhere with -o"
        )
    return OutputError(f"{path}: cannot be written ({error.strerror})")
