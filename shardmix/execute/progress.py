"""Progress of a pass, sent as events to a callback."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from shardmix.system.memory import resident_nbytes


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """The progress of a pass; sent about ten times a second, and once at the end."""

    num_bytes_done: int
    """Source bytes whose part of the output is done."""
    num_bytes_kept: int
    """Part of these bytes that an earlier merge had done."""
    num_bytes_total: int
    """Source bytes of the whole merge."""
    num_shards_done: int
    """Output files that are complete."""
    num_shards_total: int
    """Output files of the whole merge."""
    seconds: float
    """Seconds since the first read."""
    resident_nbytes: int
    """Memory that the process has now."""
    is_end: bool = False
    """True for the last event, sent once everything is finished and renamed."""


OnProgress = Callable[[ProgressEvent], None]


class Teller:
    """Passes progress on to a callback, and stores the last event to end with."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._last: ProgressEvent | None = None
        self._last_at = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        """Pass an event on."""
        self._last, self._last_at = event, time.perf_counter()
        self._on_progress(event)

    def end(self) -> None:
        """Send the last event once more, as the end of everything."""
        if self._last is None:
            return
        seconds = self._last.seconds + time.perf_counter() - self._last_at
        self._on_progress(
            replace(self._last, seconds=seconds, resident_nbytes=resident_nbytes(), is_end=True)
        )
