"""What a config states of dtypes: true of the tensors, for the whole model and for each part."""

import json

import pytest
import torch

import shardmix
from shardmix.matching.config_dtypes import config_dtypes, with_dtypes
from tests.support.models import random_tensor, save_model

F32, BF16, F16 = "float32", "bfloat16", "float16"


def dtypes(config, tensors):
    """Return path → dtype for name → (dtype, bytes)."""
    return config_dtypes(config, [(name, *tensor) for name, tensor in tensors.items()])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_most_bytes_decide(key):
    """Norms in float32 are few bytes and many tensors of a model in bfloat16; and reversed."""
    tensors = {f"layers.{i}.norm.weight": (F32, 4 * 8) for i in range(9)}
    tensors["layers.0.mlp.weight"] = (BF16, 2 * 8 * 8 * 8)
    for stated in (F32, BF16, "torch.float32"):
        config = {"model_type": "x", key: stated}
        found = dtypes(config, tensors)
        assert found == {"": BF16}
        assert with_dtypes(config, found) == {"model_type": "x", key: BF16}
    swapped = {name: ({F32: BF16, BF16: F32}[dtype], n) for name, (dtype, n) in tensors.items()}
    assert dtypes({key: BF16}, swapped) == {"": F32}


def parts(text=BF16, vision=F32, whole=BF16, **more):
    return {
        "model_type": "llava",
        "dtype": whole,
        "text_config": {"model_type": "llama", "dtype": text},
        "vision_config": {"model_type": "clip", "dtype": vision},
        **more,
    }


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ("model.language_model.layers.0.w", "model.vision_tower.vision_model.encoder.layers.0.w"),
        ("language_model.model.layers.0.w", "vision_tower.encoder.layers.0.w"),
        ("text_model.encoder.layers.0.w", "vision_model.encoder.layers.0.w"),
        ("model.layers.0.w", "visual.blocks.0.w"),
        ("model.layers.0.w", "model.vision_backbone.blocks.0.w"),
    ],
)
def test_each_part_keeps_its_own(text, vision):
    tensors = {text: (BF16, 10), "lm_head.weight": (BF16, 5), vision: (F32, 1000)}
    config = parts()
    assert with_dtypes(config, dtypes(config, tensors)) == config
    # A config of another model, which was float32 throughout.
    stale = parts(text=F32, vision=F32, whole=F32)
    assert with_dtypes(stale, dtypes(stale, tensors))["text_config"]["dtype"] == BF16
    stale = parts(text=F16, vision=F16, whole=F16)
    assert with_dtypes(stale, dtypes(stale, tensors)) == config


def test_one_dtype_is_that_of_every_part():
    config = parts(odd_config={"dtype": F16}, thinker={"text_config": {"torch_dtype": F32}})
    found = dtypes(config, {"a": (BF16, 1), "b.c": (BF16, 1)})
    changed = with_dtypes(config, found)
    assert changed == parts(
        vision=BF16, odd_config={"dtype": BF16}, thinker={"text_config": {"torch_dtype": BF16}}
    )


def test_what_cannot_be_told_stays():
    """The vision part's tensors have names that we do not know: they may be any of them."""
    config = parts()
    tensors = {"model.layers.0.w": (BF16, 10), "eyes.0.w": (F32, 1000)}
    assert with_dtypes(config, dtypes(config, tensors)) == config
    assert with_dtypes(parts(whole=F16), dtypes(parts(whole=F16), tensors))["dtype"] == F32


def test_parts_within_parts_are_told_apart():
    config = {
        "dtype": BF16,
        "thinker_config": {
            "model_type": "thinker",
            "dtype": BF16,
            "text_config": {"model_type": "t", "dtype": F16},
            "audio_config": {"model_type": "a", "dtype": F16},
        },
        "talker_config": {
            "model_type": "talker",
            "dtype": F16,
            "text_config": {"model_type": "t", "dtype": F16},
        },
    }
    tensors = {
        "thinker.model.layers.0.w": (BF16, 10),
        "thinker.audio_tower.layers.0.w": (F32, 100),
        "talker.model.layers.0.w": (F32, 10),
    }
    found = dtypes(config, tensors)
    assert found["thinker_config.text_config"] == BF16
    assert found["thinker_config.audio_config"] == F32
    assert found["talker_config"] == found["talker_config.text_config"] == F32
    assert with_dtypes(config, found)["dtype"] == BF16


def test_encoder_and_decoder_are_parts():
    config = {
        "dtype": F32,
        "encoder": {"model_type": "vit", "dtype": BF16},
        "decoder": {"model_type": "gpt2", "dtype": F32},
    }
    tensors = {"encoder.layer.0.w": (F32, 100), "decoder.transformer.h.0.w": (BF16, 10)}
    changed = with_dtypes(config, dtypes(config, tensors))
    assert (changed["encoder"]["dtype"], changed["decoder"]["dtype"]) == (F32, BF16)
    assert changed["dtype"] == F32


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("codec_config", "codec_model"),
        ("vq_config", "model.vqmodel"),
        ("audio_config", "model.audio_tokenizer"),
        ("semantic_model_config", "semantic_encoder"),
        ("image_config", "image_model"),
        ("depth_decoder_config", "depth_decoder"),
    ],
)
def test_a_part_is_known_by_its_name(key, module):
    config = {"dtype": F32, key: {"model_type": "x", "dtype": F32}}
    tensors = {"layers.0.w": (F32, 10), f"{module}.layers.0.w": (BF16, 1000)}
    tensors |= {"speech_decoder_model.w": (F32, 1), "text_projection.weight": (F32, 1)}
    changed = with_dtypes(config, dtypes(config, tensors))
    assert (changed["dtype"], changed[key]["dtype"]) == (F32, BF16)


def test_settings_that_are_no_parts_stay():
    """Settings that are no parts are let be."""
    config = {
        "dtype": BF16,
        "quantization_config": {"dtype": F16, "model_type": "x"},
        "attn_config": {"softmax_scale": 1, "kv": {"dtype": F16}},
    }
    tensors = {"a": (BF16, 10), "norm": (F32, 1)}
    assert with_dtypes(config, dtypes(config, tensors)) == config


def test_floatless_model_keeps_its_dtype():
    """A model without floats states what it did."""
    config = parts()
    assert dtypes(config, {}) == {}
    assert with_dtypes(config, {}) == config


def multimodal(folder, config, text=torch.bfloat16, vision=torch.float32):
    tensors = {
        "language_model.model.norm.weight": random_tensor((8,), text),
        "vision_tower.layers.0.weight": random_tensor((64, 8), vision),
    }
    return save_model(folder, tensors, config=config)


def written(tmp_path, config, **options):
    models = [(multimodal(tmp_path / name, config), 0.5) for name in "ab"]
    shardmix.merge(models, tmp_path / "out", **options)
    return json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_merge_keeps_the_parts_dtypes(tmp_path):
    assert written(tmp_path, parts()) == parts()


def test_merge_states_one_dtype_throughout(tmp_path):
    """A merge in one dtype says so throughout."""
    config = written(tmp_path, parts(), dtype="float16")
    assert config == parts(text=F16, vision=F16, whole=F16)


def test_tensors_tell_dtype_of_other_config(tmp_path):
    """A merge with a config source of another dtype is told by its tensors."""
    base = multimodal(tmp_path / "base", parts(F16, F16, F16), torch.float16, torch.float16)
    assert written(tmp_path, parts(), config_from=base) == parts()
