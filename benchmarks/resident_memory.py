"""Looks at the resident memory of a process and its children while it runs. Linux.

What a page shared with another process is counts for each, as in `ru_maxrss`; so do mapped files.
"""

import itertools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

INTERVAL_S = 0.05
NOTICEABLE = 0.01
"""Share by which two looks must differ for both to be kept."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ResidentMemory:
    """Looks every `INTERVAL_S` from `watch` on, until the process is gone.

    Reads `statm` and not `smaps_rollup`, which walks the page tables and holds the process up.
    """

    def __init__(self) -> None:
        self.looks: list[tuple[float, int]] = []
        """Seconds since the start, and bytes."""
        self._thread: threading.Thread | None = None

    def watch(self, pid: int) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._look, args=[pid], daemon=True)
        self._thread.start()

    def finish(self) -> list[tuple[float, int]]:
        """What was seen; the process must have ended."""
        if self._thread is not None:
            self._thread.join()
        return without_repetition(self.looks)

    def _look(self, pid: int) -> None:
        started = time.perf_counter()
        while nbytes := tree_resident_bytes(pid):
            self.looks.append((round(time.perf_counter() - started, 3), nbytes))
            time.sleep(INTERVAL_S)


def without_repetition(looks: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The looks that differ from the last one kept by `NOTICEABLE`, and the first and last."""
    kept = list(looks[:1])
    for look, following in itertools.pairwise(looks[1:]):
        # The one before a jump is kept too: what was level until then is drawn level.
        if abs(following[1] - kept[-1][1]) > NOTICEABLE * kept[-1][1]:
            kept.append(look)
    return kept + list(looks[1:][-1:])


def tree_resident_bytes(pid: int) -> int:
    """Resident memory of the process, its children and theirs; 0 once it is gone."""
    folder = Path("/proc", str(pid))
    try:
        own = int((folder / "statm").read_text().split()[1]) * PAGE_BYTES
        children = [
            int(child)
            for thread in (folder / "task").iterdir()
            for child in (thread / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return own + sum(map(tree_resident_bytes, children))
