"""Options of the tests, how they are shared among processes, and fixtures that several use."""

import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.support.sampling import SAMPLING, examples

if TYPE_CHECKING:
    from tests.faults.merges import Bench

# Nothing in the tests may reach the network; the Hub is played by a local server where needed.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

TESTS = Path(__file__).resolve().parent
REFERENCE = TESTS.parents[1] / "shared" / "reference"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let campaigns run whole, or as a sample that was drawn before."""
    group = parser.getgroup("shardmix")
    group.addoption("--campaign", action="store_true", help="run long campaigns whole")
    group.addoption("--sample-seed", type=int, help="draw the samples of an earlier run again")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed before Hypothesis looks for one; processes of pytest-xdist are given it."""
    options, given = config.option, getattr(config, "workerinput", {})
    if given:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # or each process has torch use all cores
    if options.sample_seed is None:
        options.sample_seed = given.get("sample_seed", random.randrange(10**6))
    if options.hypothesis_seed is None:
        options.hypothesis_seed = str(options.sample_seed)
    SAMPLING.is_whole, SAMPLING.seed = options.campaign, options.sample_seed
    if SAMPLING.is_whole:
        hypothesis.settings.register_profile("campaign", max_examples=examples(100))
        hypothesis.settings.load_profile("campaign")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use the cores that this process may use; each process takes up to a gigabyte."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Give the seed to a process of pytest-xdist: all collect the same tests."""
    node.workerinput["sample_seed"] = SAMPLING.seed


def pytest_report_header(config: pytest.Config) -> str:
    """Tell how to have the same samples again."""
    seed = config.option.sample_seed
    kind = "whole" if config.option.campaign else "samples"
    return f"campaigns: {kind}, seed {seed} (the same again: --sample-seed {seed})"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file's tests to one process, for the sake of its fixtures.

    Files with tests that watch what all processes share, such as memory and page cache, go to one
    process as well. (Its own groups pytest-xdist 3.8 loses under pytest 9.)
    """
    from xdist.scheduler import LoadScopeScheduling

    root = TESTS.parent
    watching = {
        path.relative_to(root).as_posix()
        for path in TESTS.rglob("test_*.py")
        if "pytest.mark.machine" in path.read_text(encoding="utf-8")
    }

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "machine" if file in watching else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that must share a process: they take longest."""
    items.sort(key=_is_of_machine, reverse=True)


def _is_of_machine(item: pytest.Item) -> bool:
    return item.get_closest_marker("machine") is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that reports, if it is another, what was sampled."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["sampled"] = SAMPLING.drawn


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a process of pytest-xdist has sampled: each draws the same."""
    SAMPLING.drawn.update(getattr(node, "workeroutput", {}).get("sampled", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell how much of the campaigns has run."""
    drawn = SAMPLING.drawn.values()
    if drawn:
        num_run, num_cases = map(sum, zip(*drawn, strict=True))
        terminalreporter.write_line(
            f"campaigns: {num_run:,} of {num_cases:,} cases in {len(drawn)} samples, "
            f"seed {SAMPLING.seed}; whole by --campaign"
        )


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
