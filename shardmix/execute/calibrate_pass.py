"""The pass that finds the faster of two devices: each does for a moment what the merge does.

With `--device auto` a small merge takes the CPU: loading torch's build for CUDA takes seconds, and
the arithmetic is a tenth of a merge. For a large one the merge's own workers, readers and backends
try its most common kind of segment. They read a file in memory over and over, as a merge reads from
the page cache. Their output is dropped, since writing takes the same time on either device. Names
no device: it compares the given ones.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import NamedTuple

from shardmix.anomalies import LeafAnomalies
from shardmix.compute.backend import Backend
from shardmix.dtypes import element_nbytes
from shardmix.errors import DeviceError, one_line
from shardmix.execute.chunk_merger import ChunkMerger, Merging, merging
from shardmix.execute.executor import IsStopped, Job, Task, TaskResult
from shardmix.execute.tasks import TensorRanges, merge_tasks
from shardmix.execute.thread_executor import ThreadExecutor
from shardmix.methods import keep_first
from shardmix.plan.chunk_size import VECTOR
from shardmix.plan.merge_plan import (
    MergePlan,
    OutputShard,
    PlannedSource,
    Segment,
)
from shardmix.sources.identity import SourceFile, SourceIdentity
from shardmix.system.units import MIB

TRIAL_SECONDS = 0.5
"""Time of a device's trial, once all workers have started."""
SOURCE_NBYTES = 256 * MIB
"""Size of the file that is read: larger than most caches. It does not count as resident."""

# More than any machine reads in that time.
_PLANNED_NBYTES = 1000 * 10**9
# A byte of which numbers of every dtype are neither NaN, infinite nor subnormal.
_ORDINARY = b"\x3c"

Candidate = tuple[MergePlan, Backend]
"""A merge on one device: its plan, with its memory, and its loaded backend."""


def faster(
    on_cpu: Candidate,
    on_gpu: Candidate,
    *,
    measure: "Callable[[MergePlan, Backend], float] | None" = None,
) -> tuple[Candidate, str]:
    """Return the candidate that merges more source bytes a second, and a note that says so.

    A GPU that fails (it may have no memory left) is not taken.
    """
    measure = measure or source_bytes_per_second
    device = on_gpu[0].settings.device
    try:
        gpu_rate = measure(*on_gpu)
    except (DeviceError, RuntimeError) as error:
        reason = one_line(error.__cause__ or error)
        return on_cpu, f"device cpu: {device} failed when it was tried ({reason})"
    cpu_rate = measure(*on_cpu)
    rates = {"cpu": f"{cpu_rate / 1e9:.1f} GB/s", device: f"{gpu_rate / 1e9:.1f} GB/s"}
    chosen, other = (device, "cpu") if gpu_rate > cpu_rate else ("cpu", device)
    note = f"device {chosen}: {rates[chosen]} of source bytes, {other} {rates[other]}, measured"
    return (on_gpu if chosen == device else on_cpu), note


def source_bytes_per_second(plan: MergePlan, backend: Backend) -> float:
    """Return the number of source bytes that the plan's workers merge in a second."""
    with _trial_plan(plan) as trial:
        job = Job(Calibrate(trial, backend), num_workers=trial.memory.workers)
        # Workers on threads of this process, wherever the merge will run: these are tried.
        run = ThreadExecutor().run(job, merge_tasks(trial), threading.Event())
        with closing(run) as results:
            return _rate(results, num_workers=job.num_workers)


def _rate(results: Iterable[TaskResult["Tried"] | None], *, num_workers: int) -> float:
    """Return source bytes a second, counted once every worker has finished a task."""
    seen: set[int] = set()
    started = last = 0.0
    num_bytes = 0
    for result in results:
        if result is None:
            continue
        last = result.value.ended
        if len(seen) < num_workers:
            seen.add(result.value.worker)
            started = last
            continue
        num_bytes += result.num_bytes
        if last - started > TRIAL_SECONDS:
            break
    return num_bytes / max(last - started, 1e-9)


