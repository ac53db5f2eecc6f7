"""Merges chunks: from readers through a backend to a pass's target.

The passes that compute a merge's output share this: writing, comparing and calibrating.
"""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

from shardmix.anomalies import AnomalySum, LeafAnomalies
from shardmix.compute.backend import Backend, Combiner, Combiners, load_backend
from shardmix.dtypes import element_nbytes
from shardmix.execute.executor import IsStopped
from shardmix.execute.tasks import Chunk, TensorRanges, chunks
from shardmix.plan.merge_plan import MergePlan, Segment, SegmentSource
from shardmix.sources.identity import SourceFile
from shardmix.sources.readers import ReadCount, Reader, counted_reads, open_reader
from shardmix.system.hashing import LEAF_NBYTES
from shardmix.system.page_cache import PassedRanges
from shardmix.system.timer import NO_CLOCK, OTHER, READ, REDUCE, Clock

if TYPE_CHECKING:
    from shardmix.execute.gather_pass import TensorStatistics, WholeTensors
    from shardmix.execute.quantising import KnownScales, Quantising


class LeafTarget(Protocol):
    """The target of a range of leaves, which come chunk by chunk, in order."""

    def note(self, leaf: int, anomalies: LeafAnomalies) -> None:
        """Add the anomalies in the next chunk's part of a leaf. Most chunks have none."""

    def write(self, position: int, data: memoryview) -> None:
        """Take the next chunk's bytes, which are valid until this returns."""


class Merging:
    """A merge in one process, with the objects that its workers share."""

    def __init__(
        self,
        plan: MergePlan,
        backend: Backend,
        statistics: "Mapping[str, TensorStatistics]",
        passed: PassedRanges | None,
        clock: Clock,
    ) -> None:
        self.plan = plan
        self._statistics = statistics
        self._backend = backend
        self._passed = passed
        self._clock = clock
        self._known_scales: KnownScales | None = None
        if plan.quantised is not None:
            from shardmix.execute import quantising

            self._known_scales = quantising.KnownScales()

    @contextmanager
    def worker(self) -> Iterator["ChunkMerger"]:
        """Yield a merger of chunks for the calling thread, with all its buffers."""
        plan, clock = self.plan, self._clock
        chunk_nbytes = plan.memory.chunk_nbytes
        clock.start()
        try:
            lanes = [
                Combiners(combiner, chunk_nbytes=chunk_nbytes)
                for combiner in self._backend.make_combiners(chunk_nbytes=chunk_nbytes)
            ]
            with (
                counted_reads() as count,
                closing(open_reader(plan.settings.io, plan.files, plan.decoders)) as reader,
            ):
                yield ChunkMerger(
                    plan,
                    lanes,
                    reader,
                    count,
                    self._statistics,
                    self._known_scales,
                    self._passed,
                    clock,
                )
        finally:
            clock.lap(OTHER)


@contextmanager
def merging(
    plan: MergePlan,
    backend: Backend | None,
    clock: Clock = NO_CLOCK,
    *,
    statistics: "Mapping[str, TensorStatistics] | None" = None,
) -> Iterator[Merging]:
    """Surround the merging of a plan in this process; load its backend if that was not done yet.

    `statistics` are those of tensors that are known. Others are gathered when they are needed.
    """
    backend = load_backend(plan) if backend is None else backend
    passed = None
    if not plan.cache_use.keeps_sources:
        passed = PassedRanges([file.path for file in plan.files])
    with backend.running():
        try:
            yield Merging(plan, backend, statistics or {}, passed, clock)
        finally:
            if passed is not None:
                passed.end()


