"""A disk of a few bytes for a test, which skips if this process may not mount one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.faults.merges import small_disk


@contextmanager
def disk_or_skip(folder: Path, nbytes: int) -> Iterator[Path]:
    """Mount a disk; skip the test if that is not allowed."""
    with ExitStack() as stack:
        try:
            place = stack.enter_context(small_disk(folder, nbytes))
        except PermissionError as error:
            pytest.skip(f"this process may not mount a disk: {error}")
        yield place
