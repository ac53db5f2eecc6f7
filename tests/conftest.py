"""Fixtures that several test files use."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.faults.merges import Bench

# Nothing in the tests may reach the network; the Hub is played by a local server where needed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the machine's GPUs from all tests but those that need one, and from what they start."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        if "torch" in sys.modules:  # which may have found them in an earlier test
            monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Return the folder with the independent oracle's models and merges."""
    if not (REFERENCE / "expected.json").exists():
        pytest.skip("the reference models are not beside the project (../shared/reference)")
    return REFERENCE


@pytest.fixture(scope="session")
def bench() -> "Iterator[Bench]":
    """Return what merges that come to harm are started from; see tests/faults/."""
    from tests.faults.merges import Bench, CommandLines

    # Not pytest's own folder, which other users of the machine may not enter.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        place.chmod(0o755)
        commands = CommandLines(place, leaf_nbytes=64 * 1024)
        yield Bench(place, commands, num_elements=100_000)
        commands.close()