class ChunkMerger:
    """One worker's reader and its part of the backend."""

    def __init__(
        self,
        plan: MergePlan,
        lanes: Sequence[Combiners],
        reader: Reader,
        count: ReadCount,
        statistics: "Mapping[str, TensorStatistics]",
        known_scales: "KnownScales | None",
        passed: PassedRanges | None,
        clock: Clock,
    ) -> None:
        self._plan = plan
        self._quantising: Quantising | None = None
        if known_scales is not None:
            from shardmix.execute import quantising

            self._quantising = quantising.Quantising(plan, known_scales, self._merged)
        self._tensors: WholeTensors | None = None
        if plan.gathering is not None:
            from shardmix.execute import gather_pass

            num_sources = plan.gathering.num_sources
            self._tensors = gather_pass.WholeTensors(
                plan, reader, statistics, num_sources=num_sources
            )
        self._num_files = len(plan.files)
        self._same_files = _same_files(plan)
        self._chunk_nbytes = plan.memory.chunk_nbytes
        self._lanes = lanes
        self._reader = reader
        self._count = count
        self._num_told = self._num_taken = 0
        self._passed = passed
        self._clock = clock

    def merge(
        self,
        shard: int,
        leaves: tuple[int, int],
        ranges: TensorRanges,
        target: LeafTarget,
        is_stopped: IsStopped,
    ) -> int | None:
        """Merge a range of an output file's leaves.

        With several lanes, one chunk is read while others are still being merged.

        Args:
            shard: the file's index in `MergePlan.shards`.
            leaves: the first leaf, and one past the last.
            ranges: byte ranges of the file's tensors.
            target: takes the output.
            is_stopped: called before each chunk.

        Returns:
            the number of source bytes; None if it was stopped before the end.
        """
        if self._quantising is None:
            return self._merge(shard, leaves, ranges, target, is_stopped)
        with self._quantising.at_work(shard, leaves):
            return self._merge(shard, leaves, ranges, target, is_stopped)

    def _merge(
        self,
        shard: int,
        leaves: tuple[int, int],
        ranges: TensorRanges,
        target: LeafTarget,
        is_stopped: IsStopped,
    ) -> int | None:
        num_bytes = 0
        in_flight: deque[tuple[Chunk, Combiner, memoryview]] = deque()
        parts = chunks(self._plan.shards[shard], *leaves, chunk_nbytes=self._chunk_nbytes)
        for chunk, combiners in zip(parts, itertools.cycle(self._lanes)):
            if is_stopped():
                return None
            self._clock.lap(OTHER)
            if self._quantising is not None and self._quantising.is_apart(chunk):
                # It merges other chunks, with the lanes of those in flight.
                while in_flight:
                    num_bytes += self._end(shard, *in_flight.popleft(), ranges, target)
                if chunk.segment.scales_of is not None:
                    for position, data in self._quantising.scales(shard, chunk, is_stopped):
                        target.write(position, data)
                    continue
                self._quantising.find_scales(shard, chunk)
            combiner = combiners[chunk.segment.method]
            in_flight.append((chunk, combiner, self._start(chunk, combiner)))
            if len(in_flight) == len(self._lanes):
                num_bytes += self._end(shard, *in_flight.popleft(), ranges, target)
        while in_flight:
            num_bytes += self._end(shard, *in_flight.popleft(), ranges, target)
        return None if self._quantising is not None and self._quantising.is_cut_off else num_bytes

    def num_bytes_read(self) -> int:
        """Return the number of bytes that were read from sources' files since the last call."""
        before, self._num_taken = self._num_taken, self._count.num_bytes
        return self._num_taken - before

    def source_nbytes(self, shard: int, leaves: tuple[int, int]) -> int:
        """Return the number of source bytes that a range of leaves is merged from."""
        parts = chunks(self._plan.shards[shard], *leaves, chunk_nbytes=self._chunk_nbytes)
        return sum(chunk.source_nbytes for chunk in parts)

    def _start(self, chunk: Chunk, combiner: Combiner) -> memoryview:
        """Read a chunk; on the CPU also merge it. Return the buffer of its output."""
        segment, start = chunk.segment, chunk.start
        reader, clock = self._reader, self._clock
        if self._tensors is not None:
            # On a GPU, which has several lanes, sources leave one by one.
            found = self._tensors.with_factors(chunk, can_hold=len(self._lanes) == 1)
            if found is None:
                return self._start_whole(segment, combiner, self._tensors)
            segment = found
        combiner.begin(segment, start, chunk.num_elements)
        if self._same_files is not None and self._is_read_twice(segment):
            return self._start_shared(segment, start, combiner)
        descriptors = reader.descriptors(segment.files)
        if descriptors is not None and (done := combiner.read(descriptors)) is not None:
            data, seconds = done
            self._count.num_bytes += chunk.source_nbytes
            self._end_reading(seconds=seconds)
            clock.lap(REDUCE, chunk.source_nbytes)
            return data
        for number, source in enumerate(segment.sources):
            position = source.offset + start * element_nbytes(source.dtype)
            staging = combiner.staging(number)
            view = reader.view(source.file, position, staging)
            self._end_reading()
            combiner.add(number, view)
            clock.lap(REDUCE, len(staging))
        data = combiner.finish()
        reader.release()
        clock.lap(REDUCE)
        return data

    def _end_reading(self, *, seconds: float | None = None) -> None:
        before, self._num_told = self._num_told, self._count.num_bytes
        self._clock.lap(READ, self._num_told - before, seconds=seconds)

    def _is_read_twice(self, segment: Segment) -> bool:
        """Return True if two sources have the same bytes of one file."""
        return len(set(map(self._place, segment.sources))) < len(segment.sources)

    def _place(self, source: SegmentSource) -> tuple[int, int]:
        file = source.file if self._same_files is None else self._same_files.get(source.file)
        return source.file if file is None else file, source.offset

    def _start_shared(self, segment: Segment, start: int, combiner: Combiner) -> memoryview:
        """Read a chunk of which several sources have the same bytes, these only once."""
        reader, clock = self._reader, self._clock
        views: dict[tuple[int, int], memoryview] = {}
        for number, source in enumerate(segment.sources):
            place = self._place(source)
            if place not in views:
                position = source.offset + start * element_nbytes(source.dtype)
                views[place] = reader.view(source.file, position, combiner.staging(number))
            self._end_reading()
            combiner.add(number, views[place])
            clock.lap(REDUCE, len(views[place]))
        data = combiner.finish()
        views.clear()
        reader.release()
        clock.lap(REDUCE)
        return data

    def _start_whole(
        self, segment: Segment, combiner: Combiner, tensors: "WholeTensors"
    ) -> memoryview:
        """Read a whole tensor, gather its statistics, and merge it."""
        reader, clock = self._reader, self._clock
        combiner.begin(segment.with_placeholders(), 0, segment.num_elements)
        views = []
        for number, source in enumerate(segment.sources):
            views.append(reader.view(source.file, source.offset, combiner.staging(number)))
            self._end_reading()
        # The parts of the buffer lie as they did, so what was read stays where it is.
        combiner.begin(tensors.of_held(segment, views), 0, segment.num_elements)
        for number, view in enumerate(views):
            combiner.add(number, view)
        data = combiner.finish()
        clock.lap(REDUCE, sum(map(len, views)))
        views.clear()
        reader.release()
        return data

    def _merged(self, segment: Segment, start: int, num_elements: int) -> tuple[memoryview, bool]:
        """Merge elements that are not written; return their bytes, and True if all are finite."""
        chunk = Chunk(segment, start, num_elements, 0, start, start)
        combiner = self._lanes[0][segment.method]
        data = self._start(chunk, combiner)
        combiner.wait()
        if self._passed is not None:
            self._pass(chunk, self._passed)
        return data, combiner.is_finite

    def _end(
        self,
        shard: int,
        chunk: Chunk,
        combiner: Combiner,
        data: memoryview,
        ranges: TensorRanges,
        target: LeafTarget,
    ) -> int:
        """Wait for a chunk's output, and pass it on; return the number of its source bytes."""
        combiner.wait()
        if combiner.disagreeing or not combiner.is_finite:
            for leaf, anomalies in _anomalies(chunk, combiner, ranges):
                target.note(leaf, anomalies)
        if chunk.segment.coded is not None and self._quantising is not None:
            data = self._quantising.codes(shard, chunk, data, is_finite=combiner.is_finite)
        self._clock.lap(REDUCE)
        target.write(chunk.out_position, data)
        if self._passed is not None:
            self._pass(chunk, self._passed)
        return chunk.source_nbytes

    def _pass(self, chunk: Chunk, passed: PassedRanges) -> None:
        """Let a chunk's source ranges leave the page cache."""
        segment, start, stop = chunk.segment, chunk.start, chunk.start + chunk.num_elements
        for source in segment.sources:
            width, offset = element_nbytes(source.dtype), source.offset
            if source.file < self._num_files:  # otherwise it was decoded
                passed.add(source.file, offset + start * width, offset + stop * width)


