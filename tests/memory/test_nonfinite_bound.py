"""The projection holds though every one of tens of thousands of tensors holds NaN."""

import json
from itertools import product

import numpy as np
import pytest

from tests.support.fresh_process import python
from tests.support.sampling import SAMPLING

pytestmark = pytest.mark.machine

PER_LAYER = 500 if SAMPLING.is_whole else 200
NAMES = [
    f"model.layers.{i}.mlp.experts.{j}.weight" for i, j in product(range(100), range(PER_LAYER))
]
COUNT = len(NAMES)

# Runs the command line in this process, then tells its peak: what is printed counts, too.
MERGE = """
import atexit, runpy, sys
from shardmix.system.memory import peak_resident_nbytes
atexit.register(lambda: print(peak_resident_nbytes()))
sys.argv[1:1] = ["merge"]
runpy.run_module("shardmix", run_name="__main__")
"""
CUT_OFF = """
import sys, shardmix
from unittest import mock
models = {sys.argv[1]: 0.5, sys.argv[2]: 0.5}
with mock.patch("shardmix.execute.merge.write_provenance", side_effect=KeyboardInterrupt):
    try: shardmix.merge(models, sys.argv[3], fsync=False)
    except KeyboardInterrupt as error: print(error)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models that are all NaN, whose tensors are nowhere neighbours: each is a run."""
    root = tmp_path_factory.mktemp("nan")
    data = np.full(16 * COUNT, np.nan, dtype=np.float32).tobytes()
    for folder, ordered in (("a", NAMES), ("b", NAMES[::-1])):
        entries = {
            name: {"dtype": "F32", "shape": [16], "data_offsets": [64 * place, 64 * place + 64]}
            for place, name in enumerate(ordered)
        }
        header = json.dumps(entries).encode()
        (root / folder).mkdir()
        (root / folder / "config.json").write_text("{}")
        with (root / folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + data)
    return root


def merged(models, out, backend):
    """Merge in a fresh process; return the report, and the process's peak at its very end."""
    words = (f"{models}/a=0.5", f"{models}/b=0.5", "-o", out, "--backend", backend, "--workers", 1)
    printed = python(MERGE, *words, "--no-fsync", "--json", "--quiet")
    text, _, peak = printed.strip().rpartition("\n")
    return json.loads(text), int(peak)


@pytest.mark.parametrize("backend", ["torch", "llvm"])
def test_all_nan_stays_within_the_projection(models, tmp_path, backend):
    """Counts by leaf and in all, the journal's line, shardmix.json, the report and its JSON."""
    if backend == "llvm":
        pytest.importorskip("llvmlite", reason="needs llvmlite")
    report, peak = merged(models, tmp_path / "out", backend)
    assert len(report["nonfinite"]) == COUNT
    assert report["nonfinite"][0] == {
        "name": min(NAMES),
        "num_nan": 16,
        "num_inf": 0,
        "num_overflowed": 0,
    }
    assert report["peak_rss_bytes"] <= peak <= report["projected_peak_bytes"]


def test_going_on_with_all_nan_does_too(models, tmp_path):
    """Then the journal tells what was found, by names of its own."""
    assert "are done and kept" in python(CUT_OFF, models / "a", models / "b", tmp_path / "out")
    report, peak = merged(models, tmp_path / "out", "torch")
    assert report["bytes_kept"] > 0
    assert len(report["nonfinite"]) == COUNT
    assert peak <= report["projected_peak_bytes"]
