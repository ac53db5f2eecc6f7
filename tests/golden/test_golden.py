"""Every output has the bytes that are on record, in whatever way its merge is run."""

import json
import platform
import re
import subprocess
import sys

import pytest

import shardmix
from tests.golden.arrangements import ARRANGEMENTS, LARGE, LOADABLE, SPECIAL
from tests.golden.runs import (
    WAYS,
    command,
    invoke,
    merge,
    output_digests,
    read_record,
    save_models,
    sources_digest,
)

RECORDED = read_record()
UNBOUNDED_STRIP_NBYTES = 2**20
"""A strip without a budget, by kernels; by torch it is larger."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return where an arrangement's models are, or will be made."""
    root = tmp_path_factory.mktemp("sources")
    return lambda name: root / name


def check(name, out):
    """Compare an output with the record, file by file."""
    assert output_digests(out) == RECORDED[name]["output"]


def test_record_is_whole():
    """The record has every arrangement, and no other."""
    assert list(RECORDED) == list(ARRANGEMENTS)
    for each in RECORDED.values():
        assert any(file.endswith(".safetensors") for file in each["output"])


def test_sources(sources):
    """The models have the bytes of the record: if outputs differ, it is the merge's doing."""
    for name, arrangement in ARRANGEMENTS.items():
        assert sources_digest(arrangement, sources(name)) == RECORDED[name]["sources"], name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_output(tmp_path, sources, name, way):
    """Backends, ways to read and numbers of workers change no byte of an output."""
    if name in SPECIAL and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("which NaN is the sum of two is the processor's choice")
    merge(ARRANGEMENTS[name], sources(name), tmp_path / "out", WAYS[way])
    check(name, tmp_path / "out")


@pytest.mark.parametrize("name", ["large", "all float dtypes"])
def test_least_memory(tmp_path, sources, name):
    """Strips are small in the least budget that works, and eight threads share them."""
    words = command(ARRANGEMENTS[name], sources(name), tmp_path / "out", ["--workers", "8"])

    def run(*budget):
        line = [sys.executable, "-m", "shardmix", *words, "--max-memory", *budget]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    refused = json.loads(run("1MiB").stdout)["error"]
    least = re.search(r"the least that works here is (\d+) ?MiB", refused["message"])[1]
    done = run(f"{least}MiB")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["strip_bytes"] < UNBOUNDED_STRIP_NBYTES
    check(name, tmp_path / "out")


@pytest.mark.parametrize("way", WAYS)
def test_resumed(tmp_path, sources, way):
    """A merge that stops at the NaN at its end, and then may go on, ends with the same bytes."""
    name = "large with a NaN at its end"
    merging = (LARGE[name], sources(name), tmp_path / "out")
    stopped = invoke(*merging, ["--workers", "1", "--on-nonfinite", "error"])
    assert stopped.exit_code == 1
    assert not (tmp_path / "out").exists()
    report = merge(*merging, WAYS[way])
    assert report["bytes_kept"] > 0
    assert report["bytes_read"] > 0
    check(name, tmp_path / "out")


def test_mix_models(tmp_path, sources):
    """LM-Cocktail's function stores what the command line does."""
    (arrangement,) = LOADABLE.values()
    names = save_models(arrangement, sources("llama"))
    shardmix.mix_models(names, "decoder", arrangement.weights, tmp_path / "out", quiet=True)
    check("llama", tmp_path / "out")
