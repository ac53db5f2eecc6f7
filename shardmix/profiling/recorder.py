"""Records a merge while it runs: checks the profile's path, samples, and writes the profile.

Puts sampler, stage clock and profile together. Draws no picture.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from shardmix.compute.backend import Backend
from shardmix.errors import MergeCancelled, OutputError, ShardmixError
from shardmix.output.staging import staging_path
from shardmix.plan.merge_plan import MergePlan
from shardmix.profiling.profile import (
    CANCELLED,
    COMPLETE,
    FAILED,
    FIRST_BYTES,
    Profile,
    Samples,
    planned_merge,
    stage_profiles,
    this_machine,
)
from shardmix.profiling.sampler import (
    MEMORY_COLUMNS,
    VRAM_COLUMNS,
    Sampler,
    memory_probe,
    vram_probe,
)
from shardmix.system.files import open_regular
from shardmix.system.held_folder import open_folder
from shardmix.system.memory import peak_resident_nbytes
from shardmix.system.timer import FINISH, NO_CLOCK, STAGES, Clock, StageClock

_STAGE_COLUMNS = tuple(f"{name}_bytes" for name in STAGES[:FINISH])


class Recording:
    """The recording of a merge without a profile: nothing."""

    clock: Clock = NO_CLOCK
    """The clock that workers call."""

    def begin_merge(self, plan: MergePlan, backend: Backend) -> None:
        """Note that all is loaded and the workers start."""


class ProfileRecording(Recording):
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
def recording(path: str | None) -> Iterator[Recording]:
    """Record the merge in this block, and write its profile; without a path, do neither.

    A merge that began and then fails or is stopped leaves the profile of the part that ran. Raises
    `OutputError` if the file cannot be written.
    """
    if path is None:
        yield Recording()
        return
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
                _write(path, recorded.profile(CANCELLED if is_stopped else FAILED))
            except OutputError as unwritten:
                if isinstance(error, ShardmixError):
                    error.add_hint(str(unwritten))
            raise
        _write(path, recorded.profile(COMPLETE))


def check_profile_path(path: str | None, output: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse a profile that could not be written, or would destroy something. Opens no source.

    `path` is absolute; `inputs` are model folders and weight files. Raises `OutputError`.
    """
    if path is None:
        return
    file = Path(path)
    kept_clean = [] if output is None else [output, staging_path(output)]
    for folder in (*kept_clean, *(source.resolve() for source in inputs)):
        if folder == file or folder in file.parents:
            raise OutputError(
                f"a profile cannot be in {folder}",
                subject=file,
                remedy="choose a place outside it",
            )
    if not file.parent.is_dir():
        raise OutputError(f"there is no folder {file.parent}", subject=file, remedy="make it first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise OutputError(
            "cannot be written to",
            subject=file,
            remedy="choose another place for the profile",
        )
    _check_replaceable(file)


def _check_replaceable(file: Path) -> None:
    if file.is_symlink():
        raise OutputError(
            "is a link, which a profile does not follow",
            subject=file,
            remedy="name another file",
        )
    if file.exists() and not is_profile(file):
        raise OutputError(
            "exists and is not a profile; nothing else would be replaced",
            subject=file,
            remedy="choose another name",
        )


def is_profile(file: Path) -> bool:
    """Return True if a file is a profile of a merge, by its first bytes."""
    try:
        with open_regular(file) as opened:
            return opened.read(len(FIRST_BYTES)) == FIRST_BYTES
    except OSError:
        return False


def _write(path: str, profile: Profile | None) -> None:
    if profile is None:
        return
    file = Path(path)
    _check_replaceable(file)  # again: the first check was before the merge
    try:
        with open_folder(file.parent) as folder:
            folder.replace(file.name, profile.to_json())
    except OSError as error:
        raise OutputError(
            f"the profile cannot be written ({error.strerror})",
            subject=path,
            remedy="check its permissions and its disk",
        ) from None
