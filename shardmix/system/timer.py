"""How long the workers of a merge are at each stage, and how many bytes pass through it.

One clock for all threads, and a twin that does nothing where nobody asked. Knows no merge.
"""

import threading
import time
from typing import Protocol

READ, REDUCE, WRITE, DIGEST, FINISH, OTHER = range(6)
STAGES = ("read", "reduce", "write", "digest", "finish", "other")
"""What a worker does: source bytes in; the sum; output bytes out; their hashes; the end of a file
(its header, and forcing it to disk); and all else: waiting for work, checking what is there."""


class Clock(Protocol):
    """Told by each worker at the end of a stage."""

    def start(self) -> None:
        """Begin to count on the calling thread."""

    def lap(self, stage: int, nbytes: int = 0, *, seconds: float | None = None) -> None:
        """Count the thread's time since its last call, and these bytes, as this stage's.

        With `seconds`, so much of that time; the rest is the next stage's.
        """


class StageClock:
    """Adds up laps: a thread's stages follow one another, so that none of its time is lost."""

    def __init__(self) -> None:
        self._threads: list[_Laps] = []
        self._local = threading.local()

    def start(self) -> None:
        """Begin to count on the calling thread."""
        self._local.laps = laps = _Laps()
        self._threads.append(laps)

    def lap(self, stage: int, nbytes: int = 0, *, seconds: float | None = None) -> None:
        """Count the thread's time since its last call, and these bytes, as this stage's."""
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
        """Return when the last lap of any thread ended, by `time.perf_counter`; None: no lap."""
        return max((laps.since for laps in self._threads), default=None)


class _Laps:
    """What one thread has counted."""

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
