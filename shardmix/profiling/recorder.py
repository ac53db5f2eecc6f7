"""Records a merge while it runs: samples, and writes the profile.

Puts sampler, stage clock and profile together. Draws no picture.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from shardmix.compute.backend import Backend
from shardmix.errors import MergeCancelled, OutputError, ShardmixError
from shardmix.plan.merge_plan import MergePlan
from shardmix.profiling.profile import (
    CANCELLED,
    COMPLETE,
    FAILED,
    Profile,
    Samples,
    planned_merge,
    stage_profiles,
    this_machine,
)
from shardmix.profiling.profile_file import write_profile
from shardmix.profiling.sampler import (
    MEMORY_COLUMNS,
    VRAM_COLUMNS,
    Sampler,
    memory_probe,
    vram_probe,
)
from shardmix.system.memory import peak_resident_nbytes
from shardmix.system.timer import FINISH, STAGES, StageClock

_STAGE_COLUMNS = tuple(f"{name}_bytes" for name in STAGES[:FINISH])


class ProfileRecording:
    """The recording of a merge for a profile."""

    def __init__(self, sampler: Sampler, *, started: float) -> None:
        self.clock = self._clock = StageClock()
        self._sampler = sampler
        self._started = started
        self._merge: tuple[MergePlan, Backend, float] | None = None

    def begin_merge(self, plan: MergePlan, backend: Backend) -> None:
        """Note that all is loaded and the workers start."""
        self._merge = plan, backend, time.perf_counter()
        self._sampler.watch(_STAGE_COLUMNS, lambda: self._clock.nbytes()[:FINISH])
        if plan.settings.on_cuda:
            self._sampler.watch(VRAM_COLUMNS, vram_probe(plan.settings.device))

    def profile(self, outcome: str) -> Profile | None:
        """End the recording and return it; return None if the merge never began."""
        self._sampler.stop()
        ended = time.perf_counter()
        if self._merge is None:
            return None
        plan, backend, begun = self._merge
        merged = max(self._clock.last_lap() or begun, begun)
        times, columns = self._sampler.columns()
        return Profile(
            outcome=outcome,
            seconds=ended - self._started,
            load_seconds=begun - self._started,
            merge_seconds=merged - begun,
            finish_seconds=ended - merged,
            peak_rss_bytes=peak_resident_nbytes(),
            peak_vram_bytes=backend.peak_vram_nbytes(),
            plan=planned_merge(plan),
            stages=stage_profiles(self._clock, workers=plan.memory.workers),
            machine=this_machine(),
            samples=Samples(
                interval_seconds=self._sampler.interval_seconds,
                failure=self._sampler.failure,
                seconds=times,
                **columns,
            ),
        )


@contextmanager
def profile_recording(path: str) -> Iterator[ProfileRecording]:
    """Record the merge in this block, and write its profile.

    A merge that began and then fails or is stopped leaves the profile of the part that ran. Raises
    `OutputError` if the file cannot be written.
    """
    started = time.perf_counter()
    with memory_probe() as probe:
        sampler = Sampler(started)
        sampler.watch(MEMORY_COLUMNS, probe)
        sampler.start()
        recorded = ProfileRecording(sampler, started=started)
        try:
            yield recorded
        except BaseException as error:
            is_stopped = isinstance(error, MergeCancelled | KeyboardInterrupt)
            try:
                _write_profile(path, recorded.profile(CANCELLED if is_stopped else FAILED))
            except OutputError as unwritten:
                if isinstance(error, ShardmixError):
                    error.add_hint(str(unwritten))
            raise
        _write_profile(path, recorded.profile(COMPLETE))


def _write_profile(path: str, profile: Profile | None) -> None:
    if profile is not None:
        write_profile(path, profile.to_json())
