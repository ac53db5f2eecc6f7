"""Tensors that one model stores in one piece, another in several or with its elements turned.

The right values are those of numpy, by what transformers' operation does when it loads a model.
"""

import json
import pickle
from importlib.resources import files

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import shardmix
from shardmix.conventions.declarations import Renaming
from shardmix.errors import MismatchError
from shardmix.matching.fused_tensors import is_fusion
from shardmix.sources.gathering import BUFFER_NBYTES
from tests.support.adapters import random_adapter, save_adapter, with_adapter

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def save(folder, tensors, architecture, **config):
    folder.mkdir()
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )
    content = {"architectures": [architecture], **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def alternating(whole, axis):
    """Return a tensor with the even elements of an axis first, then the odd ones."""
    at = [slice(None)] * whole.ndim
    halves = []
    for first in range(2):
        at[axis] = slice(first, None, 2)
        halves.append(whole[tuple(at)])
    return halves


def apart_and_turned():
    """Return class, what a file stores, and what the class makes of it, for each operation."""
    whole, layer = random(10, 3), "model.layers.0.linear_attn"
    names = [f"{layer}.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")]
    parts = np.split(whole, [5, 8, 9])
    yield (
        "LaraMiniForCausalLM",
        {f"{layer}.in_proj.weight": whole},
        dict(zip(names, parts, strict=True)),
    )

    whole, mlp = random(2, 8, 3), "language_model.layers.0.mlp"
    gate_up = np.concatenate(alternating(whole, 1), 1)
    stored = {f"{mlp}.experts.w13_weight": whole}
    yield "InklingModel", stored, {f"{mlp}.experts.gate_up_proj": gate_up}

    whole = random(8, 3)
    names = [f"{mlp}.{part}_proj.weight" for part in ("gate", "up")]
    stored = {f"{mlp}.w13_dn.weight": whole}
    yield "InklingModel", stored, dict(zip(names, alternating(whole, 0), strict=True))

    whole = random(3, 8, 5)
    names = [f"{mlp}.shared_experts.{part}_proj" for part in ("gate", "up")]
    stored = {f"{mlp}.shared_experts.shared_w13_weight": whole}
    yield "InklingModel", stored, dict(zip(names, alternating(whole, 1), strict=True))

    whole, head = random(2, 5, 4), "decoder.layers.0.mixer.experts"
    stored = {f"{head}.down_projs": whole}
    turned = {f"{head}.down_proj": whole.transpose(0, 2, 1)}
    yield "Nemotron3_5TranscribeModel", stored, turned


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", range(5))
def test_a_file_has_it_in_one_piece(tmp_path, case, order):
    """The output has it as the class does, in either order of the models."""
    name, stored, of_class = list(apart_and_turned())[case]
    other = {key: random(*value.shape) for key, value in of_class.items()}
    folders = [save(tmp_path / "a", stored, name), save(tmp_path / "b", other, name)]
    report = shardmix.merge(dict.fromkeys(folders[::order], 0.5), tmp_path / "out", fsync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == other.keys()
    half = np.float32(0.5)
    for key, value in of_class.items():
        np.testing.assert_array_equal(found[key], half * value + half * other[key])
    assert any("one piece" in note or "another order" in note for note in report.warnings)
    sources = {str(at): folder for at, folder in enumerate(folders[::order], 1)}
    assert shardmix.verify(tmp_path / "out", recompute=True, sources=sources).is_verified


def test_the_class_has_it_in_one_piece(tmp_path):
    """Two parts of each row, and experts of text and images: a file has them apart."""
    whole, head = random(2, 6, 3), "language_model.layers.0"
    apart = {
        f"{head}.moe.gate_proj.weight": whole[:, :3],
        f"{head}.moe.up_proj.weight": whole[:, 3:],
    }
    fused = {f"{head}.mlp.experts.gate_up_proj": random(2, 6, 3)}
    models = [
        save(tmp_path / "a", apart, "Step3p7Model"),
        save(tmp_path / "b", fused, "Step3p7Model"),
    ]
    shardmix.merge(dict.fromkeys(models, 0.5), tmp_path / "out", fsync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == apart.keys()
    (other,) = fused.values()
    for rows, value in zip((slice(3), slice(3, None)), apart.values(), strict=True):
        right = np.float32(0.5) * value + np.float32(0.5) * other[:, rows]
        np.testing.assert_array_equal(found[next(k for k in apart if apart[k] is value)], right)


def test_experts_of_text_and_images(tmp_path):
    """Files number them through: the images' experts follow the text's."""
    name, head = "Ernie4_5_VLMoeModel", "language_model.layers.0.mlp"
    text, vision = random(2, 3, 4), random(2, 3, 4)
    fused = {
        f"{head}.text_moe.experts.down_proj": text,
        f"{head}.vision_moe.experts.down_proj": vision,
    }
    apart = {f"{head}.experts.{at}.down_proj.weight": random(3, 4) for at in range(4)}
    models = [save(tmp_path / "a", apart, name), save(tmp_path / "b", fused, name)]
    shardmix.merge(dict.fromkeys(models, 0.5), tmp_path / "out", fsync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == apart.keys()
    for at, value in enumerate((*text, *vision)):
        key = f"{head}.experts.{at}.down_proj.weight"
        right = np.float32(0.5) * apart[key] + np.float32(0.5) * value
        np.testing.assert_array_equal(found[key], right)


def test_every_conversion_is_known():
    """Those that transformers' classes declare are matched, or of a kind that is refused."""
    refused = {
        ("LayerPairCollapse",),
        ("PermuteForRope",),
        ("Chunk", "PermuteForRope"),
        ("Inkling2IndexOffsetWeightRename",),
        ("Inkling2UnpadVocab",),
        ("Inkling2LoopMergeMessageQueries",),
        ("Inkling2LoopDequantizeExperts",),
        ("Inkling2LoopDequantizeExperts", "Interleave"),
    }
    path = files("shardmix.conventions").joinpath("transformers_declarations.json")
    parts = json.loads(path.read_text())["parts"]
    renamings = [msgspec.convert(part, Renaming) for part in parts if "re" in part]
    unmatched = {r.kinds for r in renamings if r.ops and not is_fusion(r)}
    assert unmatched == refused


def test_a_table_in_numbered_parts(tmp_path):
    """Parts of any number and length, in the order of their numbers."""
    name, head = "Qwen4ExpTextModel", "ngram_embedding"
    parts = {f"{head}.shard_{at}.weight": random(rows, 2) for at, rows in enumerate((3, 4))}
    whole = {f"{head}.weight": random(7, 2)}
    models = [save(tmp_path / "a", whole, name), save(tmp_path / "b", parts, name)]
    shardmix.merge(dict.fromkeys(models, 0.5), tmp_path / "out", fsync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    right = np.float32(0.5) * whole[f"{head}.weight"] + np.float32(0.5) * np.concatenate(
        [*parts.values()]
    )
    np.testing.assert_array_equal(np.concatenate([found[key] for key in parts]), right)


@pytest.mark.parametrize("order", [1, -1])
def test_experts_under_one_name_transposed(tmp_path, order):
    """The output has them as the first model does: transformers tells by the shape."""
    name, key = "Qwen3VLMoeModel", "language_model.layers.0.mlp.experts.gate_up_proj"
    first, second = random(2, 3, 8), random(2, 8, 3)
    models = [save(tmp_path / "a", {key: first}, name), save(tmp_path / "b", {key: second}, name)]
    shardmix.merge(dict.fromkeys(models[::order], 0.5), tmp_path / "out", fsync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    half = np.float32(0.5)
    right = half * first + half * second.transpose(0, 2, 1)
    np.testing.assert_array_equal(found[key], right if order == 1 else right.transpose(0, 2, 1))


def test_transposed_elsewhere_is_refused(tmp_path):
    """A class that transformers does not turn is not turned here."""
    name, key = "Qwen3MoeForCausalLM", "model.layers.0.mlp.experts.gate_up_proj"
    tensors = random(2, 3, 8), random(2, 8, 3)
    models = [save(tmp_path / str(at), {key: each}, name) for at, each in enumerate(tensors)]
    with pytest.raises(MismatchError, match="shapes must match"):
        shardmix.merge(dict.fromkeys(models, 0.5), tmp_path / "out", fsync=False)


def test_uneven_thirds_are_refused(tmp_path):
    """Three equal parts are taken apart, as by torch's chunk; others are no parts of it."""
    name, head = "NomicBertModel", "encoder.layers.0.attn"
    whole = {f"{head}.Wqkv.weight": random(12, 4)}
    names = [f"layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    even = dict(zip(names, (random(4, 4), random(4, 4), random(4, 4)), strict=True))
    uneven = dict(zip(names, (random(8, 4), random(2, 4), random(2, 4)), strict=True))
    folder = save(tmp_path / "whole", whole, name)
    shardmix.merge({folder: 0.5, save(tmp_path / "even", even, name): 0.5}, tmp_path / "out")
    with pytest.raises(MismatchError):
        models = {folder: 0.5, save(tmp_path / "uneven", uneven, name): 0.5}
        shardmix.merge(models, tmp_path / "refused", fsync=False)


@pytest.mark.parametrize("case", [0, 2])
def test_an_adapted_tensor_is_taken_apart(tmp_path, case):
    """Pieces of a tensor that is computed while it is read; they may lie apart."""
    name, stored, of_class = list(apart_and_turned())[case]
    ((key, whole),) = stored.items()
    base = {key: torch.from_numpy(whole)}
    adapter = random_adapter(base, [key.removesuffix(".weight")])
    other = {each: random(*value.shape) for each, value in of_class.items()}
    folders = [save(tmp_path / "a", stored, name), save(tmp_path / "b", other, name)]
    text = f"{folders[0]}+{save_adapter(tmp_path / 'adapter', adapter)}"
    models = {text: 0.5, str(folders[1]): 0.5}
    plan = shardmix.plan_merge(models)
    assert pickle.loads(pickle.dumps(plan)).digest() == plan.digest()
    shardmix.merge(models, tmp_path / "out", fsync=False)
    found = load_file(tmp_path / "out" / "model.safetensors")
    changed = with_adapter(base, adapter)[key].numpy()
    parts = np.split(changed, [5, 8, 9]) if case == 0 else alternating(changed, 0)
    assert found.keys() == other.keys()
    for each, value in zip(of_class, parts, strict=True):
        right = np.float32(0.5) * value + np.float32(0.5) * other[each]
        np.testing.assert_array_equal(found[each], right)


def test_turned_tensors_take_little_memory(tmp_path):
    """A matrix larger than the chunk is turned piece by piece; the plan knows of the buffer."""
    name, key = "Qwen3VLMoeModel", "language_model.layers.0.mlp.experts.gate_up_proj"
    first, second = random(2, 300, 1100), random(2, 1100, 300)
    models = [save(tmp_path / "a", {key: first}, name), save(tmp_path / "b", {key: second}, name)]
    weights = dict.fromkeys(models, 0.5)
    plan = shardmix.plan_merge(weights, workers=1)
    assert plan.readers.worker_nbytes >= BUFFER_NBYTES
    least = plan.memory.projected_peak_nbytes - 4 * plan.memory.chunk_nbytes
    options = {"max_memory": least + (1 << 20), "workers": 1}
    assert shardmix.plan_merge(weights, **options).memory.chunk_nbytes < 1 << 20
    shardmix.merge(weights, tmp_path / "out", fsync=False, **options)
    found = load_file(tmp_path / "out" / "model.safetensors")[key]
    half = np.float32(0.5)
    np.testing.assert_array_equal(found, half * first + half * second.transpose(0, 2, 1))
