"""A config beside tensors: its own, or those of models whose output it was named for."""

import json

import pytest
import torch

import shardmix
from shardmix.errors import MismatchError, SourceError
from shardmix.matching.config_fit import config_misfits
from tests.support.models import load_model, save_model

SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj": (16, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }.items()
    },
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
CLASSIFIER = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "id2label": {"0": "a", "1": "b"},
}
T5 = {"model_type": "t5", "vocab_size": 32, "d_model": 16, "num_layers": 2, "num_decoder_layers": 3}
T5_SHAPES = {
    "shared.weight": (32, 16),
    **{f"encoder.block.{n}.layer.0.layer_norm.weight": (16,) for n in range(2)},
    **{f"decoder.block.{n}.layer.0.layer_norm.weight": (16,) for n in range(3)},
}
LAYERS = {f"model.layers.{n}.mlp.up_proj.weight": (24, 16) for n in range(3)}


def changed(*removed, **changes):
    return {key: value for key, value in {**CONFIG, **changes}.items() if key not in removed}


def in_part(config):
    return {"model_type": "llava", "text_config": config, "vision_config": {"hidden_size": 99}}


def placed(place):
    tower = {"model.vision_tower.layers.5.self_attn.q_proj.weight": (99, 99)}
    return {name.replace("model.", place, 1): shape for name, shape in SHAPES.items()} | tower


