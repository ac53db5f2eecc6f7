"""Merged values to codes and scales: what a worker does with chunks of a quantised output.

A chunk holds whole bands of blocks, so their scales follow from it, and its part of the leaves is
written as codes. A band that is larger than a chunk is merged twice: for its scales, and for its
codes. Scales are kept for the tasks that write them, which are the last of a file. If they are not
known there, since an earlier merge wrote the codes or too many are kept, they are found again: each
leaf of a file follows from the sources only, so that claims, resuming and comparing need to know
nothing of codes.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardmix.conventions.output_quantisations import OUTPUT_QUANTISATIONS
from shardmix.execute.executor import IsStopped
from shardmix.execute.tasks import Chunk
from shardmix.formats.output_coding import Quantiser
from shardmix.formats.small_floats import Floats
from shardmix.options import LLVM
from shardmix.plan.chunk_size import chunk_num_elements
from shardmix.plan.memory_budget import (
    KNOWN_SCALES_NBYTES,
    SCALES_AT_ONCE_NBYTES,
    TENSOR_SCALES_NBYTES,
)
from shardmix.plan.merge_plan import MergePlan, Segment
from shardmix.system.hashing import LEAF_NBYTES

_WAIT_SECONDS = 0.002

MergeElements = Callable[[Segment, int, int], tuple[memoryview, bool]]
"""Merges elements from a first one on; returns float32, and True if all are finite."""


class _Scales(NamedTuple):
    """The scales of a tensor, as far as they are known."""

    values: Floats
    """Bands × scales."""
    are_known: npt.NDArray[np.bool_]
    """For each band, True if its scales are known and not written yet."""

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.are_known.nbytes + TENSOR_SCALES_NBYTES


class KnownScales:
    """Scales of bands that are found and not written yet, for all workers of a process."""

    def __init__(self, *, most_nbytes: int = KNOWN_SCALES_NBYTES) -> None:
        self._most_nbytes = most_nbytes
        self._nbytes = 0
        self._lock = threading.Lock()
        self._tensors: dict[tuple[int, int], _Scales] = {}
        """(File, offset of the codes) → scales."""
        self._at_work: dict[object, tuple[int, int, int]] = {}
        """Worker → file, and the range of it that it is writing."""

    @contextmanager
    def writing(self, worker: object, shard: int, start: int, stop: int) -> Iterator[None]:
        """Surround the work of a worker on a range of a file."""
        with self._lock:
            self._at_work[worker] = shard, start, stop
        try:
            yield
        finally:
            with self._lock:
                del self._at_work[worker]

    def are_to_come(self, worker: object, shard: int, segment: Segment, band: int) -> bool:
        """Tell whether another worker is about to find a band's scales."""
        assert segment.coded is not None
        its = segment.coded.bands.elements(band)
        first, last = segment.out_offset + its.start, segment.out_offset + its.stop - 1
        with self._lock:
            others = [where for who, where in self._at_work.items() if who is not worker]
        return any(of == shard and start <= last and first < stop for of, start, stop in others)

    def put(self, shard: int, segment: Segment, band: int, scales: Floats) -> None:
        """Keep a band's scales; those of the oldest tensors give way."""
        assert segment.coded is not None
        key = shard, segment.out_offset
        with self._lock:
            found = self._tensors.get(key)
            if found is None:
                num_bands = segment.coded.bands.num_bands
                found = _Scales(
                    np.empty((num_bands, len(scales)), np.float32), np.zeros(num_bands, np.bool_)
                )
                while self._tensors and self._nbytes + found.nbytes > self._most_nbytes:
                    self._remove(next(iter(self._tensors)))
                if self._nbytes + found.nbytes > self._most_nbytes:
                    return
                self._tensors[key] = found
                self._nbytes += found.nbytes
            found.values[band] = scales
            found.are_known[band] = True

    def get(self, shard: int, segment: Segment, band: int) -> Floats | None:
        """Return a band's scales, or None if they are not kept."""
        found = self._tensors.get((shard, segment.out_offset))
        if found is None or not found.are_known[band]:
            return None
        values: Floats = found.values[band]
        return values

    def forget(self, shard: int, segment: Segment, band: int) -> None:
        """Remove scales that are written."""
        key = shard, segment.out_offset
        with self._lock:
            found = self._tensors.get(key)
            if found is not None:
                found.are_known[band] = False
                if not found.are_known.any():
                    self._remove(key)

    def _remove(self, key: tuple[int, int]) -> None:
        self._nbytes -= self._tensors.pop(key).nbytes


