"""Carries a `MergePlan` out: its passes in order, then the rename of the output.

Decides nothing about the output: names, offsets and chunk size are the plan's. Prints nothing.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from shardmix.anomalies import AnomalySum, LeafAnomalies
from shardmix.compute.backend import Backend
from shardmix.execute.executor import TaskResult
from shardmix.execute.jobs import run_job
from shardmix.execute.progress import OnProgress, Teller
from shardmix.execute.tasks import merge_tasks
from shardmix.execute.write_pass import Written, write_job
from shardmix.output.disk_need import AnomalyRoom
from shardmix.output.journal import Claims, Journal
from shardmix.output.model_folder import write_all_but_weights
from shardmix.output.provenance import write_provenance
from shardmix.output.staging import Staging
from shardmix.plan.merge_plan import MergePlan
from shardmix.sources.identity import SourceIdentity, has_changed
from shardmix.system.held_folder import HeldFolder
from shardmix.system.memory import peak_resident_nbytes
from shardmix.system.timer import NO_CLOCK, Clock

_MANY = 1000


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    """The cost and anomalies of a plan that was carried out."""

    seconds: float
    """Time from the first read until the output was complete."""
    peak_resident_nbytes: int
    """Largest resident set of the process so far (VmHWM)."""
    peak_vram_nbytes: int
    """Peak GPU memory that torch had reserved; 0 on the CPU."""
    num_bytes_read: int
    """Bytes read from sources' files."""
    num_bytes_kept: int
    """Source bytes not read, since an earlier merge had written their part of the output."""
    anomalies: LeafAnomalies
    """NaN and Inf in the output, and integer tensors that differ between models."""
    provenance_sha256: str
    """SHA-256 (hex) of the output's shardmix.json."""


class Tally:
    """The sum of a writing pass's results so far."""

    def __init__(
        self,
        plan: MergePlan,
        claims: Claims,
        *,
        on_many_anomalies: Callable[[Collection[str]], None],
    ) -> None:
        """Start empty. `on_many_anomalies` gets new tensors with NaN, a thousand at a time."""
        self._plan = plan
        self._claims = claims
        self._on_many_anomalies = on_many_anomalies
        self._untold: list[str] = []
        self._anomalies = AnomalySum()
        self.file_digests: dict[str, str] = {}
        """File name → digest (hex), of complete files."""
        self.num_bytes_read = 0
        """Bytes read from sources' files."""
        self.num_bytes_kept = 0
        """Source bytes whose part of the output an earlier merge had written."""

    def take(self, result: TaskResult[Written]) -> None:
        """Add one task's result."""
        written = result.value
        for claim in written.claims:
            self._claims.add(*claim)
        self.num_bytes_read += result.num_bytes_read
        self.num_bytes_kept += result.num_bytes_kept
        if result.is_file_end:
            self.file_digests[self._plan.shards[result.task.file].filename] = written.file_digest
        if written.anomalies:
            self._add(written.anomalies)

    def _add(self, anomalies: LeafAnomalies) -> None:
        names = anomalies.nonfinite
        self._untold += (name for name in names if not self._anomalies.has_nonfinite(name))
        self._anomalies.add(anomalies)
        if len(self._untold) >= _MANY:
            many, self._untold = self._untold, []
            self._on_many_anomalies(many)

    @property
    def anomalies(self) -> LeafAnomalies:
        """Anomalies so far."""
        return self._anomalies.total()


def execute_plan(
    plan: MergePlan,
    backend: Backend,
    staging: Staging,
    journal: Journal,
    *,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
    clock: Clock = NO_CLOCK,
) -> MergeOutcome:
    """Carry out a plan on its loaded backend. The output appears as the last step, or not at all.

    Goes on from the journal's claims and the staging folder's files. After an error, and after
    KeyboardInterrupt, a later call can go on.

    Raises:
        SourceError: if a source cannot be read, or has changed.
        OutputError: if the output cannot be written.
        NonfiniteError: if the output has NaN or Inf, and that was to be an error.
        MergeCancelled: once `cancel` is set.
    """
    started = time.perf_counter()
    settings, folder = plan.settings, staging.folder
    # All files but the weights are written again.
    staging.drop_all_but({shard.filename for shard in plan.shards})
    tally = Tally(plan, journal, on_many_anomalies=AnomalyRoom(plan, staging).check)
    teller = Teller(on_progress) if on_progress is not None else None
    num_bytes_gathered = 0
    if plan.gathering is not None:
        from shardmix.execute.gather_pass import gather_statistics

        num_bytes_gathered = gather_statistics(plan, journal, teller, cancel)
    run_job(
        write_job(plan, folder, journal, backend=backend, clock=clock),
        merge_tasks(plan),
        tally.take,
        num_bytes=plan.read_nbytes,
        num_files=len(plan.shards),
        on_progress=teller,
        cancel=cancel,
        meanwhile=lambda: write_all_but_weights(plan, folder),
    )
    anomalies = tally.anomalies
    sha256 = write_provenance(
        plan, folder, tally.file_digests, anomalies, plan_digest=journal.plan_digest
    )
    _check_sources(plan, backend, folder, teller, cancel)
    staging.place(overwrite=settings.overwrite, fsync=settings.fsync)
    seconds = time.perf_counter() - started
    if teller is not None:
        teller.end()
    return MergeOutcome(
        seconds=seconds,
        peak_resident_nbytes=peak_resident_nbytes(),
        peak_vram_nbytes=backend.peak_vram_nbytes(),
        num_bytes_read=num_bytes_gathered + tally.num_bytes_read,
        num_bytes_kept=tally.num_bytes_kept,
        anomalies=anomalies,
        provenance_sha256=sha256,
    )


def _check_sources(
    plan: MergePlan,
    backend: Backend,
    folder: HeldFolder,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> None:
    """Raise `SourceChangedError` if a source changed, or did not give the written output.

    If only the time of status change differs, somebody may have written to it, or just touched it.
    Then everything is merged again and compared with the output.
    """
    _check_unchanged(plan)
    now = [source.identity.renewed() for source in plan.sources]
    path = _written_since(now, [source.identity for source in plan.sources])
    if path is None:
        return
    from shardmix.execute.compare_pass import compare  # hardly a merge comes here

    differences = compare(plan, backend, folder, on_progress, cancel)
    _check_unchanged(plan)
    if differences or _written_since([each.renewed() for each in now], now) is not None:
        raise has_changed(path)


def _check_unchanged(plan: MergePlan) -> None:
    for source in plan.sources:
        source.check_unchanged()


def _written_since(now: Sequence[SourceIdentity], then: Sequence[SourceIdentity]) -> str | None:
    """Return the first file that may have been written to in between, its times set back."""
    found = (after.written_since(before) for after, before in zip(now, then, strict=True))
    return next((path for path in found if path is not None), None)