CASES = {
    "its own": (CONFIG, SHAPES, {}),
    "nothing": ({}, SHAPES, {}),
    "nothing of sizes": ({"model_type": "llama"}, SHAPES, {}),
    "more words": (changed(vocab_size=48), SHAPES, {"vocab_size": True}),
    "fewer words": (changed(vocab_size=24), SHAPES, {"vocab_size": True}),
    "fewer words of own code": (
        changed(model_type="own", vocab_size=24),
        SHAPES,
        {"vocab_size": False},
    ),
    "padded words of own code": (
        changed(model_type="own", vocab_size=30, padded_vocab_size=32),
        SHAPES,
        {},
    ),
    "width": (changed(hidden_size=8), SHAPES, {"hidden_size": True}),
    "width of an embedding": (
        changed(model_type="albert", hidden_size=64, embedding_size=16),
        SHAPES,
        {},
    ),
    "width of an embedding by default": (
        changed("embedding_size", model_type="albert", hidden_size=64),
        SHAPES,
        {"hidden_size": False},
    ),
    "fewer layers": (changed(num_hidden_layers=1), SHAPES, {"num_hidden_layers": True}),
    "more layers": (changed(num_hidden_layers=4), SHAPES, {"num_hidden_layers": True}),
    "layers that predict more": (
        changed(model_type="deepseek_v3", num_nextn_predict_layers=1, kv_lora_rank=2),
        {**SHAPES, **LAYERS},
        {},
    ),
    "layers of a predictor": (
        CONFIG,
        {**SHAPES, **{f"mtp.layers.{n}.mlp.up_proj.weight": (9, 9) for n in range(7)}},
        {},
    ),
    "layers that are shared": (
        {"model_type": "albert", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 12},
        {
            "albert.embeddings.word_embeddings.weight": (32, 16),
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": (24, 16),
        },
        {},
    ),
    "encoder and decoder": (T5, T5_SHAPES, {}),
    "layers of a decoder": ({**T5, "num_decoder_layers": 4}, T5_SHAPES, {"num_layers": True}),
    "intermediate size": (changed(intermediate_size=99), SHAPES, {"intermediate_size": True}),
    "heads": (changed(num_attention_heads=5), SHAPES, {"num_attention_heads": False}),
    "heads and no width of one": (changed("head_dim", num_attention_heads=5), SHAPES, {}),
    "gated heads": (changed(head_dim=2), SHAPES, {}),
    "part": (in_part(CONFIG), placed("model.language_model."), {}),
    "older place of a part": (in_part(CONFIG), placed("language_model.model."), {}),
    "words of a part": (
        {**in_part(changed(vocab_size=48)), "vocab_size": 32},
        placed("model.language_model."),
        {"text_config.vocab_size": True},
    ),
    "layers of a part": (
        in_part(changed(num_hidden_layers=6)),
        placed("model.language_model."),
        {"text_config.num_hidden_layers": True},
    ),
    "several vocabularies": (
        changed(vocab_size=48),
        {**SHAPES, "decoder.embed_tokens.weight": (9, 16)},
        {},
    ),
    "no embedding": (CONFIG, {"w": (3, 3), "layers.9.w": (3,)}, {}),
    "labels": (CLASSIFIER, {"classifier.weight": (2, 16)}, {}),
    "more labels": (CLASSIFIER, {"classifier.weight": (3, 16)}, {"id2label": True}),
    "labels of RoBERTa's head": (
        {**CLASSIFIER, "architectures": ["RobertaForSequenceClassification"]},
        {"classifier.dense.weight": (16, 16), "classifier.out_proj.weight": (3, 16)},
        {"id2label": True},
    ),
    "labels that nobody reads": (
        {**CLASSIFIER, "architectures": ["BertForMultipleChoice"]},
        {"classifier.weight": (1, 16)},
        {},
    ),
    "a model type that is none": (changed(model_type=[]), SHAPES, {}),
    "numbers that are none": (
        changed(vocab_size="32", hidden_size=None, num_hidden_layers=True, head_dim=[]),
        SHAPES,
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_config_is_held_against_tensors(name):
    config, shapes, expected = CASES[name]
    found = config_misfits(config, list(shapes), list(shapes.values()))
    assert {misfit.key: misfit.is_certain for misfit in found} == expected


def test_a_misfit_names_both_sides():
    (misfit,) = config_misfits(changed(vocab_size=48), list(SHAPES), list(SHAPES.values()))
    assert misfit.finding == "vocab_size is 48, but model.embed_tokens.weight has 32 rows"


def save(folder, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return save_model(folder, tensors, config=changed(**changes))


def models(tmp_path, **changes):
    return [(save(tmp_path / "a"), 0.5), (save(tmp_path / "b", 1, **changes), 0.5)]


def test_a_base_of_another_size_is_refused(tmp_path):
    base = save(tmp_path / "base", vocab_size=48)
    with pytest.raises(
        MismatchError, match=r"vocab_size is 48.*name another model with --config-from"
    ):
        shardmix.plan_merge(models(tmp_path), config_from=base)
    plan = shardmix.plan_merge(models(tmp_path), config_from=base, allow_differences="vocab_size")
    assert any("vocab_size is 48" in warning for warning in plan.warnings)


def test_one_contradiction_is_told_once(tmp_path):
    """Tensors and the models' own configs both contradict the base's."""
    base = save(tmp_path / "base", num_hidden_layers=7)
    with pytest.raises(MismatchError) as caught:
        shardmix.plan_merge(models(tmp_path), config_from=base)
    assert str(caught.value).count(" 7") == 1


def test_a_base_of_another_kind_is_refused(tmp_path):
    base = save(tmp_path / "base", model_type="mistral")
    with pytest.raises(MismatchError, match=r'model_type: "llama" in .*, "mistral" in .*base'):
        shardmix.plan_merge(models(tmp_path), config_from=base)


def test_a_base_without_a_tokenizer_is_fine(tmp_path):
    base = save(tmp_path / "base")
    assert shardmix.plan_merge(models(tmp_path), config_from=base).warnings == ()


def test_first_models_config_is_looked_at(tmp_path):
    """The first model's own config is looked at."""
    pairs = [(save(tmp_path / name, vocab_size=48), 0.5) for name in "ab"]
    with pytest.raises(MismatchError, match="correct it there, or use --config-from"):
        shardmix.plan_merge(pairs)
    plan = shardmix.plan_merge(pairs, config_from=save(tmp_path / "base"))
    assert plan.config_source_name == "base"


STALE = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_stale_quantisation_has_two_ways_on(tmp_path, key):
    """A stale quantisation is named, with two ways on."""
    with pytest.raises(SourceError, match=rf"\(bitsandbytes, in {key}\).*stale; remove it"):
        shardmix.plan_merge(models(tmp_path, **{key: STALE}))
    (warning,) = shardmix.plan_merge(
        models(tmp_path, **{key: STALE}), allow_differences=["quantization_config"]
    ).warnings
    assert key in warning


@pytest.mark.parametrize("part", [None, "text_config"])
def test_an_allowed_quantisation_is_left_out(tmp_path, part):
    """The output has the weights of the mean and a config that declares nothing of codes."""
    more = {"quantization_config": STALE} if part is None else {part: {"quantization": STALE}}
    pairs = [(save(tmp_path / name, seed, **more), 0.5) for seed, name in enumerate("ab")]
    report = shardmix.merge(pairs, tmp_path / "out", allow_differences=["quantization_config"])
    assert any("left out of the output" in warning for warning in report.warnings)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == (CONFIG if part is None else {**CONFIG, part: {}})
    merged, first, second = (
        load_model(path) for path in (tmp_path / "out", *(p for p, _ in pairs))
    )
    name = "model.embed_tokens.weight"
    assert torch.equal(merged[name], (first[name] * 0.5 + second[name] * 0.5))
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_quantised_config_source_is_refused(tmp_path):
    """A config source that declares a quantisation is refused.

    Floats beside such a config would not load.
    """
    base = save(tmp_path / "base", quantization_config=STALE)
    with pytest.raises(MismatchError, match=r"quantization_config.*no weight of the merge is"):
        shardmix.plan_merge(models(tmp_path), config_from=base)
    shardmix.merge(
        models(tmp_path),
        tmp_path / "out",
        config_from=base,
        allow_differences="quantization_config",
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


def test_codes_stay_refused(tmp_path):
    """Codes stay refused, whatever is allowed."""
    tensors = {"layer.qweight": torch.zeros(4, 4, dtype=torch.int32), "w": torch.ones(2)}
    for config in ({}, {"quantization_config": {"quant_method": "gptq"}}):
        folder = save_model(tmp_path / f"q{len(config)}", tensors, config=config)
        with pytest.raises(SourceError, match="quantised codes"):
            shardmix.plan_merge(
                [(folder, 0.5), (folder, 0.5)], allow_differences="quantization_config"
            )


def test_floats_quantised_in_use_are_refused(tmp_path):
    """Floats that are quantised in use stay refused.

    BitNet's floats are what its classes quantise; without its config they are another model.
    """
    pairs = models(tmp_path, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(SourceError, match=r"is quantised \(bitnet"):
        shardmix.plan_merge(pairs, allow_differences="quantization_config")
