"""The pass that gathers statistics of whole tensors, before anything of them is merged.

A task is a group of pieces of one tensor. The caller totals a tensor's groups by index, so that the
result does not depend on workers or their order. Tensors that fit into one chunk are left to the
merging pass: it reads them anyway, so they are read only once.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import element_nbytes
from shardmix.execute.executor import IsStopped, Job, Task, TaskResult
from shardmix.execute.jobs import run_job
from shardmix.execute.progress import OnProgress
from shardmix.execute.tasks import Chunk, leaves_per_task
from shardmix.formats.stored_floats import stored, widened
from shardmix.methods.registry import merge_method
from shardmix.methods.statistics import (
    GROUP_NUM_ELEMENTS,
    PIECE_NUM_ELEMENTS,
    Partial,
    gathered,
    num_groups,
)
from shardmix.plan.chunk_size import chunk_num_elements
from shardmix.plan.merge_plan import MergePlan, Segment
from shardmix.sources.readers import ReadCount, Reader, counted_reads, open_reader
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.hashing import LEAF_NBYTES

Values = npt.NDArray[np.float64]

TensorStatistics = tuple[Partial, ...]
"""A tensor's statistics, one for each that its method needs."""


class KnownStatistics(Protocol):
    """Statistics by tensor, such as those of a journal."""

    @property
    def statistics(self) -> dict[str, TensorStatistics]:
        """Name of a segment → its tensor's statistics; those added join them."""

    def add_statistics(self, name: str, found: TensorStatistics) -> None:
        """Add a tensor's statistics."""


class Unkept:
    """Statistics in memory only, since no later merge needs them."""

    def __init__(self) -> None:
        self.statistics: dict[str, TensorStatistics] = {}

    def add_statistics(self, name: str, found: TensorStatistics) -> None:
        """Add a tensor's statistics."""
        self.statistics[name] = found


def with_factors(plan: MergePlan, segment: Segment, found: TensorStatistics) -> Segment:
    """Return a segment with the factors that its tensor's statistics give."""
    method, params = merge_method(segment.method), plan.parameters[segment.parameters]
    has_base = method.needs(params).base_model
    models = [source.source - has_base for source in segment.sources[has_base:]]
    return replace(segment, factors=method.factors(params, models, found))


class Gather:
    """Gathers statistics of some segments' tensors, each from all of its sources."""

    def __init__(self, plan: MergePlan, segments: Sequence[Segment]) -> None:
        self._plan = plan
        self._segments = segments

    @contextmanager
    def opened(self) -> Iterator["Gather"]:
        """Return itself: workers share nothing."""
        yield self

    @contextmanager
    def worker(self) -> Iterator["_Gatherer"]:
        """Make a worker with a reader of its own."""
        widest = max(len(segment.sources) for segment in self._segments)
        plan = self._plan
        with (
            counted_reads() as count,
            closing(open_reader(plan.settings.io, plan.files, plan.decoders)) as reader,
        ):
            pieces = PieceReader(plan, reader, num_sources=widest)
            yield _Gatherer(self._segments, pieces, count)


class _Gatherer:
    """One worker."""

    def __init__(
        self, segments: Sequence[Segment], pieces: "PieceReader", count: ReadCount
    ) -> None:
        self._segments = segments
        self._pieces = pieces
        self._count = count

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[TensorStatistics] | None:
        """Gather from one group of pieces."""
        if is_stopped():
            return None
        segment = self._segments[task.file]
        group = _group(segment, task.first_leaf)
        num_bytes = len(group) * sum(map(element_nbytes, segment.dtypes))
        found = self._pieces.group(segment, task.first_leaf)
        num_read, self._count.num_bytes = self._count.num_bytes, 0
        return TaskResult(task, num_bytes, found, num_bytes_read=num_read)


class PieceReader:
    """Reads a tensor's values piece by piece from all of its sources, as float64."""

    def __init__(self, plan: MergePlan, reader: Reader, *, num_sources: int) -> None:
        self._plan = plan
        self._reader = reader
        nbytes = PIECE_NUM_ELEMENTS * element_nbytes("F64")
        self._buffers = [buffer_for_reading(nbytes) for _ in range(num_sources)]

    def whole(self, segment: Segment) -> TensorStatistics:
        """Read a whole tensor, and return its statistics."""
        groups = [self.group(segment, number) for number in range(num_groups(segment.num_elements))]
        return totalled(self._plan, segment, groups)

    def group(self, segment: Segment, number: int) -> TensorStatistics:
        """Read one group of elements, and return its statistics."""
        needed = self._plan.needed_statistics(segment)
        return tuple(gathered(needed, self._read(segment, number)))

    def _read(self, segment: Segment, number: int) -> Iterator[list[Values]]:
        for first, last in _pieces(segment, number):
            length = last - first
            values = []
            for source, buffer in zip(segment.sources, self._buffers, strict=False):
                width = element_nbytes(source.dtype)
                position = source.offset + first * width
                raw = self._reader.view(source.file, position, buffer[: length * width])
                values.append(_wide(raw, source.dtype))
            self._reader.release()
            yield values


