"""Holds recomputed output against files that exist, byte for byte, in place of writing it."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from shardmix.anomalies import LeafAnomalies
from shardmix.execute.tasks import TensorPlaces
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.digests import READ_NBYTES, read_range
from shardmix.system.files import open_regular
from shardmix.system.held_folder import HeldFolder
from shardmix.system.page_cache import PassedRanges


class Differences:
    """Which parts of an output are not what a merge of its sources gives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.num_bytes: dict[tuple[str, str], int] = {}
        """(File, tensor) → bytes that differ."""
        self.unreadable: dict[str, str] = {}
        """File → why it could not be read, at all or to its end."""

    def add(self, file: str, tensor: str, num_bytes: int) -> None:
        """Count bytes that differ."""
        with self._lock:
            key = file, tensor
            self.num_bytes[key] = self.num_bytes.get(key, 0) + num_bytes


class ComparedShard:
    """One existing file that stands where a merge would write one (a `work.ShardTarget`)."""

    def __init__(
        self, plan: MergePlan, number: int, folder: Path | HeldFolder, differences: Differences
    ) -> None:
        self._planned = planned = plan.shards[number]
        self._places = TensorPlaces(planned)
        where = folder.path if isinstance(folder, HeldFolder) else folder
        self._path = where / planned.filename
        # Here it is read, as sources are.
        is_kept = plan.cache_use.keeps_sources
        self._passed = None if is_kept else PassedRanges([self._path])
        self._differences = differences
        self._local = threading.local()
        self._file: BinaryIO | None = None
        try:
            self._file = (
                folder.open_regular(planned.filename)
                if isinstance(folder, HeldFolder)
                else open_regular(self._path)
            )
            nbytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            self._cannot_read(error)
            return
        if nbytes != planned.file_nbytes:
            differences.add(planned.filename, "its size", abs(nbytes - planned.file_nbytes))

    def reused(self, leaf: int, buffer: memoryview) -> LeafAnomalies | None:
        """Return None: everything is computed again."""
        return None

    def next_claimed(self, leaf: int, stop_leaf: int) -> int:
        """Return the end: everything is computed again."""
        return stop_leaf

    def begin(self, first_leaf: int, stop_leaf: int) -> "ComparedShard":
        """Start a range of leaves."""
        return self

    def note(self, leaf: int, findings: LeafAnomalies) -> None:
        """Do nothing: the merge has told of its findings."""

    def write(self, position: int, data: memoryview) -> None:
        """Compare a chunk's bytes with the file's."""
        if self._is_unreadable:
            return
        for there in self._read(position, position + len(data)):
            wanted, data = data[: len(there)], data[len(there) :]
            self._compare(position, np.frombuffer(there, np.uint8), np.frombuffer(wanted, np.uint8))
            position += len(there)
        if len(data) and not self._is_unreadable:
            self._differences.add(self._planned.filename, "its end", len(data))

    def finish(self) -> str:
        """Compare the file's header."""
        start = 0
        for piece in self._planned.head():
            stop = start + len(piece)
            there = b"".join(map(bytes, self._read(start, stop)))
            if there != piece and not self._is_unreadable:
                num_bytes = self._planned.head_nbytes()
                self._differences.add(self._planned.filename, "its header", num_bytes)
                break
            start = stop
        self.close()
        return ""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            if self._passed is not None:
                self._passed.end()

    @property
    def _is_unreadable(self) -> bool:
        return self._planned.filename in self._differences.unreadable

    def _cannot_read(self, error: OSError) -> None:
        self._differences.unreadable[self._planned.filename] = error.strerror or str(error)

    def _compare(
        self, position: int, there: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]
    ) -> None:
        if np.array_equal(there, wanted):
            return
        stop = position + len(there)
        for name, first, last in self._places.between(position, stop):
            part = slice(first - position, last - position)
            num_bytes = int(np.count_nonzero(there[part] != wanted[part]))
            if num_bytes:
                self._differences.add(self._planned.filename, name, num_bytes)

    def _read(self, start: int, stop: int) -> Iterator[memoryview]:
        if self._file is None:
            return
        if not hasattr(self._local, "buffer"):
            self._local.buffer = buffer_for_reading(READ_NBYTES)
        try:
            yield from read_range(self._file.fileno(), start, stop, self._local.buffer)
        except OSError as error:
            self._cannot_read(error)
        if self._passed is not None:
            self._passed.add(0, start, stop)
