"""Looks at the resident memory of a process and its children while it runs. Linux.

What a page shared with another process is counts for each, as in `ru_maxrss`; so do mapped files.
"""

import os
import threading
import time
from pathlib import Path

INTERVAL_S = 0.05
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
        return self.looks

    def _look(self, pid: int) -> None:
        started = time.perf_counter()
        while nbytes := tree_resident_bytes(pid):
            self.looks.append((round(time.perf_counter() - started, 3), nbytes))
            time.sleep(INTERVAL_S)


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
