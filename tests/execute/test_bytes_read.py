"""Reports tell the bytes that were read from files, whatever they become."""

import os
from pathlib import Path

import pytest
import torch

import shardmix
from shardmix.plan import memory_budget
from tests.sources.test_source_contract import FACTORIES, modules
from tests.support.adapters import random_adapter, save_adapter
from tests.support.models import random_tensor, save_model
from tests.support.negated_source import add_kind


@pytest.fixture
def counted(monkeypatch):
    """Bytes that were read from files below a folder, by descriptor and system call."""
    found = []
    original = os.preadv

    def preadv(descriptor, buffers, offset, *flags):
        count = original(descriptor, buffers, offset, *flags)
        found.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)

    def total(folder):
        return sum(count for path, count in found if path.is_relative_to(folder))

    return total


@pytest.mark.parametrize(
    "factory", [each for each in FACTORIES if each is not modules], ids=lambda each: each.__name__
)
def test_bytes_of_files_are_told(tmp_path, monkeypatch, counted, factory):
    add_kind(monkeypatch)
    (tmp_path / "source").mkdir()
    source = factory(tmp_path / "source")
    out = tmp_path / "out"
    report = shardmix.convert(str(source), out, backend="torch", io="pread", workers=2)
    assert report.bytes_read == counted(tmp_path / "source") > 0


@pytest.mark.parametrize("is_gathered", [False, True])
def test_shared_and_gathered_bytes_are_told(tmp_path, monkeypatch, counted, is_gathered):
    """Of two adapters on one base, which is read once; and statistics read in a pass before."""
    tensors = {"a.weight": random_tensor((400, 300), seed=1).bfloat16(), "norm": torch.ones(5)}
    base = save_model(tmp_path / "sources" / "base", tensors)
    for seed in range(2):
        adapter = random_adapter(tensors, ["a"], rank=2, seed=seed)
        save_adapter(tmp_path / "sources" / f"a{seed}", adapter, r=2)
    models = [f"{base}+{tmp_path}/sources/a{seed}" for seed in range(2)]
    asked = {"backend": "torch", "io": "pread", "workers": 1}
    if is_gathered:
        sizes = dict.fromkeys(memory_budget.BEST_CHUNK_NBYTES, 1 << 16)
        monkeypatch.setattr(memory_budget, "BEST_CHUNK_NBYTES", sizes)
        monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", 1 << 16)
        asked |= {"method": "slerp", "base_model": models[0], "parameters": {"t": 0.3}}
        report = shardmix.merge(models, tmp_path / "out", **asked)
    else:
        report = shardmix.merge(dict.fromkeys(models, 0.5), tmp_path / "out", **asked)
    assert report.bytes_read == counted(tmp_path / "sources")
    once = 2 * 400 * 300
    most = 5 if is_gathered else 1.2
    assert (2 if is_gathered else 1) * once < report.bytes_read < most * once
