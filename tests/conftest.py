"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest

# Nothing in the tests may reach the network; the Hub is played by a local server where needed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder with the independent oracle's models and merges."""
    if not (REFERENCE / "expected.json").exists():
        pytest.skip("the reference models are not beside the project (../shared/reference)")
    return REFERENCE
