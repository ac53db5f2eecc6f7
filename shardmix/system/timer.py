"""The time that workers of a merge spend at each stage, and the bytes that pass through it.

One clock serves all threads. Its twin does nothing, for merges that are not profiled. Knows no
merge.
"""

import threading
import time
from typing import Protocol

READ, REDUCE, WRITE, DIGEST, FINISH, OTHER = range(6)
STAGES = ("read", "reduce", "write", "digest", "finish", "other")
"""A worker's stages: source bytes in; the arithmetic; output bytes out; their hashes; the end of a
file (its header, and forcing it to disk); and all else, such as waiting for a task."""


class Clock(Protocol):
    """The calls that each worker makes at the end of a stage."""

    def start(self) -> None:
        """Begin to count on the calling thread."""

    def lap(self, stage: int, nbytes: int = 0, *, seconds: float | None = None) -> None:
        """Count the thread's time since its last call, and these bytes, for this stage.

        `seconds`: count only so much of that time; the rest is the next stage's.
        """


class StageClock:
    """Adds up laps; a thread's stages follow one another, so that none of its time is lost."""

    def __init__(self) -> None:
        self._threads: list[_Laps] = []
        self._local = threading.local()

    def start(self) -> None:
        """Begin to count on the calling thread."""
        self._local.laps = laps = _Laps()
        self._threads.append(laps)

    def lap(self, stage: int, nbytes: int = 0, *, seconds: float | None = None) -> None:
        """Count the thread's time since its last call, and these bytes, for this stage."""
        laps: _Laps = self._local.laps
        now = time.perf_counter() if seconds is None else laps.since + seconds
        laps.seconds[stage] += now - laps.since
        laps.nbytes[stage] += nbytes
        laps.since = now

    def nbytes(self) -> list[int]:
        """Return the bytes of each stage so far, over all threads."""
        return [sum(laps.nbytes[stage] for laps in self._threads) for stage in range(len(STAGES))]

    def seconds(self) -> list[float]:
        """Return the seconds of each stage so far, over all threads."""
        return [sum(laps.seconds[stage] for laps in self._threads) for stage in range(len(STAGES))]

    def last_lap(self) -> float | None:
        """Return the end of the latest lap, by `time.perf_counter`, or None without a lap."""
        return max((laps.since for laps in self._threads), default=None)


class _Laps:
    """The counts of one thread."""

    def __init__(self) -> None:
        self.seconds = [0.0] * len(STAGES)
        self.nbytes = [0] * len(STAGES)
        self.since = time.perf_counter()


class _NoClock:
    def start(self) -> None:
        pass

    def lap(self, stage: int, nbytes: int = 0, *, seconds: float | None = None) -> None:
        pass


NO_CLOCK: Clock = _NoClock()
"""Counts nothing, at the cost of a call."""
