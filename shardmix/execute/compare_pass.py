"""The pass that compares a merge's output with existing files, byte for byte."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from shardmix.anomalies import LeafAnomalies
from shardmix.compute.backend import Backend
from shardmix.execute.chunk_merger import ChunkMerger, Merging, merging
from shardmix.execute.executor import IsStopped, Job, Task, TaskResult
from shardmix.execute.jobs import run_job
from shardmix.execute.progress import OnProgress
from shardmix.execute.shared_files import SharedFiles
from shardmix.execute.tasks import TensorRanges, merge_tasks
from shardmix.plan.merge_plan import MergePlan, OutputShard
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.files import open_regular
from shardmix.system.hashing import READ_NBYTES, num_leaves, read_range
from shardmix.system.held_folder import HeldFolder
from shardmix.system.page_cache import PassedRanges

if TYPE_CHECKING:
    from shardmix.execute.gather_pass import TensorStatistics


class Differences:
    """The parts of an output that differ from a merge of its sources."""

    def __init__(self) -> None:
        self.num_bytes: dict[tuple[str, str], int] = {}
        """(File, tensor) → bytes that differ."""
        self.unreadable: dict[str, str] = {}
        """File → reason that it could not be read, or not to its end."""

    def __bool__(self) -> bool:
        return bool(self.num_bytes or self.unreadable)

    def count(self, file: str, part: str, num_bytes: int) -> None:
        """Count bytes that differ."""
        self.num_bytes[file, part] = self.num_bytes.get((file, part), 0) + num_bytes

    def add(self, more: "Differences") -> None:
        """Add the differences of another range."""
        for (file, part), num_bytes in more.num_bytes.items():
            self.count(file, part, num_bytes)
        self.unreadable |= more.unreadable


class Compare:
    """Computes output files again and compares them with those in a folder.

    A pickled copy reads the folder by its path.
    """

    def __init__(
        self,
        plan: MergePlan,
        folder: Path | HeldFolder,
        statistics: "Mapping[str, TensorStatistics]",
        *,
        backend: Backend | None = None,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._statistics = statistics
        self._backend = backend

    @contextmanager
    def opened(self) -> Iterator["_Comparing"]:
        """Open the files that the workers of this process share."""
        with (
            merging(self._plan, self._backend, statistics=self._statistics) as shared,
            closing(_Comparing(shared, self._folder)) as comparing,
        ):
            yield comparing

    def __reduce__(self) -> tuple[object, ...]:
        folder = self._folder
        path = folder.path if isinstance(folder, HeldFolder) else folder
        return Compare, (self._plan, path, self._statistics)


def compare_job(
    plan: MergePlan,
    folder: Path | HeldFolder,
    statistics: "Mapping[str, TensorStatistics] | None" = None,
    *,
    backend: Backend | None = None,
) -> Job[Differences]:
    """Return the job that compares all output files of a plan."""
    compare = Compare(plan, folder, statistics or {}, backend=backend)
    return Job(compare, num_workers=plan.memory.workers)


class _Comparing:
    """A comparing pass in one process."""

    def __init__(self, shared: Merging, folder: Path | HeldFolder) -> None:
        plan = shared.plan
        self._shared = shared
        self._files = SharedFiles(
            lambda number: _ExistingFile(plan, number, folder),
            lambda number: num_leaves(plan.shards[number].file_nbytes),
        )

    @contextmanager
    def worker(self) -> Iterator["_Comparer"]:
        with self._shared.worker() as merger:
            yield _Comparer(merger, self._files)

    def close(self) -> None:
        self._files.close()


class _Comparer:
    """One worker."""

    def __init__(self, merger: ChunkMerger, files: SharedFiles["_ExistingFile"]) -> None:
        self._merger = merger
        self._files = files
        self._buffer = buffer_for_reading(READ_NBYTES)

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[Differences] | None:
        """Compare a task's leaves; with the first of a file also its size and header."""
        file = self._files[task.file]
        target = _Leaves(file, self._buffer)
        if task.first_leaf == 0:
            target.compare_head()
        leaves = task.first_leaf, task.stop_leaf
        merged = self._merger.merge(task.file, leaves, file.ranges, target, is_stopped)
        if merged is None:
            return None
        is_file_end = self._files.task_done(task)
        if is_file_end:
            self._files.forget(task.file)
        return TaskResult(task, merged, target.differences, is_file_end=is_file_end)


