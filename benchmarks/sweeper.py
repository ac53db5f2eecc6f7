"""Lets a merge of sparse models fit a small disk: makes holes where it writes zeros.

What is a hole in every source is zero in the output, wherever the writer is: a hole made there
before, while or after it writes leaves the same bytes. Should a merge write anything else there,
its digests would say so afterwards. Nothing else is touched, and never a file's first bytes, where
the header comes last.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from holes import Range, data_ranges, gaps, punch, union

SPARED_BYTES = 4 * 1024**2
"""Of each file's start."""
WORTHWHILE_BYTES = 32 * 1024**2
"""A file that takes so much more than its data is swept."""
SECONDS_BETWEEN = 0.1


def zero_ranges(sources: Sequence[Path]) -> list[Range]:
    """Where files of one size and layout all have holes, behind what is spared."""
    known: list[Range] = [(0, SPARED_BYTES)]
    for path in sources:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            known += data_ranges(descriptor)
        finally:
            os.close(descriptor)
    return gaps(union(known), min(path.stat().st_size for path in sources))


class Sweeper:
    """Sweeps files again and again, on a thread of its own, while it is entered."""

    def __init__(self, folder: Path, zeros: Mapping[str, Sequence[Range]]) -> None:
        """`zeros`: by the name of a file in the folder; both may come later."""
        self._folder = folder
        self._zeros = zeros
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sweep_until_over, name="sweeper")
        self.error: Exception | None = None
        """Why it had to stop, if it had to."""

    def __enter__(self) -> "Sweeper":
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _sweep_until_over(self) -> None:
        try:
            while not self._is_over.wait(SECONDS_BETWEEN):
                sweep(self._folder, self._zeros)
        except OSError as error:
            self.error = error


def sweep(
    folder: Path, zeros: Mapping[str, Sequence[Range]], *, slack_bytes: int = WORTHWHILE_BYTES
) -> None:
    """Make holes in those files of a folder that take more than what can't be zero, and a slack."""
    for name, ranges in zeros.items():
        try:
            descriptor = os.open(folder / name, os.O_WRONLY)
        except FileNotFoundError:  # not begun, or the folder has just become the output
            continue
        try:
            status = os.fstat(descriptor)
            data_bytes = status.st_size - sum(stop - start for start, stop in ranges)
            if status.st_blocks * 512 > data_bytes + slack_bytes:
                for start, stop in ranges:
                    punch(descriptor, start, stop)
        finally:
            os.close(descriptor)
