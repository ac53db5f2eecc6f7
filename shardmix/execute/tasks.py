"""How an output file's bytes are divided into work: tasks of leaves, and chunks within them.

A task is a range of whole leaves and belongs to one worker, which goes through it in order: so
leaves are hashed as they are written. A chunk is what is in memory at once. Pure: counts, reads
nothing.
"""

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from shardmix.compute.chunk_size import chunk_num_elements
from shardmix.dtypes import element_nbytes
from shardmix.plan.merge_plan import MergePlan, OutputShard, Segment
from shardmix.system.digests import LEAF_NBYTES, is_sequential, num_leaves


@dataclass(frozen=True, slots=True)
class Task:
    """Leaves of one output file, for one worker."""

    shard: int
    """Index into `MergePlan.shards`."""
    first_leaf: int
    """The first of them."""
    stop_leaf: int
    """One past the last."""
    is_last: bool
    """Whether the file ends with it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A flat range of elements of a segment, the same in every source and in the output."""

    segment: Segment
    """What it is part of."""
    start: int
    """Its first element within the segment."""
    num_elements: int
    """Its length."""

    @property
    def out_position(self) -> int:
        """Its first byte in the output file."""
        return self.segment.out_offset + self.start * element_nbytes(self.segment.out_dtype)

    @property
    def source_nbytes(self) -> int:
        """What is read for it, of all sources."""
        return self.num_elements * sum(element_nbytes(dtype) for dtype in self.segment.dtypes)


def tasks(plan: MergePlan, shard: int) -> Iterator[Task]:
    """Yield the work on one output file, in its order."""
    count = num_leaves(plan.shards[shard].file_nbytes)
    step = count if is_sequential(plan.digest_algorithm) else _leaves_per_task(plan)
    for first in range(0, count, step):
        stop = min(first + step, count)
        yield Task(shard, first, stop, is_last=stop == count)


def chunks(
    planned: OutputShard, first_leaf: int, stop_leaf: int, *, chunk_nbytes: int
) -> Iterator[Chunk]:
    """Yield the chunks that make up the data of some leaves, in order."""
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
        for first in range(start, end, step):
            yield Chunk(segment, first, min(step, end - first))
        position = segment.out_offset + end * width
        number += 1


class TensorPlaces:
    """Which tensor of an output file lies where: mostly nobody asks, and then often.

    The header is read at the first question; kept are eight bytes a tensor.
    """

    def __init__(self, planned: OutputShard) -> None:
        self._planned = planned
        self._stops: array[int] | None = None

    def between(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield name, first and past-the-last byte of each tensor's part of a range of the file."""
        stops = self._stops
        if stops is None:  # two threads at once come to the same
            first = self._planned.head_nbytes()
            stops = array("q", (first + stop for _, _, stop in self._planned.tensors()))
            self._stops = stops
        row = bisect.bisect_right(stops, start)
        while start < stop and row < len(stops):
            end = min(stops[row], stop)
            if end > start:  # else it is empty
                yield self._planned.full_name(self._planned.tensor_names[row]), start, end
            start, row = end, row + 1


def _leaves_per_task(plan: MergePlan) -> int:
    # A GPU's pipeline runs empty at the end of a task: it is to last for several chunks.
    num_chunks = 4 if plan.settings.on_cuda else 1
    return max(1, num_chunks * plan.memory.chunk_nbytes // LEAF_NBYTES)