def _anomalies(
    chunk: Chunk, combiner: Combiner, ranges: TensorRanges
) -> Iterator[tuple[int, LeafAnomalies]]:
    """Yield each leaf of the chunk just finished, and its anomalies."""
    width = chunk.segment.out_width
    first = chunk.out_position
    stop = first + chunk.out_nbytes
    skipped = chunk.out_start - chunk.start
    for leaf in range(first // LEAF_NBYTES, -(-stop // LEAF_NBYTES)):
        start_in_leaf = max(first, leaf * LEAF_NBYTES)
        stop_in_leaf = min(stop, (leaf + 1) * LEAF_NBYTES)
        found = AnomalySum()
        if combiner.disagreeing:
            models = (
                chunk.segment.sources[source].source for source in sorted(combiner.disagreeing)
            )
            found.add(LeafAnomalies(disagreeing={chunk.segment.name: tuple(models)}))
        if not combiner.is_finite:
            for name, start, end in ranges.between(start_in_leaf, stop_in_leaf):
                part = [(position - first) // width + skipped for position in (start, end)]
                found.count(name, combiner.count_nonfinite(*part))
        yield leaf, found.total()


def _same_files(plan: MergePlan) -> dict[int, int] | None:
    """Return number of a file → number of the first one that is the same file.

    Several models on one base have its files. None if there are none, or if sources go to a GPU,
    where each needs a buffer of its own.
    """
    if plan.settings.on_cuda:
        return None
    firsts: dict[SourceFile, int] = {}
    numbers = {number: firsts.setdefault(file, number) for number, file in enumerate(plan.files)}
    same = {number: first for number, first in numbers.items() if number != first}
    return same or None
