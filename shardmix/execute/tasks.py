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
from shardmix.system.hashing import LEAF_NBYTES, num_leaves


class Tasks(Sequence[Task]):
    """The tasks of several files, in order. Each is made on access."""

    def __init__(self, file_nbytes: Iterable[int], *, leaves_per_task: int) -> None:
        """Divide files of these sizes. An empty file has one task, which has no leaves."""
        self._num_leaves = [num_leaves(nbytes) for nbytes in file_nbytes]
        self._step = leaves_per_task
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
        first = (number - (self._stops[file - 1] if file else 0)) * self._step
        return Task(file, first, min(first + self._step, self._num_leaves[file]))


def merge_tasks(plan: MergePlan) -> Tasks:
    """Return the tasks of all output files of a merge."""
    return Tasks(
        (shard.file_nbytes for shard in plan.shards), leaves_per_task=leaves_per_task(plan)
    )


def leaves_per_task(plan: MergePlan) -> int:
    """Return the number of leaves of a merge's tasks; the last of a file may have fewer."""
    # A GPU's pipeline runs empty at the end of a task, so a task should last for several chunks.
    num_chunks = 4 if plan.settings.on_cuda else 1
    return max(1, num_chunks * plan.memory.chunk_nbytes // LEAF_NBYTES)


class Chunk(NamedTuple):
    """A flat range of elements of a segment, the same in every source and in the output."""

    segment: Segment
    """The segment."""
    start: int
    """First element within the segment."""
    num_elements: int
    """Number of elements."""
    source_nbytes: int
    """Bytes that are read for it, of all sources."""

    @property
    def out_position(self) -> int:
        """First byte in the output file."""
        return self.segment.out_offset + self.start * element_nbytes(self.segment.out_dtype)


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
        width = element_nbytes(segment.out_dtype)
        start = (position - segment.out_offset) // width
        end = min(segment.num_elements, (stop - segment.out_offset) // width)
        step = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
        source_width = sum(map(element_nbytes, segment.dtypes))
        for first in range(start, end, step):
            length = min(step, end - first)
            yield Chunk(segment, first, length, length * source_width)
        position = segment.out_offset + end * width
        number += 1


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
