"""Fixtures for what others may put where a merge writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.planted import Precious, ends_soon


@pytest.fixture
def precious(tmp_path: Path) -> Precious:
    """Return a tree of somebody's work, which nothing may touch."""
    return Precious(tmp_path / "precious")


@pytest.fixture
def in_time() -> Iterator[None]:
    """Fail a test that waits for what never comes."""
    with ends_soon():
        yield
