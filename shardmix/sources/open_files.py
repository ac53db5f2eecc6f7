"""Source files: open in bounded number, and unchanged since they were planned."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress

from shardmix.errors import SourceError, unreadable
from shardmix.sources.identity import SourceFile, reading_failed

MAX_OPEN_FILES = 32
"""Files that one worker holds open (each once more if it is mapped): enough for the shards in use
at one time, and with eight workers still far from the usual limit of 1024."""


def _close(descriptor: int) -> None:
    with suppress(OSError):  # of no consequence: all reads are done
        os.close(descriptor)


class OpenFiles:
    """Descriptors of the files last used, oldest closed first."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, file: int) -> int:
        """Return the file, open for reading; it is now the last to be closed."""
        if file in self._descriptors:
            self._descriptors.move_to_end(file)
            return self._descriptors[file]
        source = self._files[file]
        try:
            descriptor = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(source.path, error, "cannot be opened") from None
        try:
            source.check_status(os.fstat(descriptor))
        except OSError as error:
            _close(descriptor)
            raise reading_failed(source.path, error.errno) from None
        except SourceError:
            _close(descriptor)
            raise
        self._descriptors[file] = descriptor
        return descriptor

    def descriptors(self, files: Sequence[int]) -> list[int] | None:
        """Return several files, open until the next call, or None if they are too many."""
        if len(files) > MAX_OPEN_FILES:
            return None
        found = [self.descriptor(file) for file in files]
        while self.evict_oldest() is not None:
            pass
        return found

    def evict_oldest(self) -> int | None:
        """Close the file unused for longest if too many are open; return its number."""
        if len(self._descriptors) <= MAX_OPEN_FILES:
            return None
        file, descriptor = self._descriptors.popitem(last=False)
        _close(descriptor)
        return file

    def path(self, file: int) -> str:
        """Return a file's path."""
        return self._files[file].path

    def nbytes(self, file: int) -> int:
        """Return its size when it was planned."""
        return self._files[file].nbytes

    def nbytes_now(self, file: int) -> int:
        """Return its size now."""
        try:
            return os.fstat(self.descriptor(file)).st_size
        except OSError as error:
            raise reading_failed(self.path(file), error.errno) from None

    def close(self) -> None:
        """Close all files."""
        while self._descriptors:
            _close(self._descriptors.popitem()[1])
