"""What each worker of a merge does: chunks from readers through reducers to output."""

import itertools
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import closing

from shardmix.compute.backend import Backend, Reducer, Reducers
from shardmix.dtypes import element_nbytes
from shardmix.execute.anomaly_places import chunk_anomalies
from shardmix.execute.task_queue import LeafTarget, ShardInWork, Work
from shardmix.execute.tasks import Chunk, Task, chunks
from shardmix.plan.merge_plan import MergePlan
from shardmix.sources.readers import Reader, open_reader
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.digests import READ_NBYTES
from shardmix.system.timer import OTHER, READ, REDUCE, Clock


def work_through(plan: MergePlan, backend: Backend, work: Work, clock: Clock) -> None:
    """Do one worker's part; whatever goes wrong goes to `work`."""
    clock.start()
    try:
        _merge_tasks(plan, backend, work, clock)
    except BaseException as error:
        # The error outlives the merge; the buffers that its frames hold must not.
        traceback.clear_frames(error.__traceback__)
        work.stop(error)
    finally:
        clock.lap(OTHER)


def _merge_tasks(plan: MergePlan, backend: Backend, work: Work, clock: Clock) -> None:
    """Merge task after task until there is none left."""
    chunk_nbytes = plan.memory.chunk_nbytes
    lanes = [
        Reducers(reducer, chunk_nbytes=chunk_nbytes)
        for reducer in backend.make_reducers(chunk_nbytes=chunk_nbytes)
    ]
    buffer = buffer_for_reading(READ_NBYTES)
    with closing(open_reader(plan.settings.io, plan.files, plan.decoders)) as reader:
        shard = None
        while (handed_out := work.next_task(shard)) is not None:
            shard, task = handed_out
            if _merge_task(plan, work, shard, task, reader, lanes, buffer, clock):
                work.task_done(shard)


def _merge_task(
    plan: MergePlan,
    work: Work,
    shard: ShardInWork,
    task: Task,
    reader: Reader,
    lanes: Sequence[Reducers],
    buffer: memoryview,
    clock: Clock,
) -> bool:
    """Merge what is not there yet of a task; return whether it was not stopped before its end.

    With several lanes, one chunk is read while others are still being summed.
    """
    planned, chunk_nbytes = plan.shards[task.shard], plan.memory.chunk_nbytes
    target = shard.target
    leaf = task.first_leaf
    while leaf < task.stop_leaf:
        if work.is_stopped:
            return False
        findings = target.reused(leaf, buffer)
        if findings is not None:
            for chunk in chunks(planned, leaf, leaf + 1, chunk_nbytes=chunk_nbytes):
                work.count(chunk.source_nbytes, kept=True)
            work.found(findings)
            leaf += 1
            continue
        first, leaf = leaf, target.next_claimed(leaf + 1, task.stop_leaf)
        leaves = target.begin(first, leaf)
        in_flight: deque[tuple[Chunk, Reducer, memoryview]] = deque()
        parts = chunks(planned, first, leaf, chunk_nbytes=chunk_nbytes)
        for chunk, reducers in zip(parts, itertools.cycle(lanes)):
            if work.is_stopped:
                return False
            clock.lap(OTHER)
            reducer = reducers[chunk.segment.method]
            in_flight.append((chunk, reducer, _start_chunk(chunk, reader, reducer, clock)))
            if len(in_flight) == len(lanes):
                _end_chunk(*in_flight.popleft(), work, shard, leaves, clock)
        while in_flight:
            _end_chunk(*in_flight.popleft(), work, shard, leaves, clock)
    return True


def _start_chunk(chunk: Chunk, reader: Reader, reducer: Reducer, clock: Clock) -> memoryview:
    """Read a chunk; on the CPU sum it, too. Return where its output is, or will be."""
    segment, start = chunk.segment, chunk.start
    reducer.begin(segment, start, chunk.num_elements)
    descriptors = reader.descriptors(segment.files)
    if descriptors is not None and (done := reducer.read(descriptors)) is not None:
        data, seconds = done
        clock.lap(READ, chunk.source_nbytes, seconds=seconds)
        clock.lap(REDUCE, chunk.source_nbytes)
        return data
    for source, (_, dtype, file, offset) in enumerate(segment.sources):
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


def _end_chunk(
    chunk: Chunk,
    reducer: Reducer,
    data: memoryview,
    work: Work,
    shard: ShardInWork,
    leaves: LeafTarget,
    clock: Clock,
) -> None:
    """Wait for a chunk's output, and write it."""
    reducer.wait()
    if reducer.disagreeing or not reducer.is_finite:
        for found_in, findings in chunk_anomalies(chunk, reducer, shard.places):
            work.found(findings)
            leaves.note(found_in, findings)
    clock.lap(REDUCE)
    leaves.write(chunk.out_position, data)
    work.count(chunk.source_nbytes)
    work.sources_passed(chunk)
