"""Divides files into tasks, and tasks into chunks.

A task is a range of whole leaves and belongs to one worker, which goes through it in order: so
leaves are hashed while they are written. A chunk is the part in memory at one time. Pure: counts,
reads nothing.
"""

import bisect
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

from shardmix.dtypes import element_nbytes
from shardmix.execute.executor import Task
from shardmix.plan.chunk_size import chunk_num_elements
from shardmix.plan.merge_plan import MergePlan, OutputShard, Segment
from shardmix.system.hashing import LEAF_NBYTES, is_sequential, num_leaves

_LEAST_CODED_LEAVES = 4


class Tasks(Sequence[Task]):
    """The tasks of several files, in order. Each is made on access."""

    def __init__(
        self, file_nbytes: Iterable[int], *, leaves_per_task: int, last: Sequence[int] = ()
    ) -> None:
        """Divide files of these sizes. An empty file has one task, which has no leaves.

        `last` has the number of tasks at each file's beginning that come after all others of it.
        """
        self._num_leaves = [num_leaves(nbytes) for nbytes in file_nbytes]
        self._step = leaves_per_task
        self._last = last
        counts = (max(1, -(-count // leaves_per_task)) for count in self._num_leaves)
        self._stops = list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        file = bisect.bisect_right(self._stops, number)
        begin = self._stops[file - 1] if file else 0
        number -= begin
        if self._last and self._last[file]:
            number = (number + self._last[file]) % (self._stops[file] - begin)
        first = number * self._step
        return Task(file, first, min(first + self._step, self._num_leaves[file]))


def merge_tasks(plan: MergePlan) -> Tasks:
    """Return the tasks of all output files of a merge.

    Those with scales are a file's last, since they follow from tasks with codes; unless the digest
    needs the file from end to end.
    """
    step = leaves_per_task(plan)
    last = [0] * len(plan.shards)
    if plan.quantised is not None and not is_sequential(plan.digest_algorithm):
        last = [-(-num_leaves(shard.scales_stop) // step) for shard in plan.shards]
    return Tasks((shard.file_nbytes for shard in plan.shards), leaves_per_task=step, last=last)


def leaves_per_task(plan: MergePlan) -> int:
    """Return the number of leaves of a merge's tasks; the last of a file may have fewer."""
    # A GPU's pipeline runs empty at the end of a task, so a task should last for several chunks.
    num_chunks = 4 if plan.settings.on_cuda else 1
    # At either end of a task a band of blocks may be merged twice, for the next one as well.
    least = 1 if plan.quantised is None else _LEAST_CODED_LEAVES
    return max(least, num_chunks * plan.memory.chunk_nbytes // LEAF_NBYTES)


class Chunk(NamedTuple):
    """A flat range of elements of a segment, the same in every source and in the output."""

    segment: Segment
    """The segment."""
    start: int
    """First element within the segment."""
    num_elements: int
    """Number of elements."""
    source_nbytes: int
    """Bytes of all sources to count as read for what is written of it."""
    out_start: int
    """First element that is written: the start, unless blocks began before some leaf."""
    out_stop: int
    """One past the last element that is written."""

    @property
    def out_position(self) -> int:
        """First byte in the output file."""
        return self.segment.out_offset + self.out_start * self.segment.out_width

    @property
    def out_nbytes(self) -> int:
        """Bytes in the output file."""
        return (self.out_stop - self.out_start) * self.segment.out_width


def chunks(
    planned: OutputShard, first_leaf: int, stop_leaf: int, *, chunk_nbytes: int
) -> Iterator[Chunk]:
    """Yield the chunks of some leaves' data, in order."""
    position = max(first_leaf * LEAF_NBYTES, planned.data_start)
    stop = min(stop_leaf * LEAF_NBYTES, planned.file_nbytes)
    number = (
        bisect.bisect_right(planned.segments, position, key=lambda segment: segment.out_offset) - 1
    )
    while position < stop:
        segment = planned.segments[number]
        # Data is aligned to its elements, and so are leaves: a boundary never cuts one in two.
        width = segment.out_width
        start = (position - segment.out_offset) // width
        end = min(segment.num_elements, (stop - segment.out_offset) // width)
        source_width = sum(map(element_nbytes, segment.dtypes))
        if segment.coded is None:
            step = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
            for first in range(start, end, step):
                last = min(first + step, end)
                length = last - first
                yield Chunk(segment, first, length, length * source_width, first, last)
        else:
            for part in _coded_ranges(segment, start, end, chunk_nbytes=chunk_nbytes):
                first, last = max(part.start, start), min(part.stop, end)
                yield Chunk(
                    segment, part.start, len(part), (last - first) * source_width, first, last
                )
        position = segment.out_offset + end * width
        number += 1


def _coded_ranges(segment: Segment, start: int, end: int, *, chunk_nbytes: int) -> Iterator[range]:
    """Yield ranges of a coded segment that cover some elements: whole bands, or parts of one."""
    assert segment.coded is not None
    bands = segment.coded.bands
    most = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
    while start < end:
        band = bands.elements(bands.of(start))
        if len(band) > most:
            stop = min(start + most, band.stop, end)
            yield range(start, stop)
        else:
            stop = band.stop
            while stop < end and (more := bands.elements(bands.of(stop)).stop) - band.start <= most:
                stop = more
            yield range(band.start, stop)
        start = stop


class TensorRanges:
    """The byte ranges of an output file's tensors, for anomalies and differences, which are rare.

    The first call reads the header. From then on it holds eight bytes for each tensor.
    """

    def __init__(self, planned: OutputShard) -> None:
        self._planned = planned
        self._stops: array[int] | None = None

    def between(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield name, first and past-the-last byte of each tensor's part of a range of the file."""
        stops = self._stops
        if stops is None:  # two threads at once compute the same
            first = self._planned.head_nbytes()
            stops = array("q", (first + stop for _, _, stop in self._planned.tensors()))
            self._stops = stops
        row = bisect.bisect_right(stops, start)
        while start < stop and row < len(stops):
            end = min(stops[row], stop)
            if end > start:  # otherwise the tensor is empty
                yield self._planned.full_name(self._planned.tensor_names[row]), start, end
            start, row = end, row + 1
