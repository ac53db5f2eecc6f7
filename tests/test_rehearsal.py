"""The rehearsal of huge merges: what its sweeper takes away, and what its comparison would find."""

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardmix
from benchmarks.memory.promise import FACTORS, combinations
from benchmarks.scale.holes import gaps, sweep, union, zero_ranges
from shardmix.output.journal import Journal
from tests.support.cut_off import cut_off_after

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = (0.5, 0.3, 0.2)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="holes are punched as on Linux")


@pytest.fixture(scope="module")
def sparse_models(tmp_path_factory):
    """Three models of 230 MB in three files, of which four places of each file hold data."""
    models = [tmp_path_factory.mktemp("sparse") / name for name in "abc"]
    for seed, model in enumerate(models):
        words = ("llama-100m", model, "--sparse", "--regions=4")
        run_module("lib.checkpoints", *words, f"--seed={seed}")
    return models


def run_module(name, *words):
    """Run a benchmark's module; return its exit status and what it printed."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def merge(models, output):
    return shardmix.merge(list(zip(models, WEIGHTS, strict=True)), output, fsync=False)


def compare(output, models):
    """Run the comparison with numpy's sum."""
    words = [f"{model}={weight}" for model, weight in zip(models, WEIGHTS, strict=True)]
    return run_module("scale.expected_merge", output, *words)


def zeros_of(models):
    names = sorted(path.name for path in models[0].glob("*.safetensors"))
    assert len(names) == 3
    return {name: zero_ranges([model / name for model in models]) for name in names}


def test_swept_and_cut_merge_keeps_its_bytes(sparse_models, tmp_path, monkeypatch):
    """A merge swept after every leaf, and cut off, writes the same bytes."""
    merge(sparse_models, tmp_path / "whole")
    zeros = zeros_of(sparse_models)
    add = Journal.add

    def add_and_sweep(self, *claim):
        add(self, *claim)
        sweep(tmp_path / ".out.shardmix" / "model", zeros, slack_bytes=0)

    monkeypatch.setattr(Journal, "add", add_and_sweep)
    with cut_off_after(7), pytest.raises(KeyboardInterrupt):
        merge(sparse_models, tmp_path / "out")
    report = merge(sparse_models, tmp_path / "out")
    assert report.bytes_kept > 0
    sweep(tmp_path / "out", zeros, slack_bytes=0)
    for name in (*zeros, "shardmix.json"):
        written = (tmp_path / "out" / name).read_bytes()
        assert written == (tmp_path / "whole" / name).read_bytes()
    files = [(tmp_path / "out" / name).stat() for name in zeros]
    assert sum(file.st_blocks * 512 for file in files) < sum(file.st_size for file in files) / 3
    assert shardmix.verify(tmp_path / "out").is_verified
    assert compare(tmp_path / "out", sparse_models)[0] == 0


def test_only_common_holes_are_zeros(sparse_models):
    """Only what every source has as a hole is taken for zeros."""
    zeros = zeros_of(sparse_models)
    for name, ranges in zeros.items():
        for model in sparse_models:
            data = (model / name).read_bytes()
            assert not any(data[start:stop].strip(b"\0") for start, stop in ranges)
        assert min(start for start, _ in ranges) >= 4 * 1024**2


@pytest.mark.parametrize("where", ["in data", "in a hole"])
def test_the_comparison_finds_one_wrong_byte(sparse_models, tmp_path, where):
    merge(sparse_models, tmp_path / "out")
    assert compare(tmp_path / "out", sparse_models)[0] == 0
    name, ranges = list(zeros_of(sparse_models).items())[1]
    path = tmp_path / "out" / name
    # A shard's last bytes are data.
    position = sum(ranges[0]) // 2 if where == "in a hole" else path.stat().st_size - 1001
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    status, told = compare(tmp_path / "out", sparse_models)
    assert status == 1
    assert '"num_problems": 1' in told


ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=8)


@settings(deadline=None)
@given(ranges, st.integers(0, 200))
def test_gaps_are_untouched_pages(found, size):
    """Gaps are the whole pages that no range touches."""
    page = 8
    pairs = [(min(pair), max(pair)) for pair in found]
    taken = {byte for start, stop in pairs for byte in range(start, stop)}
    free = {
        byte for start, stop in gaps(union(pairs), size, align=page) for byte in range(start, stop)
    }
    whole_pages = {
        byte
        for first in range(0, size - page + 1, page)
        for byte in range(first, first + page)
        if taken.isdisjoint(range(first, first + page))
    }
    assert free == whole_pages


def test_combinations_pair_all_values():
    """Any two values meet in the combinations of the memory benchmark."""
    chosen = list(combinations(50, random.Random(3)))
    assert len(chosen) == 50
    for (name, values), (other, others) in itertools.combinations(FACTORS.items(), 2):
        for value, other_value in itertools.product(values, others):
            meet = any((each[name], each[other]) == (value, other_value) for each in chosen)
            assert meet, (value, other_value)
