"""Finds which of two devices reduces the faster: for a moment, each does what the merge is made of.

The merge's own workers, readers and reducers, on its most common kind of segment. They read a
file in memory, over and over, as a merge reads from the page cache; what they would write is
dropped, since that takes the same on either. Knows no device by name: it takes what it is given.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from shardmix.anomalies import LeafAnomalies
from shardmix.compute.backend import Backend
from shardmix.compute.chunk_size import VECTOR
from shardmix.dtypes import element_nbytes
from shardmix.errors import DeviceError, one_line
from shardmix.execute.executor import run_tasks
from shardmix.execute.task_queue import Work
from shardmix.methods import keep_first
from shardmix.plan.merge_plan import (
    MergePlan,
    OutputShard,
    PlannedSource,
    Segment,
    SegmentSource,
)
from shardmix.sources.identity import SourceFile, SourceIdentity
from shardmix.system.digests import XXH3
from shardmix.system.units import MIB

TRIAL_SECONDS = 0.5
"""How long one device is tried, from when all workers are at it."""
SOURCE_NBYTES = 256 * MIB
"""The file that is read: larger than most caches. It is no part of the process's resident set."""

# More than any machine reads in that time.
_PLANNED_NBYTES = 1000 * 10**9
# Bytes of which numbers of every dtype are neither NaN, infinite nor subnormal.
_ORDINARY = b"\x3c"

Candidate = tuple[MergePlan, Backend]
"""A merge on one device: its plan, with its memory, and its backend, loaded."""


def faster(
    on_cpu: Candidate,
    on_gpu: Candidate,
    *,
    measure: "Callable[[MergePlan, Backend], float] | None" = None,
) -> tuple[Candidate, str]:
    """Return the candidate that reduces more source bytes a second, and a note that says so.

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
    """Return how many bytes of sources the plan's workers reduce in a second."""
    with _trial_plan(plan) as trial:
        meter = _Meter(num_workers=trial.memory.workers)
        work = Work(trial, lambda number: meter)
        meter.stop = work.stop
        run_tasks(trial, backend, work)
        return meter.out_bytes_per_second() * trial.read_nbytes / trial.write_nbytes


@contextmanager
def _trial_plan(plan: MergePlan) -> Iterator[MergePlan]:
    """Give a plan of endless segments of the most common kind, all from a file in memory."""
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
            num_elements=num_elements,
            out_offset=number * num_elements * out_width,
            sources=tuple(
                SegmentSource(source, dtype, 0, offset)
                for source, (dtype, offset) in enumerate(zip(dtypes, offsets, strict=True))
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
        source = PlannedSource("trial", "trial", path, identity, weight=1.0)
        # Within a file that is hashed from end to end there would be work for one worker alone.
        yield replace(plan, sources=(source,), shards=(shard,), digest_algorithm=XXH3)
    finally:
        os.close(descriptor)


def _most_common(plan: MergePlan) -> Segment:
    """Return a segment of the kind that most of what is merged is of."""
    num_elements: Counter[tuple[object, ...]] = Counter()
    examples: dict[tuple[object, ...], Segment] = {}
    for segment in plan.segments():
        if segment.method != keep_first.NAME:
            kind = segment.method, segment.dtypes, segment.out_dtype, segment.factors
            num_elements[kind] += segment.num_elements
            examples.setdefault(kind, segment)
    return examples[num_elements.most_common(1)[0][0]]


class _Meter:
    """In the place of an output file: counts bytes, once every worker has brought some."""

    def __init__(self, *, num_workers: int) -> None:
        self.stop: Callable[[], None]
        """Called when it has seen enough."""
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._seen: set[int] = set()
        self._started = self._last = 0.0
        self._nbytes = 0

    def write(self, position: int, data: memoryview) -> None:
        """Count the next chunk's bytes."""
        with self._lock:
            self._last = time.perf_counter()
            if len(self._seen) < self._num_workers:
                self._seen.add(threading.get_ident())
                self._started = self._last
                return
            self._nbytes += len(data)
        if self._last - self._started > TRIAL_SECONDS:
            self.stop()

    def out_bytes_per_second(self) -> float:
        """Return what was counted, by the time that it took."""
        return self._nbytes / max(self._last - self._started, 1e-9)

    def reused(self, leaf: int, buffer: memoryview) -> LeafAnomalies | None:
        """Return None: nothing is there already."""
        return None

    def next_claimed(self, leaf: int, stop_leaf: int) -> int:
        """Return the end: nothing is there already."""
        return stop_leaf

    def begin(self, first_leaf: int, stop_leaf: int) -> "_Meter":
        """Start a range of leaves."""
        return self

    def note(self, leaf: int, findings: LeafAnomalies) -> None:
        """Do nothing."""

    def finish(self) -> str:
        """Return no digest."""
        return ""

    def close(self) -> None:
        """Do nothing."""
