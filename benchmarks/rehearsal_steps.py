"""The processes of a rehearsal: what each took; a merge watched, and killed, from outside."""

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from harness import mib

LEAF_BYTES = 4 * 1024**2
"""What one line of the journal claims (`docs/design.md`)."""
LEAST_FREE_BYTES = 10 * 10**9
"""Of the disk; with less the rehearsal ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One process of the rehearsal: a row of the CSV."""

    step: str
    outcome: str
    is_as_promised: bool
    wall_s: float
    moved_bytes: int = 0
    """Read of sources and written, or read again; of a killed merge, for the leaves claimed."""
    kept_bytes: int = 0
    """Source bytes that were not read again, since an earlier run had done their part."""
    claimed_bytes: int = 0
    """Output that the journal claims at the end of the process."""
    first_claim_s: float = 0.0
    """From the process's start until it claimed anything new: start, plan, and check of the old."""
    peak_bytes: int
    """ru_maxrss of the ended process, which is its VmHWM."""
    projected_bytes: int = 0
    """Promised by the merge's report, or where it was killed by the plan's."""
    budget_bytes: int = 0
    staged_bytes: int = 0
    """The most that the growing output took of the disk, or of what waits to be written to it."""
    output_digest: str = ""
    """Of all digests in shardmix.json, so that outputs can be compared."""

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        return (
            self.step,
            f"{self.wall_s:.1f}",
            f"{self.moved_bytes / 1e9:.1f}",
            f"{self.moved_bytes / self.wall_s / 1e9:.2f}",
            f"{self.kept_bytes / 1e9:.1f}",
            f"{self.claimed_bytes / 1e9:.1f}",
            f"{self.first_claim_s:.1f}" if self.first_claim_s else "",
            mib(self.peak_bytes),
            mib(self.projected_bytes) if self.projected_bytes else "",
            mib(self.budget_bytes) if self.budget_bytes else "",
            f"{self.staged_bytes / 1e9:.1f}" if self.staged_bytes else "",
            self.outcome,
        )


HEADER = (
    "step",
    "wall s",
    "GB moved",
    "GB/s",
    "GB kept",
    "GB claimed",
    "1st claim s",
    "peak MiB",
    "projected",
    "budget",
    "staged GB",
    "outcome",
)


class Watch:
    """Looks at a merge from outside: what its journal claims, what the disk has left; may kill."""

    def __init__(
        self,
        staging: Path,
        *,
        kill_at_bytes: float | None = None,
        kill_after_s: float | None = None,
    ) -> None:
        self._journal = staging / "journal"
        self._model = staging / "model"
        self._disk = staging.parent
        self._kill_at_bytes = kill_at_bytes
        self._kill_after_s = kill_after_s
        self._position = self._num_lines = 0
        self._started = time.perf_counter()
        self._look_at_journal()
        self.claimed_before = self.claimed_bytes
        """What earlier runs had done."""
        self.first_claim_s = 0.0
        self.staged_bytes = 0
        """The most that the growing output took of the disk."""

    @property
    def claimed_bytes(self) -> int:
        """Bytes of output that are claimed by now, to a leaf."""
        return max(0, self._num_lines - 1) * LEAF_BYTES  # the first line says what merge it is

    def __call__(self, pid: int) -> None:
        """Look once; raises SystemExit where the disk runs low."""
        seconds = time.perf_counter() - self._started
        self._look_at_journal()
        if not self.first_claim_s and self.claimed_bytes > self.claimed_before:
            self.first_claim_s = seconds
        self.staged_bytes = max(self.staged_bytes, disk_bytes(self._model))
        if shutil.disk_usage(self._disk).free < LEAST_FREE_BYTES:
            raise SystemExit(
                f"{self._disk}: less than {LEAST_FREE_BYTES // 10**9} GB are left on this disk; "
                "free some space, or give another --work-dir"
            )
        is_far = self._kill_at_bytes is not None and self.claimed_bytes >= self._kill_at_bytes
        if is_far or (self._kill_after_s is not None and seconds >= self._kill_after_s):
            os.kill(pid, signal.SIGKILL)

    def _look_at_journal(self) -> None:
        try:
            with self._journal.open("rb") as file:
                file.seek(self._position)
                added = file.read()
        except FileNotFoundError:  # not begun, or the output is in place
            return
        self._position += len(added)
        self._num_lines += added.count(b"\n")


def disk_bytes(folder: Path) -> int:
    """What a folder's files take of the disk, or will when they are written; 0 if it is not there.

    Files may come and go meanwhile.
    """
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_blocks * 512 for entry in entries)
    except FileNotFoundError:
        return 0
