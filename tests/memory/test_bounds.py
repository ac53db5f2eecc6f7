"""Memory is a promise: the peak resident set of a fresh process stays within what was projected."""

import json

import pytest
import torch
from safetensors.torch import save_file

from shardmix.system.units import MIB
from tests.support.fresh_process import merge_report, python, refused_merge
from tests.support.models import save_model

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def large_models(tmp_path_factory):
    """Two models of 300 MB in one tensor each: a budget must not grow with tensor or model."""
    folder = tmp_path_factory.mktemp("large")
    block = torch.randn(1_000_000).bfloat16()
    for name in "ab":
        tensors = {"embedding": block.repeat(150).view(-1, 1000)}
        save_model(folder / name, tensors, config={})
        del tensors
    return [folder / "a", folder / "b"]


def least_budget(models, *options):
    """Return the least budget that works, in bytes, as the refusal of a smaller one names it."""
    words = [f"{model}={1 / len(models)!r}" for model in models]
    refusal = refused_merge(*words, "-o", "nowhere", *options, "--max-memory", 1)
    return int(refusal.split("works here is ")[1].split("MiB")[0]) * MIB


@pytest.mark.parametrize("backend", ["torch", "llvm"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_tensor_larger_than_budget_merges(large_models, tmp_path, io, backend):
    """A tensor larger than the budget merges within it."""
    if backend == "llvm":
        pytest.importorskip("llvmlite", reason="needs llvmlite")
    options = ("--io", io, "--backend", backend, "--workers", 2, "--no-fsync")
    budget = least_budget(large_models, *options) + MIB
    assert budget < 400 * MIB
    a, b = large_models
    report = merge_report(
        f"{a}=0.5", f"{b}=0.5", "-o", tmp_path / "out", *options, "--max-memory", budget
    )
    assert report["bytes_read"] > budget
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"] <= budget
    assert report["peak_rss_bytes"] >= report["projected_peak_bytes"] / 2


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_peak_is_flat_in_number_of_models(large_models, tmp_path, io):
    """The peak does not grow with the number of models."""
    peaks = {}
    for count in (2, 8):
        words = [f"{large_models[number % 2]}={1 / count!r}" for number in range(count)]
        out = tmp_path / str(count)
        report = merge_report(*words, "-o", out, "--io", io, "--no-fsync")
        peaks[count] = report["peak_rss_bytes"]
        assert peaks[count] <= report["projected_peak_bytes"]
    # Two workers map a third source's chunk, and a fault maps up to 2 MiB at either end of one, by
    # chance. A chunk mapped for each of six more models would take twice as much.
    assert peaks[8] <= peaks[2] + 24 * MIB


def test_many_small_tensors_stay_projected(tmp_path):
    """Thousands of small tensors stay within the projection.

    Headers and plan count, too: their memory is there before the chunks are sized.
    """
    names = [f"model.layers.{i}.experts.{j}.weight" for i in range(100) for j in range(200)]
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        tensors = {name: torch.full((16,), float(number)) for name in names[:: 1 - 2 * number]}
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / folder / "config.json").write_text(json.dumps({}))
    report = merge_report(f"{tmp_path}/a=0.5", f"{tmp_path}/b=0.5", "-o", tmp_path / "out")
    assert report["num_tensors"] == 20_000
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]


def test_many_segments_stay_projected(tmp_path):
    """Tens of thousands that are nowhere neighbours stay within the projection.

    Each is a run of its own, and all that is made of a plan goes through every run.
    """
    count = 60_000
    names = [f"model.layers.{i}.experts.{j}.weight" for i in range(100) for j in range(600)]
    for folder, ordered in (("a", names), ("b", names[::-1])):
        save_model(tmp_path / folder, {}, config={})
        entries = {
            name: {"dtype": "F32", "shape": [16], "data_offsets": [64 * place, 64 * place + 64]}
            for place, name in enumerate(ordered)
        }
        header = json.dumps(entries).encode()
        head = len(header).to_bytes(8, "little") + header
        (tmp_path / folder / "model.safetensors").write_bytes(head + bytes(64 * count))
    words = (f"{tmp_path}/a=0.5", f"{tmp_path}/b=0.5", "-o", tmp_path / "out", "--no-fsync")
    report = merge_report(*words)
    assert report["num_tensors"] == count
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]


def test_budget_counts_what_is_already_held(large_models, tmp_path):
    """A budget counts what the process already holds.

    In a larger program the bound is one for the whole process.
    """
    a, b = large_models
    code = (
        "import shardmix\n"
        "ballast = b'x' * (300 << 20)\n"
        f"models = [({str(a)!r}, 0.5), ({str(b)!r}, 0.5)]\n"
        "try: shardmix.merge(models, 'nowhere', max_memory='400MiB')\n"
        "except shardmix.BudgetError as error: print('refused')\n"
        f"report = shardmix.merge(models, {str(tmp_path / 'out')!r}, max_memory='640MiB')\n"
        "print(report.peak_rss_bytes <= report.projected_peak_bytes <= 640 << 20)\n"
    )
    assert python(code).split() == ["refused", "True"]


def test_verifying_takes_little_memory(large_models, tmp_path):
    """Verifying and recomputing stay small, whatever the size."""
    a, b = large_models
    report = merge_report(f"{a}=0.5", f"{b}=0.5", "-o", tmp_path / "out", "--no-fsync")
    verify = (
        "import json, sys, shardmix\n"
        "report = shardmix.verify(sys.argv[1], **json.loads(sys.argv[2]))\n"
        "assert report.is_verified\nprint(report.peak_rss_bytes)"
    )
    places = {"a": str(a), "b": str(b)}
    by_digest = int(python(verify, tmp_path / "out", "{}"))
    assert by_digest < 128 * MIB
    budget = report["projected_peak_bytes"]
    options = json.dumps({"recompute": True, "sources": places, "max_memory": budget})
    assert int(python(verify, tmp_path / "out", options)) <= budget


def test_resume_stays_projected(large_models, tmp_path):
    """Going on stays within the projection.

    What an earlier run has done is read again in small pieces.
    """
    a, b = large_models
    words = json.dumps({str(a): 0.5, str(b): 0.5})
    cut_off = (
        "import json, sys, shardmix\nfrom unittest import mock\n"
        "interrupt = mock.patch('shardmix.execute.merge.write_provenance', "
        "side_effect=KeyboardInterrupt)\n"
        "with interrupt:\n"
        "    try: shardmix.merge(json.loads(sys.argv[1]), sys.argv[2], fsync=False)\n"
        "    except KeyboardInterrupt as error: print(error)"
    )
    assert "are done and kept" in python(cut_off, words, tmp_path / "out")
    report = merge_report(f"{a}=0.5", f"{b}=0.5", "-o", tmp_path / "out", "--no-fsync")
    assert report["bytes_kept"] == 600_000_000
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]
