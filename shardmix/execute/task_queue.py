"""Hands the blocks of a merge to its workers, and keeps count of what they have done and found.

Knows no bytes: where output goes is behind `ShardTarget`.
"""

import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

from shardmix.anomalies import AnomalySum, LeafAnomalies
from shardmix.dtypes import element_nbytes
from shardmix.errors import NonfiniteError
from shardmix.execute.tasks import Chunk, Task, TensorPlaces, tasks
from shardmix.options import ERROR
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.page_cache import PassedRanges

_MANY = 1000


class LeafTarget(Protocol):
    """Where one worker puts a range of leaves, chunk by chunk, in order."""

    def note(self, leaf: int, findings: LeafAnomalies) -> None:
        """Remember what was found in the next chunk's part of a leaf."""

    def write(self, position: int, data: memoryview) -> None:
        """Take the next chunk's bytes."""


class ShardTarget(Protocol):
    """Where an output file's bytes go: into a file, or against one that exists."""

    def reused(self, leaf: int, buffer: memoryview) -> LeafAnomalies | None:
        """Return what is known of a leaf that is there already; None where it is to be merged."""

    def next_claimed(self, leaf: int, stop_leaf: int) -> int:
        """Return the first leaf from `leaf` on that may be there already, at most `stop_leaf`."""

    def begin(self, first_leaf: int, stop_leaf: int) -> LeafTarget:
        """Start a range of leaves."""

    def finish(self) -> str:
        """End the file, all of whose leaves are there; return its digest (hex)."""

    def close(self) -> None:
        """Close the file, finished or not."""


class ShardInWork:
    """An output file that workers are at, and how many of its tasks are still to come."""

    def __init__(self, plan: MergePlan, number: int, target: ShardTarget) -> None:
        self.number = number
        self.target = target
        self.places = TensorPlaces(plan.shards[number])
        self.tasks = tasks(plan, number)
        self.num_tasks_left = 0
        self.is_all_handed_out = False


class Work:
    """Blocks, each to one worker; whoever ends a file's last task ends the file.

    A worker stays with its file, since a file system lets one thread at a time write to a file. One
    that has no file of its own left helps others with theirs.
    """

    def __init__(
        self,
        plan: MergePlan,
        open_shard: Callable[[int], ShardTarget],
        *,
        on_many_anomalies: Callable[[Collection[str]], None] | None = None,
    ) -> None:
        """`on_many_anomalies` is called with new tensors that hold NaN, a thousand at a time."""
        self._on_many_anomalies = on_many_anomalies
        self._untold: list[str] = []
        self._plan = plan
        self._open_shard = open_shard
        self._lock = threading.Lock()
        self._passed: PassedRanges | None = None
        if not plan.cache_use.keeps_sources:
            self._passed = PassedRanges([file.path for file in plan.files])
            self._num_files = len(plan.files)
        self._not_begun = iter(range(len(plan.shards)))
        self._open: list[ShardInWork] = []
        self._findings = AnomalySum()
        self._error: BaseException | None = None
        self.is_stopped = False
        self.num_bytes_done = 0
        self.num_bytes_kept = 0
        self.file_digests: dict[str, str] = {}

    def next_task(self, mine: ShardInWork | None) -> tuple[ShardInWork, Task] | None:
        """Return a task that nobody has yet, or None at the end or after `stop`.

        It is of the file that the worker has been at, of one that nobody has begun, or of any.
        """
        with self._lock:
            if self.is_stopped:
                return None
            return next(self._tasks_for(mine), None)

    def _tasks_for(self, mine: ShardInWork | None) -> Iterator[tuple[ShardInWork, Task]]:
        for shard in itertools.chain([mine] if mine else [], self._begun(), list(self._open)):
            for task in shard.tasks:
                shard.num_tasks_left += 1
                shard.is_all_handed_out = task.is_last
                yield shard, task

    def _begun(self) -> Iterator[ShardInWork]:
        for number in self._not_begun:
            shard = ShardInWork(self._plan, number, self._open_shard(number))
            self._open.append(shard)
            yield shard

    def count(self, num_bytes: int, *, kept: bool = False) -> None:
        """Count source bytes as merged, or as not needed since their output is there already."""
        with self._lock:
            self.num_bytes_done += num_bytes
            self.num_bytes_kept += num_bytes * kept

    def sources_passed(self, chunk: Chunk) -> None:
        """Take what a chunk was read from for done with: it may leave the page cache."""
        if self._passed is None:
            return
        segment, start, stop = chunk.segment, chunk.start, chunk.start + chunk.num_elements
        for _, dtype, file, offset in segment.sources:
            width = element_nbytes(dtype)
            if file < self._num_files:  # else it was decoded
                self._passed.add(file, offset + start * width, offset + stop * width)

    def found(self, findings: LeafAnomalies) -> None:
        """Take in findings. Raises `NonfiniteError` where there are NaN or Inf, and may not be."""
        if not findings:
            return
        many: list[str] = []
        with self._lock:
            if self._on_many_anomalies is not None:
                names = findings.nonfinite
                self._untold += (name for name in names if not self._findings.has_nonfinite(name))
                if len(self._untold) >= _MANY:
                    many, self._untold = self._untold, []
            self._findings.add(findings)
        if many and self._on_many_anomalies is not None:
            self._on_many_anomalies(many)
        if findings.nonfinite and self._plan.settings.on_nonfinite == ERROR:
            name, counts = next(iter(findings.nonfinite.items()))
            finding = nonfinite_finding(name, counts, self._plan)
            raise NonfiniteError(
                finding,
                subject=name,
                remedy="mend the model that holds them, or allow them: --on-nonfinite warn",
            )

    def task_done(self, shard: ShardInWork) -> None:
        """Count a task as done, and end its file if it was the last."""
        with self._lock:
            shard.num_tasks_left -= 1
            is_last = shard.num_tasks_left == 0 and shard.is_all_handed_out
        if is_last:
            digest = shard.target.finish()
            with self._lock:
                self._open.remove(shard)
                self.file_digests[self._plan.shards[shard.number].filename] = digest

    @property
    def num_shards_done(self) -> int:
        """How many output files are complete."""
        return len(self.file_digests)

    def stop(self, error: BaseException | None = None) -> None:
        """Hand out no more tasks; the first error is the one to raise."""
        with self._lock:
            self.is_stopped = True
            self._error = self._error or error

    def close(self) -> None:
        """Close what is still open, then raise the first worker's error, if there was one."""
        for shard in self._open:
            shard.target.close()
        if self._passed is not None:
            self._passed.end()
        if self._error is not None:
            raise self._error

    @property
    def findings(self) -> LeafAnomalies:
        """What was found in all that is done."""
        with self._lock:
            return self._findings.total()


def nonfinite_finding(name: str, counts: tuple[int, int, int], plan: MergePlan) -> str:
    """Say what a merged tensor holds that is not finite."""
    num_nan, num_inf, num_overflowed = counts
    parts = []
    if num_nan:
        parts.append(f"{num_nan} NaN")
    if num_inf - num_overflowed:
        parts.append(f"{num_inf - num_overflowed} Inf")
    if num_overflowed:
        parts.append(
            f"{num_overflowed} values too large for {plan.tensor_dtype(name)}, made Inf by "
            "rounding (--dtype bfloat16 or float32 has room for them)"
        )
    return " and ".join(parts) + " in the merged tensor"
