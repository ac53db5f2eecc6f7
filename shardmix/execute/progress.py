"""Progress of a pass, told as events to a callback."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from shardmix.system.memory import resident_nbytes


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a pass is; sent about ten times a second, and once when everything is finished."""

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