class WholeTensors:
    """One worker's statistics of the tensors that it merges: looked up, or gathered."""

    def __init__(
        self,
        plan: MergePlan,
        reader: Reader,
        known: Mapping[str, TensorStatistics],
        *,
        num_sources: int,
    ) -> None:
        self._plan = plan
        self._known = known
        self._pieces = PieceReader(plan, reader, num_sources=num_sources)
        self._last: Segment | None = None

    def with_factors(self, chunk: Chunk, *, can_hold: bool) -> Segment | None:
        """Return a chunk's segment with the factors that follow from statistics of its tensor.

        Returns None if the statistics are not known, the chunk is the whole tensor, and the caller
        can hold it (`can_hold`): then `of_held` gathers from it, and nothing is read twice.
        """
        segment = chunk.segment
        if not self._plan.needed_statistics(segment):
            return segment
        if self._last is not None and self._last.name == segment.name:
            return self._last
        found = self._known.get(segment.name)
        if found is None:
            if can_hold and chunk.num_elements == segment.num_elements:
                return None
            # An earlier merge was cut off within the tensor; or its sources go to a GPU one by one.
            found = self._pieces.whole(segment)
        self._last = with_factors(self._plan, segment, found)
        return self._last

    def of_held(self, segment: Segment, raw: Sequence[memoryview]) -> Segment:
        """Return a segment with its factors; `raw` are all bytes of every source."""
        return with_factors(self._plan, segment, whole_statistics(self._plan, segment, raw))


def tensors_to_gather(plan: MergePlan, known: KnownStatistics) -> list[Segment]:
    """Return the segments whose statistics must be gathered before the merging pass."""
    return [
        segment
        for segment in plan.segments()
        if plan.needed_statistics(segment)
        and segment.name not in known.statistics
        and not _is_read_whole(plan, segment)
    ]


def _is_read_whole(plan: MergePlan, segment: Segment) -> bool:
    """Return True if the merging pass has all of a segment in memory at once."""
    if plan.settings.on_cuda:  # it takes sources one by one
        return False
    if segment.num_elements > chunk_num_elements(segment, chunk_nbytes=plan.memory.chunk_nbytes):
        return False
    task_nbytes = leaves_per_task(plan) * LEAF_NBYTES
    stop = segment.out_offset + segment.num_elements * segment.out_width
    return segment.out_offset // task_nbytes == (stop - 1) // task_nbytes


def gather_job(plan: MergePlan, segments: Sequence[Segment]) -> Job[TensorStatistics]:
    """Return the job that gathers statistics of segments' tensors."""
    return Job(Gather(plan, segments), num_workers=plan.memory.workers)


def gather_tasks(segments: Sequence[Segment]) -> list[Task]:
    """Return that job's tasks. A task's file is a segment's number, its leaves are groups."""
    return [
        Task(number, group, group + 1)
        for number, segment in enumerate(segments)
        for group in range(num_groups(segment.num_elements))
    ]


class Totals:
    """Totals the groups of each tensor. Complete tensors are added to the known statistics."""

    def __init__(
        self, plan: MergePlan, segments: Sequence[Segment], known: KnownStatistics
    ) -> None:
        self._plan = plan
        self._segments = segments
        self._known = known
        self._groups: dict[int, dict[int, TensorStatistics]] = {}

    def take(self, result: TaskResult[TensorStatistics]) -> None:
        """Add one task's result."""
        number = result.task.file
        groups = self._groups.setdefault(number, {})
        groups[result.task.first_leaf] = result.value
        segment = self._segments[number]
        if len(groups) == num_groups(segment.num_elements):
            del self._groups[number]
            ordered = [groups[group] for group in sorted(groups)]
            self._known.add_statistics(segment.name, totalled(self._plan, segment, ordered))


def _group(segment: Segment, number: int) -> range:
    """Return the elements of a group."""
    start = number * GROUP_NUM_ELEMENTS
    return range(start, min(start + GROUP_NUM_ELEMENTS, segment.num_elements))


def _pieces(segment: Segment, group: int) -> Iterator[tuple[int, int]]:
    """Yield the first element of each piece of a group, and one past the last."""
    elements = _group(segment, group)
    for first in elements[::PIECE_NUM_ELEMENTS]:
        yield first, min(first + PIECE_NUM_ELEMENTS, elements.stop)


def _wide(raw: memoryview, dtype: str) -> Values:
    """Return stored floats as float64, exactly."""
    return np.asarray(widened(stored(raw, dtype), dtype, np.float64), np.float64)


def totalled(
    plan: MergePlan, segment: Segment, groups: Sequence[TensorStatistics]
) -> TensorStatistics:
    """Return a tensor's statistics from those of its groups, in order."""
    return tuple(
        statistic.total([group[number] for group in groups])
        for number, statistic in enumerate(plan.needed_statistics(segment))
    )


def whole_statistics(
    plan: MergePlan, segment: Segment, raw: Sequence[memoryview]
) -> TensorStatistics:
    """Return the statistics of a tensor that is in memory. `raw` are all bytes of each source."""
    needed = plan.needed_statistics(segment)

    def values(number: int) -> Iterator[list[Values]]:
        for first, last in _pieces(segment, number):
            yield [
                _wide(view[first * width : last * width], dtype)
                for view, dtype, width in zip(raw, segment.dtypes, widths, strict=True)
            ]

    widths = [element_nbytes(dtype) for dtype in segment.dtypes]
    groups = [tuple(gathered(needed, values(n))) for n in range(num_groups(segment.num_elements))]
    return totalled(plan, segment, groups)


def gather_statistics(
    plan: MergePlan,
    known: KnownStatistics,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> int:
    """Gather the statistics that large tensors of a plan need and that are not known yet.

    Returns the number of bytes that were read from sources' files.
    """
    segments = tensors_to_gather(plan, known)
    if not segments:
        return 0
    totals, num_bytes_read = Totals(plan, segments, known), 0

    def take(result: TaskResult[TensorStatistics]) -> None:
        nonlocal num_bytes_read
        num_bytes_read += result.num_bytes_read
        totals.take(result)

    run_job(
        gather_job(plan, segments),
        gather_tasks(segments),
        take,
        num_bytes=sum(
            segment.num_elements * sum(map(element_nbytes, segment.dtypes)) for segment in segments
        ),
        num_files=len(segments),
        on_progress=on_progress,
        cancel=cancel,
    )
    return num_bytes_read