class Tried(NamedTuple):
    """A task of a trial."""

    worker: int
    """Number of the thread that did it."""
    ended: float
    """Time of its end, by `time.perf_counter`."""


class Calibrate:
    """Merges chunks and drops their output."""

    def __init__(self, plan: MergePlan, backend: Backend) -> None:
        self._plan = plan
        self._backend = backend

    @contextmanager
    def opened(self) -> Iterator["_Calibrating"]:
        """Open the files that the workers of this process share."""
        with merging(self._plan, self._backend) as shared:
            yield _Calibrating(shared)


class _Calibrating:
    """A trial in one process."""

    def __init__(self, shared: Merging) -> None:
        self._shared = shared
        (planned,) = shared.plan.shards
        self.ranges = TensorRanges(planned)

    @contextmanager
    def worker(self) -> Iterator["_Trier"]:
        with self._shared.worker() as merger:
            yield _Trier(merger, self.ranges)


class _Trier:
    """One worker, which drops its output."""

    def __init__(self, merger: ChunkMerger, ranges: TensorRanges) -> None:
        self._merger = merger
        self._ranges = ranges

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[Tried] | None:
        """Merge a task's leaves."""
        leaves = task.first_leaf, task.stop_leaf
        merged = self._merger.merge(task.file, leaves, self._ranges, self, is_stopped)
        if merged is None:
            return None
        return TaskResult(task, merged, Tried(threading.get_ident(), time.perf_counter()))

    def note(self, leaf: int, anomalies: LeafAnomalies) -> None:
        """Do nothing."""

    def write(self, position: int, data: memoryview) -> None:
        """Do nothing."""


@contextmanager
def _trial_plan(plan: MergePlan) -> Iterator[MergePlan]:
    """Yield a plan of endless segments of the most common kind, all from a file in memory."""
    common = _most_common(plan)
    dtypes, out_dtype = common.dtypes, common.out_dtype
    widths, out_width = [element_nbytes(dtype) for dtype in dtypes], element_nbytes(out_dtype)
    num_elements = max(VECTOR, SOURCE_NBYTES // sum(widths) // VECTOR * VECTOR)
    offsets = [num_elements * sum(widths[:source]) for source in range(len(widths))]
    nbytes = num_elements * sum(widths)
    count = max(1, _PLANNED_NBYTES // nbytes)
    segments = tuple(
        replace(
            common,
            name="trial",
            num_tensors=1,
            coded=None,
            num_elements=num_elements,
            out_offset=number * num_elements * out_width,
            sources=tuple(
                source._replace(source=number, file=0, offset=offset)
                for number, (source, offset) in enumerate(zip(common.sources, offsets, strict=True))
            ),
        )
        for number in range(count)
    )
    shard = OutputShard(
        filename="trial",
        header="",
        file_nbytes=count * num_elements * out_width,
        read_nbytes=count * nbytes,
        tensor_names=(),
        segments=segments,
    )
    descriptor = os.memfd_create("shardmix-trial", os.MFD_CLOEXEC)
    try:
        piece = _ORDINARY * MIB
        for start in range(0, nbytes, MIB):
            os.pwrite(descriptor, piece[: nbytes - start], start)
        path = f"/proc/self/fd/{descriptor}"
        identity = SourceIdentity((SourceFile(path, nbytes),))
        source = PlannedSource("trial", "trial", path, identity)
        yield replace(plan, sources=(source,), shards=(shard,))
    finally:
        os.close(descriptor)


def _most_common(plan: MergePlan) -> Segment:
    """Return a segment of the kind that has the most elements."""
    num_elements: Counter[tuple[object, ...]] = Counter()
    examples: dict[tuple[object, ...], Segment] = {}
    for segment in plan.segments():
        if segment.method != keep_first.NAME:
            kind = segment.method, segment.dtypes, segment.out_dtype, segment.factors
            num_elements[kind] += segment.num_elements
            examples.setdefault(kind, segment)
    return examples[num_elements.most_common(1)[0][0]]
