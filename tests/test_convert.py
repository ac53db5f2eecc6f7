"""One model stored anew: bits are copied, whatever they are, or rounded once."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import shardmix
from shardmix.cli.commands import app
from shardmix.errors import RecipeError
from tests.support.cut_off import cut_off, large_models
from tests.support.models import random_model, save_model


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def odd_values(dtype):
    """All patterns of 16 bits, among them NaN of every kind, -0.0 and subnormals."""
    patterns = torch.from_numpy(np.arange(2**16, dtype=np.uint16).view(np.int16).copy())
    return patterns.view(dtype).reshape(256, 256)


@pytest.mark.parametrize("way", [{}, {"backend": "torch"}, {"io": "mmap"}], ids=str)
def test_bits_are_copied(tmp_path, way):
    tensors = {
        "a": odd_values(torch.bfloat16),
        "b": odd_values(torch.float16).t().contiguous(),
        "c": torch.arange(7),
        "d": torch.tensor([float("nan"), -0.0, float("inf")]),
        "e": torch.ones(3, dtype=torch.bool),
    }
    folder = tmp_path / "m"
    save_model(folder, {"a": tensors["a"]})
    torch.save({name: x.t() if name == "b" else x for name, x in tensors.items()}, folder / "x.pt")
    report = shardmix.convert(folder / "x.pt", tmp_path / "out", config_from=folder, **way)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.t() if name == "b" else tensor
        assert stored[name].dtype == expected.dtype
        assert bits(stored[name]) == bits(expected)
    assert report.num_models == 1
    assert shardmix.verify(tmp_path / "out").is_verified


def test_other_dtypes_are_rounded_once(tmp_path):
    tensors = random_model(1)
    save_model(tmp_path / "m", tensors)
    shardmix.convert(tmp_path / "m", tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], x.bfloat16()) for name, x in tensors.items())


def test_wrappers_names_are_left_out(tmp_path):
    tensors = random_model(1)
    wrapped = {f"_orig_mod.module.{name}": x for name, x in tensors.items()}
    save_model(tmp_path / "m", wrapped)
    shardmix.convert(tmp_path / "m", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_cut_off_conversions_go_on(tmp_path):
    ((source, _), _) = large_models(tmp_path)
    cut_off([str(source)], tmp_path / "out", num_leaves=2, method="passthrough", record_paths=True)
    report = shardmix.convert(source, tmp_path / "out", record_paths=True)
    assert report.bytes_kept > 0
    for path in source.glob("*.safetensors"):
        before, after = load_file(path), load_file(tmp_path / "out" / path.name)
        assert all(bits(before[name]) == bits(after[name]) for name in before)
    assert shardmix.verify(tmp_path / "out", recompute=True).problems == ()


def test_command_converts(tmp_path):
    save_model(tmp_path / "m", random_model(1), shards=[sorted(random_model(1))])
    words = ["convert", str(tmp_path / "m"), str(tmp_path / "out"), "--max-shard-size", "1KB"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["num_models"] == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "exists; " in again.stderr


def test_one_model_passes_through(tmp_path):
    sources = [str(save_model(tmp_path / name, random_model(1))) for name in "ab"]
    with pytest.raises(RecipeError, match="passthrough takes at most 1"):
        shardmix.merge(sources, tmp_path / "out", method="passthrough")
    with pytest.raises(TypeError, match="a method of its own"):
        shardmix.convert(sources[0], tmp_path / "out", method="slerp")
    with pytest.raises(RecipeError, match="needs at least two"):
        shardmix.merge({sources[0]: 1.0}, tmp_path / "out")
