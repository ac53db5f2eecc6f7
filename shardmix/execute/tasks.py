"""How an output file's bytes are divided into work: blocks of leaves, and strips within them.

A block is a range of whole leaves and belongs to one worker, which goes through it in order: so
leaves are hashed as they are written. A strip is what is in memory at once. Pure: counts, reads
nothing.
"""

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from shardmix.compute.chunk_size import strip_num_elements
from shardmix.formats.safetensors_layout import element_nbytes
from shardmix.plan.merge_plan import MergePlan, OutputShard, Run
from shardmix.system.digests import LEAF_NBYTES, is_sequential, num_leaves


@dataclass(frozen=True, slots=True)
class Block:
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
class Strip:
    """A flat range of elements of a run, the same in every source and in the output."""

    run: Run
    """What it is part of."""
    start: int
    """Its first element within the run."""
    num_elements: int
    """Its length."""

    @property
    def out_position(self) -> int:
        """Its first byte in the output file."""
        return self.run.out_offset + self.start * element_nbytes(self.run.out_dtype)

    @property
    def source_nbytes(self) -> int:
        """What is read for it, of all sources."""
        return self.num_elements * sum(element_nbytes(dtype) for dtype in self.run.dtypes)


def blocks(plan: MergePlan, shard: int) -> Iterator[Block]:
    """Yield the work on one output file, in its order."""
    count = num_leaves(plan.shards[shard].file_nbytes)
    step = count if is_sequential(plan.digest_algorithm) else _leaves_per_block(plan)
    for first in range(0, count, step):
        stop = min(first + step, count)
        yield Block(shard, first, stop, is_last=stop == count)


def strips(
    planned: OutputShard, first_leaf: int, stop_leaf: int, *, strip_nbytes: int
) -> Iterator[Strip]:
    """Yield the strips that make up the data of some leaves, in order."""
    position = max(first_leaf * LEAF_NBYTES, planned.data_start)
    stop = min(stop_leaf * LEAF_NBYTES, planned.file_nbytes)
    number = bisect.bisect_right(planned.runs, position, key=lambda run: run.out_offset) - 1
    while position < stop:
        run = planned.runs[number]
        # Data is aligned to its elements, and so are leaves: a boundary never cuts one in two.
        width = element_nbytes(run.out_dtype)
        start = (position - run.out_offset) // width
        end = min(run.num_elements, (stop - run.out_offset) // width)
        step = strip_num_elements(run, strip_nbytes=strip_nbytes)
        for first in range(start, end, step):
            yield Strip(run, first, min(step, end - first))
        position = run.out_offset + end * width
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


def _leaves_per_block(plan: MergePlan) -> int:
    # A GPU's pipeline runs empty at the end of a block: it is to last for several strips.
    num_strips = 4 if plan.settings.on_cuda else 1
    return max(1, num_strips * plan.memory.strip_nbytes // LEAF_NBYTES)
