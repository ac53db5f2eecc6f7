"""Carries a `MergePlan` out on several threads, and puts the output in place.

Decides nothing about the output: names, offsets and chunk size are the plan's. Prints nothing:
progress goes to a callback, as events.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shardmix.anomalies import LeafAnomalies
from shardmix.compute.backend import Backend
from shardmix.errors import MergeCancelled
from shardmix.execute.comparison import ComparedShard, Differences
from shardmix.execute.task_queue import Work
from shardmix.execute.worker import work_through
from shardmix.output.disk_need import AnomalyRoom
from shardmix.output.journal import Journal
from shardmix.output.model_folder import write_all_but_weights
from shardmix.output.provenance import write_provenance
from shardmix.output.shard_writer import GrowingShard
from shardmix.output.staging import Staging
from shardmix.plan.merge_plan import MergePlan
from shardmix.sources.identity import SourceIdentity, has_changed
from shardmix.system.held_folder import HeldFolder
from shardmix.system.memory import peak_resident_nbytes, resident_nbytes
from shardmix.system.threads import running
from shardmix.system.timer import NO_CLOCK, Clock

PROGRESS_SECONDS = 0.1
"""How often progress is told."""


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a merge is; sent about ten times a second, and once when it is finished."""

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
    is_end: bool = False
    """Everything is finished, and in its place: the last event, sent once."""


OnProgress = Callable[[ProgressEvent], None]


class Teller:
    """Passes progress on to a callback, and remembers the last event to end with."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._last: ProgressEvent | None = None
        self._last_at = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        """Tell an event."""
        self._last, self._last_at = event, time.perf_counter()
        self._on_progress(event)

    def end(self) -> None:
        """Tell the last event once more, as the end of everything."""
        if self._last is None:
            return
        seconds = self._last.seconds + time.perf_counter() - self._last_at
        self._on_progress(
            replace(self._last, seconds=seconds, resident_nbytes=resident_nbytes(), is_end=True)
        )


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
    findings: LeafAnomalies
    """NaN and Inf in the output, and integer tensors that differ between models."""
    provenance_sha256: str
    """SHA-256 (hex) of the output's shardmix.json."""


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
    room = AnomalyRoom(plan, staging)
    work = Work(
        plan,
        lambda number: GrowingShard(plan, number, folder, journal, clock),
        on_many_anomalies=room.check,
    )

    def write_the_rest() -> None:
        write_all_but_weights(plan, folder)

    teller = Teller(on_progress) if on_progress is not None else None
    run_tasks(plan, backend, work, teller, cancel, meanwhile=write_the_rest, clock=clock)
    findings = work.findings
    sha256 = write_provenance(
        plan, folder, work.file_digests, findings, plan_digest=journal.plan_digest
    )
    _check_sources(plan, backend, folder, teller, cancel)
    staging.place(overwrite=settings.overwrite, fsync=settings.fsync)
    seconds = time.perf_counter() - started
    if teller is not None:
        teller.end()
    return ExecutionResult(
        seconds=seconds,
        peak_resident_nbytes=peak_resident_nbytes(),
        peak_vram_nbytes=backend.peak_vram_nbytes(),
        num_bytes_kept=work.num_bytes_kept,
        findings=findings,
        provenance_sha256=sha256,
    )


def _check_sources(
    plan: MergePlan,
    backend: Backend,
    folder: HeldFolder,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> None:
    """Raise `SourceChangedError` if a source is not what it was, or has not given what is written.

    If nothing but the time of status change tells of it, somebody may have written to it, or just
    touched it. So all is merged again and held against the output.
    """
    _check_unchanged(plan)
    now = [source.identity.renewed() for source in plan.sources]
    path = _written_since(now, [source.identity for source in plan.sources])
    if path is None:
        return
    differences = Differences()
    work = Work(plan, lambda number: ComparedShard(plan, number, folder, differences))
    run_tasks(plan, backend, work, on_progress, cancel)
    _check_unchanged(plan)
    is_same = not (differences.num_bytes or differences.unreadable)
    if not is_same or _written_since([each.renewed() for each in now], now) is not None:
        raise has_changed(path)


def _check_unchanged(plan: MergePlan) -> None:
    for source in plan.sources:
        source.check_unchanged()


def _written_since(now: Sequence[SourceIdentity], then: Sequence[SourceIdentity]) -> str | None:
    """Return the first file that may have been written to in between, its times set back."""
    found = (after.written_since(before) for after, before in zip(now, then, strict=True))
    return next((path for path in found if path is not None), None)


def run_tasks(
    plan: MergePlan,
    backend: Backend,
    work: Work,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
    *,
    meanwhile: Callable[[], None] | None = None,
    clock: Clock = NO_CLOCK,
) -> None:
    """Merge every task of the work, on the plan's workers; raise the first error of any.

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

    def task() -> None:
        work_through(plan, backend, work, clock)

    with backend.running():
        try:
            with running(task, plan.memory.workers, stop=work.stop) as ends:
                report()
                if meanwhile is not None:
                    meanwhile()
                for end in ends:
                    while not end.is_set():
                        _stop_if_cancelled(work, cancel)
                        end.wait(PROGRESS_SECONDS)
                        report()
                _stop_if_cancelled(work, cancel)
                report()
        finally:
            work.close()


def _stop_if_cancelled(work: Work, cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        work.stop(MergeCancelled("the merge was cancelled"))
