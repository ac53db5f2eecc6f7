"""mergekit's own float32 answers, where the reference folder is at hand."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import shardmix
from tests.conftest import REFERENCE

METHODS = REFERENCE / "methods"
NAMES = [
    *("linear", "linear-plain", "linear-gradient", "linear-filters"),
    *("task_arithmetic", "task_arithmetic-lambda", "slerp"),
]
pytestmark = pytest.mark.skipif(
    not METHODS.exists(), reason="needs mergekit's answers: ../shared/reference/methods"
)


def tensors(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_mergekits(tmp_path, monkeypatch, name, backend):
    """Each element is within a millionth of its tensor's largest magnitude."""
    monkeypatch.chdir(METHODS)
    shardmix.merge(f"recipes/{name}.yaml", tmp_path / "out", backend=backend, fsync=False)
    expected = tensors(METHODS / "expected" / f"{name}.safetensors")
    merged = tensors(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for key, values in expected.items():
        assert merged[key].dtype == values.dtype
        error = (merged[key] - values).abs().max()
        assert error <= 1e-6 * values.abs().max(), key


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_mergekits(tmp_path, monkeypatch, name):
    monkeypatch.chdir(METHODS)
    shardmix.merge(f"recipes/{name}.yaml", tmp_path / "out", fsync=False)
    expected = json.loads((METHODS / "expected" / f"{name}.config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected
