"""Models of some seventy architectures, stored in every way, merge to the mean of what they hold.

transformers is the judge. What it loads from two folders is averaged by torch; the merge of the
folders must load whole, to the same bits, and compute what a model with those values computes. What
transformers does not read must be refused. A sample of the architectures and ways runs, unless the
campaigns run whole.
"""

import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import shardmix
from shardmix.errors import ShardmixError
from tests.support import tie_matrix, tied_models
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.rewritten_folders import UNREAD, WAYS, as_saved
from tests.support.sampling import SAMPLING, sample
from tests.support.tie_states import NotWholeError, Values, load_whole

WEIGHTS = (0.3, 0.7)
DTYPES = (torch.float32, torch.bfloat16)
BY_NAME = {each.name: each for each in ARCHITECTURES}

_CASES = [(each.kind, each.name, way) for each in ARCHITECTURES for way in (*WAYS, *UNREAD)]


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with tie_matrix.quiet():
        yield


@pytest.mark.parametrize(
    ("kind", "name", "way"),
    sample("architectures and ways", _CASES, 24, kinds=lambda case: (case[0], case[2])),
)
def test_merge_is_the_mean(kind: str, name: str, way: str, tmp_path: Path) -> None:
    """A model that is stored in some way merges with one that save_pretrained has stored."""
    number = zlib.crc32(f"{name} {way}".encode())
    dtype, order = DTYPES[number % 2], (1, -1)[number // 2 % 2]
    architecture = BY_NAME[name]
    models = [tied_models.randomise(architecture.bare(), seed).to(dtype) for seed in (100, 200)]
    saved, stored, plain = (tmp_path / each for each in ("saved", "stored", "plain"))
    as_saved(models[0], saved)
    as_saved(models[1], plain)
    if not (WAYS | UNREAD)[way](models[1], stored):
        pytest.skip("stored this way, it is as save_pretrained stores it")
    folders = [saved, stored][::order]
    held = [_loaded(architecture, saved), _loaded(architecture, plain)]
    if way in WAYS:
        try:
            values = _loaded(architecture, stored)
        except NotWholeError:
            with pytest.raises(ShardmixError):
                _merge(folders, tmp_path / "output")
            return
        assert _differing(values, held[1]) == []
    _merge(folders, tmp_path / "output")
    mean = _mean(held[::order], dtype)
    # Positions that transformers computes, whatever a file says.
    computed = _differing(held[0], {k: v.float() for k, v in models[0].state_dict().items()})
    assert all(key.endswith("embed_positions.weight") for key in computed)
    mean |= {key: held[0][key] for key in computed}
    model = load_whole(architecture.cls, tmp_path / "output", dtype=torch.float32)
    assert _differing(model.state_dict(), mean) == []
    right = architecture.bare()
    right.load_state_dict(mean)
    inputs = architecture.arguments(right)
    expected = tied_models.outputs_of(right, inputs)
    assert tie_matrix.first_off(tied_models.outputs_of(model, inputs), expected) == ""
    # A tensor of one of the models in the mean's place would show.
    right.load_state_dict(held[0])
    assert tie_matrix.first_off(tied_models.outputs_of(right, inputs), expected) != ""


@pytest.mark.parametrize("name", sample("architectures in three ways", list(BY_NAME), 2))
def test_three_ways_at_once(name: str, tmp_path: Path) -> None:
    """Three models that are stored in three ways merge to the mean of what transformers reads.

    But for a base model's prefix beside tensors that are taken apart: such models are refused.
    """
    architecture, chance = BY_NAME[name], random.Random(f"{SAMPLING.seed} {name}")
    ways = [way for way in WAYS if way != "with base prefix"]
    ways.remove(chance.choice(["without base prefix", "names of the class"]))
    folders: list[Path] = []
    held: list[Values] = []
    for way in chance.sample(ways, len(ways)):
        model = tied_models.randomise(architecture.bare(), 100 * len(folders) + 100)
        folder = tmp_path / way
        if len(folders) == 3 or not WAYS[way](model, folder):
            continue
        try:
            held.append(_loaded(architecture, folder))
        except NotWholeError:
            continue
        folders.append(folder)
    _merge(folders, tmp_path / "output", weights=(0.25, 0.25, 0.5))
    for key, value in _loaded(architecture, tmp_path / "output").items():
        first, second, third = (each[key] for each in held)
        right = (0.25 * first + 0.25 * second) + 0.5 * third if value.is_floating_point() else first
        assert torch.equal(value, right) or key.endswith("embed_positions.weight"), key


@pytest.mark.parametrize("name", sample("architectures with a stranger's name", list(BY_NAME), 2))
def test_a_name_of_nobody_is_refused(name: str, tmp_path: Path) -> None:
    """A tensor of another name is not paired, though shapes and all other names fit."""
    architecture = BY_NAME[name]
    model = tied_models.randomise(architecture.bare(), 100)
    as_saved(model, tmp_path / "a")
    as_saved(model, tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    changed = random.Random(f"{SAMPLING.seed} {name}").choice(sorted(tensors))
    tensors[f"{changed}_of_nobody"] = tensors.pop(changed)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ShardmixError, match="of_nobody"):
        _merge([tmp_path / "a", tmp_path / "b"], tmp_path / "output")


def test_three_dozen_architectures() -> None:
    """Of every kind that people merge."""
    assert len({each.cls.config_class for each in ARCHITECTURES}) >= 60
    assert len({each.kind for each in ARCHITECTURES}) == 8


def _merge(folders: list[Path], output: Path, weights: tuple[float, ...] = WEIGHTS) -> None:
    models = list(zip(folders, weights, strict=True))
    shardmix.merge(models, output, fsync=False, workers=1, backend="torch")


def _loaded(architecture: Architecture, folder: Path) -> Values:
    """Return what transformers reads from a folder, in float32."""
    return dict(load_whole(architecture.cls, folder, dtype=torch.float32).state_dict())


def _mean(held: list[Values], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weighted sum in float32, rounded once to the dtype that is stored."""
    first, second = held
    return {
        name: (value * WEIGHTS[0] + second[name] * WEIGHTS[1]).to(dtype).float()
        if value.is_floating_point()
        else value
        for name, value in first.items()
    }


def _differing(values: Values, others: Values) -> list[str]:
    assert values.keys() == others.keys()
    return [name for name, value in values.items() if not torch.equal(value, others[name])]
