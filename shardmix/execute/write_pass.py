"""The pass that writes a merge's output files.

A worker claims each leaf as soon as it is written: in the caller's process directly in the journal,
in another process in the results, from which the caller adds it to the journal.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from shardmix.anomalies import NO_ANOMALIES, AnomalySum, LeafAnomalies
from shardmix.compute.backend import Backend
from shardmix.errors import NonfiniteError
from shardmix.execute.chunk_merger import ChunkMerger, Merging, merging
from shardmix.execute.executor import IsStopped, Job, Task, TaskResult
from shardmix.execute.shared_files import SharedFiles
from shardmix.execute.tasks import TensorRanges
from shardmix.options import ERROR
from shardmix.output.journal import Claim, Claims
from shardmix.output.shard_writer import GrowingLeaves, GrowingShard
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.hashing import READ_NBYTES, is_sequential, num_leaves
from shardmix.system.held_folder import HeldFolder, open_folder
from shardmix.system.timer import NO_CLOCK, Clock


class Written(NamedTuple):
    """The output of one task."""

    anomalies: LeafAnomalies
    """NaN, Inf and integers that differ, in its leaves."""
    file_digest: str = ""
    """Digest (hex) of the file, if it is complete with this task."""
    claims: tuple[Claim, ...] = ()
    """Leaves to claim in the journal, if the worker could not do so itself."""


class Write:
    """Writes output files into a staging folder, and goes on from the claims there.

    A pickled copy opens the folder and loads the backend in its own process.
    """

    def __init__(
        self,
        plan: MergePlan,
        folder: "HeldFolder | _FolderElsewhere",
        claims: Claims,
        *,
        backend: Backend | None = None,
        clock: Clock = NO_CLOCK,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._claims = claims
        self._backend = backend
        self._clock = clock

    @contextmanager
    def opened(self) -> Iterator["_Writing"]:
        """Open the files that the workers of this process share."""
        with ExitStack() as stack:
            folder = self._folder
            if isinstance(folder, _FolderElsewhere):
                folder = stack.enter_context(folder.opened())
            at_work = merging(
                self._plan, self._backend, self._clock, statistics=self._claims.statistics
            )
            shared = stack.enter_context(at_work)
            writing = _Writing(shared, folder, self._claims, self._clock)
            yield stack.enter_context(closing(writing))

    def __reduce__(self) -> tuple[object, ...]:
        folder = _FolderElsewhere(self._folder.path, self._folder.mode)
        return Write, (self._plan, folder, self._claims.carried())


class _FolderElsewhere(NamedTuple):
    """A staging folder that another process will open."""

    path: Path
    mode: int

    def opened(self) -> HeldFolder:
        folder = open_folder(self.path)
        folder.mode = self.mode
        return folder


def write_job(
    plan: MergePlan,
    folder: HeldFolder,
    claims: Claims,
    *,
    backend: Backend | None = None,
    clock: Clock = NO_CLOCK,
) -> Job[Written]:
    """Return the job that writes all output files of a plan."""
    return Job(
        Write(plan, folder, claims, backend=backend, clock=clock),
        num_workers=plan.memory.workers,
        is_in_order=is_sequential(plan.digest_algorithm),
    )


class _Writing:
    """A writing pass in one process."""

    def __init__(self, shared: Merging, folder: HeldFolder, claims: Claims, clock: Clock) -> None:
        plan = shared.plan
        self._shared = shared
        self._claims = claims

        def open_shard(number: int) -> "_File":
            return _File(plan, number, GrowingShard(plan, number, folder, claims, clock))

        self._files: SharedFiles[_File] = SharedFiles(
            open_shard, lambda number: num_leaves(plan.shards[number].file_nbytes)
        )

    @contextmanager
    def worker(self) -> Iterator["_Writer"]:
        with self._shared.worker() as merger:
            yield _Writer(self._shared.plan, merger, self._files, self._claims)

    def close(self) -> None:
        self._files.close()


class _File:
    """An output file that workers write."""

    def __init__(self, plan: MergePlan, number: int, shard: GrowingShard) -> None:
        self.shard = shard
        self.ranges = TensorRanges(plan.shards[number])

    def close(self) -> None:
        self.shard.close()


class _Writer:
    """One worker."""

    def __init__(
        self, plan: MergePlan, merger: ChunkMerger, files: SharedFiles[_File], claims: Claims
    ) -> None:
        self._plan = plan
        self._merger = merger
        self._files = files
        self._claims = claims
        self._buffer = buffer_for_reading(READ_NBYTES)

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[Written] | None:
        """Merge a task's missing leaves, and finish its file if this was the last task."""
        file = self._files[task.file]
        found = AnomalySum()
        num_bytes = num_bytes_kept = 0
        leaf = task.first_leaf
        while leaf < task.stop_leaf:
            if is_stopped():
                return None
            kept = file.shard.reused(leaf, self._buffer)
            if kept is not None:
                _take(kept, self._plan, found)
                num_bytes_kept += self._merger.source_nbytes(task.file, (leaf, leaf + 1))
                leaf += 1
                continue
            first, leaf = leaf, file.shard.next_claimed(leaf + 1, task.stop_leaf)
            target = _Leaves(file.shard.begin(first, leaf), self._plan, found)
            merged = self._merger.merge(task.file, (first, leaf), file.ranges, target, is_stopped)
            if merged is None:
                return None
            num_bytes += merged
        return self._result(task, file, found, num_bytes, num_bytes_kept)

    def _result(
        self, task: Task, file: _File, found: AnomalySum, num_bytes: int, num_bytes_kept: int
    ) -> TaskResult[Written]:
        is_file_end = self._files.task_done(task)
        digest = ""
        if is_file_end:
            digest = file.shard.finish()
            self._files.forget(task.file)
        anomalies = found.total() or NO_ANOMALIES
        claims = self._claims.taken(task.file, task.first_leaf, task.stop_leaf)
        return TaskResult(
            task=task,
            num_bytes=num_bytes + num_bytes_kept,
            num_bytes_kept=num_bytes_kept,
            num_bytes_read=self._merger.num_bytes_read(),
            is_file_end=is_file_end,
            value=Written(anomalies, digest, claims),
        )


class _Leaves:
    """A range of leaves that is being written."""

    def __init__(self, growing: GrowingLeaves, plan: MergePlan, found: AnomalySum) -> None:
        self._growing = growing
        self._plan = plan
        self._found = found
        self.write = growing.write

    def note(self, leaf: int, anomalies: LeafAnomalies) -> None:
        _take(anomalies, self._plan, self._found)
        self._growing.note(leaf, anomalies)


def _take(anomalies: LeafAnomalies, plan: MergePlan, found: AnomalySum) -> None:
    """Add anomalies to those of a task. Raises `NonfiniteError` if NaN or Inf are not allowed."""
    found.add(anomalies)
    if anomalies.nonfinite and plan.settings.on_nonfinite == ERROR:
        name, counts = next(iter(anomalies.nonfinite.items()))
        raise NonfiniteError(
            plan.nonfinite_finding(name, counts),
            subject=name,
            remedy="mend the model that holds them, or allow them: --on-nonfinite warn",
        )
