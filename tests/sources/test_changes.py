"""Sources that know their changes to a base model: methods of changes get them as they are."""

import pytest
import torch
from safetensors.torch import load_file

import shardmix
from tests.support.cut_off import cut_off, folder_bytes
from tests.support.models import random_tensor, save_model
from tests.support.shifted_source import add_kind, save_shifted

TINY = 1e-12
"""A change that vanishes if it is added to the base in float32."""


@pytest.fixture
def base(tmp_path, monkeypatch):
    add_kind(monkeypatch)
    tensors = {f"w{n}": random_tensor((1500 + n, 1000), seed=n).bfloat16() for n in range(4)}
    return save_model(tmp_path / "base", tensors | {"steps": torch.arange(5)})


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


WAYS = [
    {"backend": "torch"},
    {"io": "mmap"},
    {"workers": 1},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_changes_are_taken_as_they_are(tmp_path, base, way):
    """Not as fl(fl(base + change) - base), in which a small change would vanish."""
    shifted = save_shifted(tmp_path / "shifted", base, TINY)
    shardmix.merge(
        {shifted: 2.0**40},
        tmp_path / "out",
        method="task_arithmetic",
        base_model=base,
        dtype="float32",
        **way,
    )
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    change = torch.tensor(TINY) * torch.tensor(2.0**40)
    for name, values in before.items():
        if values.is_floating_point():
            assert torch.equal(after[name], values.float() + change)
        else:
            assert torch.equal(after[name], values)


def test_changes_to_another_base_subtract(tmp_path, base):
    """Then the values count: shifted - other base."""
    other = save_model(
        tmp_path / "other",
        {
            name: 2 * values if values.is_floating_point() else values
            for name, values in tensors_of(base).items()
        },
    )
    shifted = save_shifted(tmp_path / "shifted", base, 0.5)
    shardmix.merge(
        {shifted: 1.0},
        tmp_path / "out",
        method="task_arithmetic",
        base_model=other,
        dtype="float32",
    )
    after = tensors_of(tmp_path / "out")
    for name, values in tensors_of(base).items():
        if values.is_floating_point():
            twice = 2 * values.float()
            assert torch.equal(after[name], twice + ((values.float() + 0.5) - twice))


def test_other_methods_read_values(tmp_path, base):
    shifted = save_shifted(tmp_path / "shifted", base, 0.5)
    shardmix.merge({base: 0.5, shifted: 0.5}, tmp_path / "out", dtype="float32")
    after = tensors_of(tmp_path / "out")
    for name, values in tensors_of(base).items():
        if values.is_floating_point():
            wide = values.float()
            assert torch.equal(after[name], wide * 0.5 + (wide + 0.5) * 0.5)


def test_cut_off_merges_of_changes_go_on(tmp_path, base):
    shifted = save_shifted(tmp_path / "shifted", base, 0.25)
    task = {"method": "task_arithmetic", "base_model": base}
    cut_off({shifted: 1.0}, tmp_path / "out", num_leaves=1, record_paths=True, **task)
    shardmix.merge({shifted: 1.0}, tmp_path / "out", record_paths=True, **task)
    shardmix.merge({shifted: 1.0}, tmp_path / "whole", record_paths=True, **task)
    first, second = (
        {name: data for name, data in folder_bytes(tmp_path / each).items() if "safetens" in name}
        for each in ("out", "whole")
    )
    assert first == second
    report = shardmix.verify(tmp_path / "out", recompute=True)
    assert report.problems == ()
