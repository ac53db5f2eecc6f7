"""What each worker of a merge does: strips from readers through reducers to output."""

import itertools
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import closing

from shardmix.compute.backend import Backend, Reducer, Reducers
from shardmix.execute.anomaly_places import strip_findings
from shardmix.execute.task_queue import LeafTarget, ShardInWork, Work
from shardmix.execute.tasks import Block, Strip, strips
from shardmix.formats.safetensors_layout import element_nbytes
from shardmix.plan.merge_plan import MergePlan
from shardmix.sources.readers import Reader, open_reader
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.digests import READ_NBYTES
from shardmix.system.timer import OTHER, READ, REDUCE, Clock


def work_through(plan: MergePlan, backend: Backend, work: Work, clock: Clock) -> None:
    """Do one worker's part; whatever goes wrong goes to `work`."""
    clock.start()
    try:
        _merge_blocks(plan, backend, work, clock)
    except BaseException as error:
        # The error outlives the merge; the buffers that its frames hold must not.
        traceback.clear_frames(error.__traceback__)
        work.stop(error)
    finally:
        clock.lap(OTHER)


def _merge_blocks(plan: MergePlan, backend: Backend, work: Work, clock: Clock) -> None:
    """Merge block after block until there is none left."""
    strip_nbytes = plan.memory.strip_nbytes
    lanes = [
        Reducers(reducer, strip_nbytes=strip_nbytes)
        for reducer in backend.make_reducers(strip_nbytes=strip_nbytes)
    ]
    buffer = buffer_for_reading(READ_NBYTES)
    with closing(open_reader(plan.settings.io, plan.files)) as reader:
        shard = None
        while (handed_out := work.next_block(shard)) is not None:
            shard, block = handed_out
            if _merge_block(plan, work, shard, block, reader, lanes, buffer, clock):
                work.block_done(shard)


def _merge_block(
    plan: MergePlan,
    work: Work,
    shard: ShardInWork,
    block: Block,
    reader: Reader,
    lanes: Sequence[Reducers],
    buffer: memoryview,
    clock: Clock,
) -> bool:
    """Merge what is not there yet of a block; return whether it was not stopped before its end.

    With several lanes, one strip is read while others are still being summed.
    """
    planned, strip_nbytes = plan.shards[block.shard], plan.memory.strip_nbytes
    target = shard.target
    leaf = block.first_leaf
    while leaf < block.stop_leaf:
        if work.is_stopped:
            return False
        findings = target.kept(leaf, buffer)
        if findings is not None:
            for strip in strips(planned, leaf, leaf + 1, strip_nbytes=strip_nbytes):
                work.count(strip.source_nbytes, kept=True)
            work.found(findings)
            leaf += 1
            continue
        first, leaf = leaf, target.next_claimed(leaf + 1, block.stop_leaf)
        leaves = target.begin(first, leaf)
        in_flight: deque[tuple[Strip, Reducer, memoryview]] = deque()
        parts = strips(planned, first, leaf, strip_nbytes=strip_nbytes)
        for strip, reducers in zip(parts, itertools.cycle(lanes)):
            if work.is_stopped:
                return False
            clock.lap(OTHER)
            reducer = reducers[strip.run.reduction]
            in_flight.append((strip, reducer, _start_strip(strip, reader, reducer, clock)))
            if len(in_flight) == len(lanes):
                _end_strip(*in_flight.popleft(), work, shard, leaves, clock)
        while in_flight:
            _end_strip(*in_flight.popleft(), work, shard, leaves, clock)
    return True


def _start_strip(strip: Strip, reader: Reader, reducer: Reducer, clock: Clock) -> memoryview:
    """Read a strip; on the CPU sum it, too. Return where its output is, or will be."""
    run, start = strip.run, strip.start
    reducer.begin(run, start, strip.num_elements)
    descriptors = reader.descriptors(run.files)
    if descriptors is not None and (done := reducer.read(descriptors)) is not None:
        data, seconds = done
        clock.lap(READ, strip.source_nbytes, seconds=seconds)
        clock.lap(REDUCE, strip.source_nbytes)
        return data
    for source, (file, offset, dtype) in enumerate(
        zip(run.files, run.offsets, run.dtypes, strict=True)
    ):
        position = offset + start * element_nbytes(dtype)
        staging = reducer.staging(source)
        view = reader.view(file, position, staging)
        clock.lap(READ, len(staging))
        reducer.add(source, view)
        clock.lap(REDUCE, len(staging))
    data = reducer.finish()
    reader.release()
    clock.lap(REDUCE)
    return data


def _end_strip(
    strip: Strip,
    reducer: Reducer,
    data: memoryview,
    work: Work,
    shard: ShardInWork,
    leaves: LeafTarget,
    clock: Clock,
) -> None:
    """Wait for a strip's output, and write it."""
    reducer.wait()
    if reducer.disagreeing or not reducer.is_finite:
        for found_in, findings in strip_findings(strip, reducer, shard.places):
            work.found(findings)
            leaves.note(found_in, findings)
    clock.lap(REDUCE)
    leaves.write(strip.out_position, data)
    work.count(strip.source_nbytes)
    work.sources_passed(strip)
