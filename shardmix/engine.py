"""Carries a `MergePlan` out: strips from readers through reducers to output, on several threads.

Decides nothing about the output: names, offsets and strip size are the plan's. Prints nothing:
progress goes to a callback, as events.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from shardmix.blocks import Block, Strip, strips
from shardmix.digests import READ_NBYTES
from shardmix.errors import MergeCancelled
from shardmix.findings import LeafFindings
from shardmix.journal import Journal
from shardmix.memory import peak_resident_nbytes, resident_nbytes
from shardmix.model_folder import write_companions, write_index, write_model_card
from shardmix.output_shard import GrowingShard
from shardmix.placement import buffer_for_reading
from shardmix.plan import MergePlan
from shardmix.provenance import write_provenance
from shardmix.reader import Reader, open_reader
from shardmix.reducer import Backend, Reducer, Reducers
from shardmix.safetensors_layout import element_nbytes
from shardmix.source_files import check_unchanged
from shardmix.stage_clock import NO_CLOCK, OTHER, READ, REDUCE, Clock
from shardmix.staging import Staging
from shardmix.tensor_findings import strip_findings
from shardmix.work import LeafTarget, ShardInWork, Work

PROGRESS_SECONDS = 0.1
"""How often progress is told."""


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a merge is; sent about ten times a second, and once at its end."""

    num_bytes_done: int
    """Source bytes whose part of the output is done."""
    num_bytes_kept: int
    """Of these, the bytes whose part an earlier run had done."""
    num_bytes_total: int
    """Source bytes of the whole merge."""
    num_shards_done: int
    """Output files that are complete."""
    num_shards_total: int
    """Output files of the whole merge."""
    seconds: float
    """Since the first read."""
    resident_nbytes: int
    """Memory that the process holds now."""


OnProgress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """What carrying out a plan took."""

    seconds: float
    """From the first read until the output was in place."""
    peak_resident_nbytes: int
    """Largest resident set of the process so far (VmHWM)."""
    peak_vram_nbytes: int
    """GPU memory that torch had reserved at most; 0 on the CPU."""
    num_bytes_kept: int
    """Source bytes not read, since an earlier run had done their part of the output."""
    findings: LeafFindings
    """NaN and Inf in the output, and integer tensors that differ between models."""


def execute(
    plan: MergePlan,
    backend: Backend,
    staging: Staging,
    journal: Journal,
    *,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
    clock: Clock = NO_CLOCK,
) -> ExecutionResult:
    """Carry out a plan on its loaded backend. The output appears as the last step, or not at all.

    Goes on from what the journal claims and the staging folder holds. Raises `SourceError` or
    `OutputError` where a disk fails, `NonfiniteError` where that was asked for, `MergeCancelled`
    once `cancel` is set; after those, and KeyboardInterrupt, a later run can go on.
    """
    started = time.perf_counter()
    settings, folder = plan.settings, staging.folder
    # All but the weights is written anew.
    staging.drop_all_but({shard.filename for shard in plan.shards})
    work = Work(plan, lambda number: GrowingShard(plan, number, folder, journal, clock))

    def write_the_rest() -> None:
        write_companions(plan, folder)
        write_model_card(plan, folder)
        write_index(plan, folder)

    run_blocks(plan, backend, work, on_progress, cancel, meanwhile=write_the_rest, clock=clock)
    findings = work.findings
    write_provenance(plan, folder, work.file_digests, findings, plan_digest=journal.plan_digest)
    check_unchanged(plan.files)
    staging.place(overwrite=settings.overwrite, fsync=settings.fsync)
    return ExecutionResult(
        seconds=time.perf_counter() - started,
        peak_resident_nbytes=peak_resident_nbytes(),
        peak_vram_nbytes=backend.peak_vram_nbytes(),
        num_bytes_kept=work.num_bytes_kept,
        findings=findings,
    )


def run_blocks(
    plan: MergePlan,
    backend: Backend,
    work: Work,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
    clock: Clock = NO_CLOCK,
) -> None:
    """Merge every block of the work, on the plan's workers; raise the first error of any.

    `meanwhile` is called on the calling thread, which has nothing else to do.
    """
    started = time.perf_counter()

    def report() -> None:
        if on_progress is not None:
            on_progress(
                ProgressEvent(
                    num_bytes_done=work.num_bytes_done,
                    num_bytes_kept=work.num_bytes_kept,
                    num_bytes_total=plan.read_nbytes,
                    num_shards_done=work.num_shards_done,
                    num_shards_total=len(plan.shards),
                    seconds=time.perf_counter() - started,
                    resident_nbytes=resident_nbytes(),
                )
            )

    ends = [threading.Event() for _ in range(plan.memory.workers)]
    threads = [
        threading.Thread(
            target=_work_through, args=(plan, backend, work, clock, end), name=f"shardmix-{number}"
        )
        for number, end in enumerate(ends)
    ]
    with backend.running():
        try:
            for thread in threads:
                thread.start()
            report()
            if meanwhile is not None:
                meanwhile()
            # Not `Thread.join`: interrupted by a signal, it may take a thread that runs for ended
            # (CPython 3.10 to 3.12), whose files would be closed under its hands.
            for end in ends:
                while not end.is_set():
                    _stop_if_cancelled(work, cancel)
                    end.wait(PROGRESS_SECONDS)
                    report()
            _stop_if_cancelled(work, cancel)
            report()
        finally:
            # Also on KeyboardInterrupt, or an error of the callback: no thread outlives the merge.
            work.stop()
            for thread, end in zip(threads, ends, strict=True):
                if thread.ident is not None:
                    _wait_for(end)
                    thread.join()
            work.close()


def _wait_for(end: threading.Event) -> None:
    """Wait whatever comes: a second interrupt changes nothing, the first has told all to stop."""
    while not end.is_set():
        with suppress(KeyboardInterrupt):
            end.wait()


def _stop_if_cancelled(work: Work, cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        work.stop(MergeCancelled("the merge was cancelled"))


def _work_through(
    plan: MergePlan, backend: Backend, work: Work, clock: Clock, end: threading.Event
) -> None:
    """Merge block after block until there is none left: what each worker does."""
    clock.start()
    try:
        strip_nbytes = plan.memory.strip_nbytes
        lanes = [
            Reducers(reducer, strip_nbytes=strip_nbytes)
            for reducer in backend.make_reducers(strip_nbytes=strip_nbytes)
        ]
        buffer = buffer_for_reading(READ_NBYTES)
        keep_cached = plan.cache_use.keeps_sources
        with closing(open_reader(plan.settings.io, plan.files, keep_cached=keep_cached)) as reader:
            shard = None
            while (handed_out := work.next_block(shard)) is not None:
                shard, block = handed_out
                if _merge_block(plan, work, shard, block, reader, lanes, buffer, clock):
                    work.block_done(shard)
    except BaseException as error:
        work.stop(error)
    finally:
        clock.lap(OTHER)
        end.set()


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
    data = _read_strip(strip, reader, reducer, clock)
    run, start, stop = strip.run, strip.start, strip.start + strip.num_elements
    for file, offset, dtype in zip(run.files, run.offsets, run.dtypes, strict=True):
        width = element_nbytes(dtype)
        reader.passed(file, offset + start * width, offset + stop * width)
    return data


def _read_strip(strip: Strip, reader: Reader, reducer: Reducer, clock: Clock) -> memoryview:
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