class Quantising:
    """One worker's part."""

    def __init__(self, plan: MergePlan, known: KnownScales, merge: MergeElements) -> None:
        assert plan.quantised is not None
        self._plan = plan
        self._known = known
        self._merge = merge
        self._coding = OUTPUT_QUANTISATIONS[plan.quantised.quantisation].coding
        is_compiled = plan.settings.backend == LLVM
        self._quantiser = Quantiser(self._coding, is_compiled=is_compiled)
        self._last: tuple[tuple[str, int], Floats] | None = None
        """The band whose scales were found last, and these."""
        self.is_cut_off = False
        """True if scales are missing, since the merge was stopped."""

    @contextmanager
    def at_work(self, shard: int, leaves: tuple[int, int]) -> Iterator[None]:
        """Surround the merging of a range of an output file's leaves."""
        self.is_cut_off = False
        start, stop = (leaf * LEAF_NBYTES for leaf in leaves)
        with self._known.writing(self, shard, start, stop):
            yield

    def is_apart(self, chunk: Chunk) -> bool:
        """Tell whether other elements must be merged first: for scales, and for large bands."""
        return chunk.segment.scales_of is not None or self._is_part(chunk)

    def _is_part(self, chunk: Chunk) -> bool:
        """Tell whether a chunk is less than a band."""
        coded = chunk.segment.coded
        if coded is None:
            return False
        return chunk.num_elements < len(coded.bands.elements(coded.bands.of(chunk.start)))

    def find_scales(self, shard: int, chunk: Chunk) -> None:
        """Find the scales of the band that a chunk is a part of; `codes` needs them."""
        assert chunk.segment.coded is not None
        self._scales(shard, chunk.segment, chunk.segment.coded.bands.of(chunk.start))

    def codes(self, shard: int, chunk: Chunk, data: memoryview, *, is_finite: bool) -> memoryview:
        """Return the codes to write of a chunk, in the memory of its merged values."""
        segment = chunk.segment
        assert segment.coded is not None
        bands = segment.coded.bands
        values, codes = np.frombuffer(data, np.float32), np.frombuffer(data, np.uint8)
        position, stop = chunk.start, chunk.start + chunk.num_elements
        is_part = self._is_part(chunk)
        while position < stop:
            band = bands.of(position)
            end = min(bands.elements(band).stop, stop)
            its = slice(position - chunk.start, end - chunk.start)
            if is_part:
                scales = self._scales(shard, segment, band)
            else:
                largest = np.zeros(bands.num_scales, np.float32)
                self._quantiser.find_largest(
                    bands, position, values[its], largest, is_finite=is_finite
                )
                scales = self._coding.scales(largest)
                self._known.put(shard, segment, band, scales)
            # A code lies before the values that are still to come: it has a quarter of their size.
            self._quantiser.encode(bands, position, values[its], scales, codes[its])
            position = end
        return data.cast("B")[chunk.out_start - chunk.start : chunk.out_stop - chunk.start]

    def scales(
        self, shard: int, chunk: Chunk, is_stopped: IsStopped
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield positions in the file, and the bytes of a chunk of scales from there on.

        Ends early if the merge is stopped. Waits for scales that another worker is about to find.
        """
        number = chunk.segment.scales_of
        assert number is not None
        segment = self._plan.shards[shard].segments[number]
        assert segment.coded is not None
        num_scales = segment.coded.bands.num_scales
        position, first, held = chunk.out_position, chunk.out_start, []
        num_held = 0
        while first < chunk.out_stop:
            band, skipped = divmod(first, num_scales)
            while (
                self._known.get(shard, segment, band) is None
                and self._known.are_to_come(self, shard, segment, band)
                and not is_stopped()
            ):
                # It waits only for workers further on in the file, where codes are: no circle.
                time.sleep(_WAIT_SECONDS)
            if is_stopped():
                self.is_cut_off = True
                return
            scales = self._scales(shard, segment, band)
            part = scales[skipped : skipped + chunk.out_stop - first]
            if skipped + len(part) == num_scales:
                self._known.forget(shard, segment, band)
            held.append(part)
            num_held += len(part)
            first += len(part)
            if num_held * 4 >= SCALES_AT_ONCE_NBYTES or first == chunk.out_stop:
                data = np.concatenate(held).data.cast("B")
                yield position, data
                position += len(data)
                held, num_held = [], 0

    def _scales(self, shard: int, segment: Segment, band: int) -> Floats:
        """Return a band's scales: known ones, or found by merging the band."""
        assert segment.coded is not None
        if self._last is not None and self._last[0] == (segment.name, band):
            return self._last[1]
        scales = self._known.get(shard, segment, band)
        if scales is None:
            bands = segment.coded.bands
            elements = bands.elements(band)
            largest = np.zeros(bands.num_scales, np.float32)
            step = chunk_num_elements(segment, chunk_nbytes=self._plan.memory.chunk_nbytes)
            for first in elements[::step]:
                length = min(step, elements.stop - first)
                data, is_finite = self._merge(segment, first, length)
                self._quantiser.find_largest(
                    bands, first, np.frombuffer(data, np.float32), largest, is_finite=is_finite
                )
            scales = self._coding.scales(largest)
            self._known.put(shard, segment, band, scales)
        self._last = (segment.name, band), scales
        return scales
