import hashlib
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import shardmix
from shardmix.execute import gather_pass
from shardmix.methods.statistics import GROUP_NUM_ELEMENTS, PIECE_NUM_ELEMENTS
from shardmix.plan import memory_budget
from shardmix.sources.readers import PreadReader
from tests.support.models import load_model, random_tensor, save_model

SHAPES = {
    "large": (GROUP_NUM_ELEMENTS + 3 * PIECE_NUM_ELEMENTS + 5,),
    "middle": (300, 1001),
    "small": (7,),
    "zeros": (64,),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models whose tensors are of all sizes; none is nearly parallel to the other's."""
    root = tmp_path_factory.mktemp("models")
    folders = []
    for seed, name in enumerate("ab"):
        tensors = {
            key: random_tensor(shape, torch.bfloat16, seed=10 * seed + number)
            for number, (key, shape) in enumerate(SHAPES.items())
        }
        tensors["zeros"] = torch.zeros(SHAPES["zeros"], dtype=torch.bfloat16)
        folders.append(str(save_model(root / name, tensors)))
    return folders


def merge(models, output, **options):
    base, other = models
    settings = {"method": "slerp", "base_model": base, "parameters": {"t": 0.3}, "fsync": False}
    return shardmix.merge([base, other], output, **(settings | options))


def digest(output):
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that hardly a tensor fits into one."""
    sizes = dict.fromkeys(memory_budget.BEST_CHUNK_NBYTES, 1 << 16)
    monkeypatch.setattr(memory_budget, "BEST_CHUNK_NBYTES", sizes)
    monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", 1 << 16)


@pytest.fixture
def gathered(monkeypatch):
    """The tasks of all gathering passes."""
    tasks = []
    original = gather_pass.gather_tasks

    def spy(segments):
        tasks.extend(original(segments))
        return original(segments)

    monkeypatch.setattr(gather_pass, "gather_tasks", spy)
    return tasks


def test_values_are_the_formulas(models, tmp_path):
    merge(models, tmp_path / "out", dtype="float32")
    a, b = (load_model(Path(folder)) for folder in models)
    out = load_model(tmp_path / "out")
    for name in ("large", "middle", "small"):
        x, y = (t[name].double().numpy().ravel() for t in (a, b))
        angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)
        error = np.abs(out[name].double().numpy().ravel() - expected).max()
        assert error <= 1e-6 * np.abs(expected).max()
    assert not out["zeros"].any()


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("workers", [1, 3])
def test_ways_change_no_bit(models, tmp_path, small_chunks, backend, io, workers):
    """By one reading or by two, on any number of workers."""
    merge(models, tmp_path / "small", backend=backend, io=io, workers=workers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", 1 << 25)
        merge(models, tmp_path / "whole", backend=backend, io=io, workers=workers)
    assert digest(tmp_path / "small") == digest(tmp_path / "whole")


def test_only_large_tensors_are_gathered(models, tmp_path, small_chunks, gathered):
    merge(models, tmp_path / "out")
    assert [(task.file, task.first_leaf) for task in gathered] == [(0, 0), (0, 1), (1, 0)]


def test_whole_tensors_are_read_once(models, tmp_path, monkeypatch, gathered):
    read = []
    original = PreadReader.view

    def counted(self, file, offset, into):
        read.append(len(into))
        return original(self, file, offset, into)

    monkeypatch.setattr(PreadReader, "view", counted)
    report = merge(models, tmp_path / "out", workers=1)
    assert gathered == []
    assert sum(read) == report.bytes_read


def interrupted(models, output, **options):
    """Stop a merge when all is merged but nothing in place."""
    place = "shardmix.execute.merge.write_provenance"
    with mock.patch(place, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        merge(models, output, **options)
    return output.parent / f".{output.name}.shardmix" / "journal"


def test_resume_keeps_statistics(models, tmp_path, small_chunks, gathered):
    merge(models, tmp_path / "whole")
    gathered.clear()
    interrupted(models, tmp_path / "out")
    assert gathered
    gathered.clear()
    merge(models, tmp_path / "out")
    assert gathered == []
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("spoil", ["value", "torn"])
def test_spoilt_statistics_are_gathered_anew(models, tmp_path, small_chunks, gathered, spoil):
    merge(models, tmp_path / "whole")
    journal = interrupted(models, tmp_path / "out")
    lines = journal.read_bytes().splitlines(keepends=True)
    number = next(n for n, line in enumerate(lines) if line.startswith(b'["'))
    if spoil == "value":
        line = json.loads(lines[number])
        line[1][0][0] = (1.5).hex()
        lines[number] = json.dumps(line, separators=(",", ":")).encode() + b"\n"
    else:
        lines = [*lines[:number], lines[number][:-9]]
    journal.write_bytes(b"".join(lines))
    gathered.clear()
    merge(models, tmp_path / "out")
    assert gathered
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_rest_of_a_tensor_is_merged_alike(models, tmp_path, monkeypatch):
    """A later merge begins within a tensor whose statistics nobody kept."""
    merge(models, tmp_path / "whole")
    journal = interrupted(models, tmp_path / "out")
    lines = [line for line in journal.read_bytes().splitlines(True) if not line.startswith(b"[0,0")]
    journal.write_bytes(b"".join(lines))
    monkeypatch.setattr(gather_pass, "_is_read_whole", lambda *_: True)
    report = merge(models, tmp_path / "out")
    assert 0 < report.bytes_kept < report.bytes_read + report.bytes_kept
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
