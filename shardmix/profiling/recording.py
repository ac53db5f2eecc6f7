"""The recording of a merge: of nothing, unless a profile is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from shardmix.compute.backend import Backend
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.timer import NO_CLOCK, Clock


class Recording(Protocol):
    """The recording of one merge."""

    @property
    def clock(self) -> Clock:
        """The clock that workers call."""

    def begin_merge(self, plan: MergePlan, backend: Backend) -> None:
        """Note that all is loaded and the workers start."""


class NoRecording:
    """The recording of a merge without a profile: nothing."""

    clock: Clock = NO_CLOCK
    """The clock that workers call."""

    def begin_merge(self, plan: MergePlan, backend: Backend) -> None:
        """Note that all is loaded and the workers start."""


@contextmanager
def recording(path: str | None) -> Iterator[Recording]:
    """Record the merge in this block, and write its profile; without a path, do neither.

    Raises `OutputError` if the profile cannot be written.
    """
    if path is None:
        yield NoRecording()
        return
    from shardmix.profiling.recorder import profile_recording  # few merges have a profile

    with profile_recording(path) as recorded:
        yield recorded