class _ExistingFile:
    """An existing file, with the name of a file that a merge would write."""

    def __init__(self, plan: MergePlan, number: int, folder: Path | HeldFolder) -> None:
        self.planned: OutputShard = plan.shards[number]
        self.ranges = TensorRanges(self.planned)
        self.nbytes = 0
        self.finding = ""
        """Reason that it cannot be read, or ""."""
        self._file: BinaryIO | None = None
        path = (folder.path if isinstance(folder, HeldFolder) else folder) / self.planned.filename
        # Read like a source, so it follows the rule for sources.
        self._passed = None if plan.cache_use.keeps_sources else PassedRanges([path])
        try:
            self._file = (
                folder.open_regular(self.planned.filename)
                if isinstance(folder, HeldFolder)
                else open_regular(path)
            )
            self.nbytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            self._cannot_read(error)

    def read(self, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
        """Yield a range of its bytes; fewer if it cannot be read, or ends before."""
        if self._file is None or self.finding:
            return
        try:
            yield from read_range(self._file.fileno(), start, stop, buffer)
        except OSError as error:
            self._cannot_read(error)
        if self._passed is not None:
            self._passed.add(0, start, stop)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
            if self._passed is not None:
                self._passed.end()

    def _cannot_read(self, error: OSError) -> None:
        self.finding = error.strerror or str(error)


class _Leaves:
    """A range of an existing file's leaves, compared by one worker."""

    def __init__(self, file: _ExistingFile, buffer: memoryview) -> None:
        self._file = file
        self._name = file.planned.filename
        self._buffer = buffer
        self._found = Differences()

    @property
    def differences(self) -> Differences:
        """Differences found so far."""
        if self._file.finding:
            self._found.unreadable[self._name] = self._file.finding
        return self._found

    def note(self, leaf: int, anomalies: LeafAnomalies) -> None:
        """Do nothing: the merge has reported its anomalies."""

    def write(self, position: int, data: memoryview) -> None:
        """Compare a chunk's bytes with the file's."""
        for there in self._file.read(position, position + len(data), self._buffer):
            wanted, data = data[: len(there)], data[len(there) :]
            self._compare(position, np.frombuffer(there, np.uint8), np.frombuffer(wanted, np.uint8))
            position += len(there)
        if len(data) and not self._file.finding:
            self._found.count(self._name, "its end", len(data))

    def compare_head(self) -> None:
        """Compare the file's size and header."""
        planned = self._file.planned
        if self._file.finding:
            return
        if self._file.nbytes != planned.file_nbytes:
            num_bytes = abs(self._file.nbytes - planned.file_nbytes)
            self._found.count(self._name, "its size", num_bytes)
        start = 0
        for piece in planned.head():
            stop = start + len(piece)
            there = b"".join(map(bytes, self._file.read(start, stop, self._buffer)))
            if there != piece and not self._file.finding:
                self._found.count(self._name, "its header", planned.head_nbytes())
                return
            start = stop

    def _compare(
        self, position: int, there: npt.NDArray[np.uint8], wanted: npt.NDArray[np.uint8]
    ) -> None:
        if np.array_equal(there, wanted):
            return
        stop = position + len(there)
        for name, first, last in self._file.ranges.between(position, stop):
            part = slice(first - position, last - position)
            num_bytes = int(np.count_nonzero(there[part] != wanted[part]))
            if num_bytes:
                self._found.count(self._name, name, num_bytes)


def compare(
    plan: MergePlan,
    backend: Backend,
    folder: Path | HeldFolder,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> Differences:
    """Merge again, against the files in a folder; return the differences."""
    differences = Differences()
    statistics: Mapping[str, TensorStatistics] = {}
    if plan.gathering is not None:
        from shardmix.execute.gather_pass import Unkept, gather_statistics

        known = Unkept()
        gather_statistics(plan, known, on_progress, cancel)
        statistics = known.statistics
    run_job(
        compare_job(plan, folder, statistics, backend=backend),
        merge_tasks(plan),
        lambda result: differences.add(result.value),
        num_bytes=plan.read_nbytes,
        num_files=len(plan.shards),
        on_progress=on_progress,
        cancel=cancel,
    )
    return differences
