"""Tensors that a source decodes while they are read, from the plan to the verified output."""

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmix
from shardmix.scoring import score
from shardmix.system.units import MIB
from tests.support.cut_off import cut_off, folder_bytes
from tests.support.language_models import TEXTS, save_language_model
from tests.support.models import random_tensor, save_model
from tests.support.negated_source import MARK, READER_NBYTES, add_decoder, add_kind

SHAPES = {
    **{f"layer{number}.weight": (500 + number, 1000) for number in range(9)},
    "norm.weight": (1000,),
    "empty": (0, 3),
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Return pairs of which the second stores matrices negated, and the same as plain models."""
    add_kind(monkeypatch)
    names = sorted(SHAPES)
    pairs, plain = [], []
    for number, weight in enumerate((0.6, 0.4)):
        tensors = {
            name: random_tensor(shape, seed=20 * number + row).bfloat16()
            for row, (name, shape) in enumerate(SHAPES.items())
        }
        shards = [names[:5], names[5:]]
        path = save_model(tmp_path / f"plain{number}", tensors, shards=shards)
        plain.append((path, weight))
        if number:
            stored = {name: -x if x.ndim == 2 else x for name, x in tensors.items()}
            path = save_model(tmp_path / "negated", stored, shards=shards)
            (path / MARK).touch()
        pairs.append((path, weight))
    return pairs, plain


def weights_of(folder):
    return {name: data for name, data in folder_bytes(folder).items() if "safetensors" in name}


@pytest.mark.parametrize("way", [{"io": "pread"}, {"io": "mmap"}, {"backend": "torch"}], ids=str)
@pytest.mark.parametrize("is_first", [False, True], ids=["second", "first"])
def test_decoded_values_are_merged(tmp_path, models, way, is_first):
    """The output has the bytes of a merge of the decoded models, its layout included."""
    pairs, plain = (each[::-1] if is_first else each for each in models)
    shardmix.merge(pairs, tmp_path / "out", **way)
    shardmix.merge(plain, tmp_path / "expected")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_outputs_keep_the_model_s_dtype(tmp_path, models, monkeypatch, dtype):
    """Values that are decoded to float32 are merged so, and rounded to the dtype of the model."""
    _, plain = models
    shardmix.merge(plain, tmp_path / "expected", dtype=dtype)
    add_decoder(monkeypatch)
    shardmix.merge(plain, tmp_path / "out", dtype=dtype)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


def test_neighbours_are_one_segment(models):
    """Of decoded tensors that follow one another no segment ends between them."""
    segments = shardmix.plan_merge(models[0]).segments()
    assert [(segment.name, segment.num_tensors) for segment in segments] == [
        ("layer0.weight", 4),
        ("layer4.weight", 5),
        ("norm.weight", 1),
    ]


def test_the_budget_counts_readers(models):
    pairs, plain = models
    for workers in (1, 3):
        decoded, stored = (shardmix.plan_merge(each, workers=workers) for each in (pairs, plain))
        more = decoded.memory.projected_peak_nbytes - decoded.memory.reserved_nbytes
        usual = stored.memory.projected_peak_nbytes - stored.memory.reserved_nbytes
        assert more - usual == workers * READER_NBYTES
    assert decoded.memory.reserved_nbytes - stored.memory.reserved_nbytes < 8 * MIB


def test_cut_off_decoding_goes_on(tmp_path, models):
    pairs, plain = models
    cut_off(pairs, tmp_path / "out", num_leaves=1)
    report = shardmix.merge(pairs, tmp_path / "out")
    assert report.bytes_kept > 0
    shardmix.merge(plain, tmp_path / "expected")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "expected")


def test_decoded_sources_are_verified(tmp_path, models):
    """The merge computed again, from the decoded sources, is what the output holds."""
    pairs, _ = models
    shardmix.merge(pairs, tmp_path / "out", record_paths=True)
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified
    (pairs[1][0] / MARK).unlink()
    assert not shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_a_plan_with_decoders_is_pickled(models):
    plan = shardmix.plan_merge(models[0])
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.digest() == plan.digest()
    assert [each.text for each in again.decoders] == [str(models[0][1][0])]
    with pytest.raises(ValueError, match="is no JSON"):
        plan.to_json()


def test_the_digest_tells_of_decoding(models):
    """From the same files, a plan that decodes is another than one that does not."""
    pairs, _ = models
    decoding = shardmix.plan_merge(pairs).digest()
    (pairs[1][0] / MARK).unlink()
    assert shardmix.plan_merge(pairs).digest() != decoding


def test_decoded_models_are_scored(tmp_path, monkeypatch):
    """The scorer reads through the same reader: the losses are those of the decoded model."""
    add_kind(monkeypatch)
    plain = save_language_model("llama", tmp_path / "plain", dtype=torch.bfloat16)
    negated = tmp_path / "negated"
    shutil.copytree(plain, negated)
    (negated / MARK).touch()
    for path in negated.glob("*.safetensors"):
        stored = {name: -x if x.ndim == 2 else x for name, x in load_file(path).items()}
        save_file(stored, path, metadata={"format": "pt"})
    report = score([plain, negated], "decoder", TEXTS, max_memory="4GiB")
    assert report.losses[0] == report.losses[1]
    assert report.bytes_read > 0
