"""Takes turns with others that measure on the same machine, by a lock on a file they agree on.

Measuring takes the lock alone, what only loads the machine shares it. Without a file it does
nothing.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

STRETCH_S = 240.0
"""How long the lock is kept from one measurement to the next; those who wait then get it."""


class Turns:
    """The lock; given back at the end, and between measurements when others have waited enough."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._held: IO[str] | None = None
        self._held_until = 0.0

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._give_back()

    def measure(self, *, for_minutes: bool = False) -> None:
        """Nobody else measures or loads the machine from here on."""
        if for_minutes or time.monotonic() > self._held_until:
            self._give_back()
        if self._held is None:
            self._take(fcntl.LOCK_EX)

    @contextlib.contextmanager
    def load(self) -> Iterator[None]:
        """Nobody else measures; others may load the machine as well, unless it is held alone."""
        if time.monotonic() > self._held_until:
            self._give_back()
        if self._held is not None:
            yield
            return
        self._take(fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._give_back()

    def _take(self, kind: int) -> None:
        if self._path is not None:
            self._held = self._path.open("a")
            fcntl.flock(self._held, kind)
            self._held_until = time.monotonic() + STRETCH_S

    def _give_back(self) -> None:
        if self._held is not None:
            # Closing the file unlocks it; children don't inherit it.
            self._held.close()
            self._held = None
            # Whoever waits is woken up, but is not faster than this process.
            time.sleep(1)
