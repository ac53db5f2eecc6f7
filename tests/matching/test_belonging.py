"""Real models, made small by transformers: what belongs together, and what doesn't."""

import json

import pytest
import torch

import shardmix
from shardmix.errors import MismatchError
from tests.support.models import random_model, save_model

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SMALL, **TOKENS, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# Class → config class, arguments, and the changed key that another number of heads goes by.
CLASSES = {
    "LlamaForCausalLM": ("Llama", DECODER, {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "MistralForCausalLM": ("Mistral", {**DECODER, "head_dim": 4}, {"hidden_act": "gelu"}),
    "Qwen2ForCausalLM": ("Qwen2", DECODER, {"hidden_act": "relu"}),
    "Gemma2ForCausalLM": ("Gemma2", {**DECODER, "head_dim": 4}, {"query_pre_attn_scalar": 8}),
    "Gemma3ForCausalLM": ("Gemma3Text", {**DECODER, "head_dim": 4}, {"query_pre_attn_scalar": 8}),
    "MixtralForCausalLM": (
        "Mixtral",
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"num_experts_per_tok": 1},
    ),
    "GPT2LMHeadModel": (
        "GPT2",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
        {"n_head": 2},
    ),
    "OPTForCausalLM": (
        "OPT",
        {**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 24},
        {"num_attention_heads": 2},
    ),
    "FalconForCausalLM": ("Falcon", SMALL, {"alibi": True}),
    "BertForMaskedLM": ("Bert", SMALL, {"num_attention_heads": 2}),
    "BertForSequenceClassification": ("Bert", SMALL, {"hidden_act": "relu"}),
    "RobertaForSequenceClassification": ("Roberta", SMALL, {"num_attention_heads": 2}),
    "AlbertModel": ("Albert", {**SMALL, "embedding_size": 8}, {"num_attention_heads": 2}),
    "ElectraModel": ("Electra", {**SMALL, "embedding_size": 8}, {"num_attention_heads": 2}),
    "DistilBertForTokenClassification": (
        "DistilBert",
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
        {"n_heads": 2},
    ),
    "ModernBertForMaskedLM": (
        "ModernBert",
        {**SMALL, **TOKENS, "cls_token_id": 1},
        {"num_attention_heads": 2},
    ),
    "T5ForConditionalGeneration": ("T5", T5, {"feed_forward_proj": "silu"}),
    "BartForConditionalGeneration": ("Bart", BART, {"scale_embedding": True}),
    "ViTForImageClassification": ("ViT", VISION, {"num_attention_heads": 4}),
    "CLIPModel": (
        "CLIP",
        {
            "text_config": {**SMALL, "projection_dim": 8},
            "vision_config": {**VISION, "projection_dim": 8},
            "projection_dim": 8,
        },
        {"text_config": {**SMALL, "projection_dim": 8, "hidden_act": "gelu"}},
    ),
    "LlavaForConditionalGeneration": (
        "Llava",
        {
            "text_config": {"model_type": "llama", **DECODER},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": 5,
        },
        {"projector_hidden_act": "relu"},
    ),
}


def make(folder, name, seed, **changes):
    """Save a model; return its folder."""
    config_name, arguments, _ = CLASSES[name]
    config = getattr(transformers, f"{config_name}Config")(**{**arguments, **changes})
    torch.manual_seed(seed)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_models_of_a_class_belong_together(tmp_path, name):
    """Two models of a class belong together.

    Nothing is said, also when one stands beside the other as the base.
    """
    a, b = (make(tmp_path / folder, name, seed) for seed, folder in enumerate("ab"))
    assert shardmix.plan_merge([(a, 0.5), (b, 0.5)]).warnings == ()
    assert shardmix.plan_merge([(a, 0.5), (a, 0.5)], config_from=b).warnings == ()


@pytest.mark.parametrize("name", CLASSES)
def test_a_config_of_differences_is_the_same(tmp_path, name):
    """Transformers 4 wrote what differs from a class's defaults, and little else."""
    a, b = (make(tmp_path / folder, name, seed) for seed, folder in enumerate("ab"))
    config = transformers.AutoConfig.from_pretrained(b)
    written = json.loads((b / "config.json").read_text())
    short = {"model_type": written["model_type"], "architectures": written["architectures"]}
    short |= json.loads(json.dumps(config.to_diff_dict(), default=str))
    (b / "config.json").write_text(json.dumps(short))
    for pair in ([(a, 0.5), (b, 0.5)], [(b, 0.5), (a, 0.5)]):
        assert shardmix.plan_merge(pair).warnings == ()


@pytest.mark.parametrize("name", CLASSES)
def test_other_computation_is_refused(tmp_path, name):
    """Another computation of equal shapes is refused."""
    changes = CLASSES[name][2]
    pairs = [(make(tmp_path / "a", name, 0), 0.5), (make(tmp_path / "b", name, 1, **changes), 0.5)]
    with pytest.raises(MismatchError, match="use --allow-differences") as caught:
        shardmix.plan_merge(pairs)
    key = str(caught.value).partition("--allow-differences ")[2].split()[0]
    told = " ".join(shardmix.plan_merge(pairs, allow_differences=key).warnings)
    assert all(f"{word}: " in told or f"{word}.hidden_act: " in told for word in changes)


def test_llama_and_mistral_are_told_apart(tmp_path):
    a = make(tmp_path / "a", "LlamaForCausalLM", 0)
    torch.manual_seed(1)
    config = transformers.MistralConfig(**DECODER, sliding_window=None)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "b")
    with pytest.raises(MismatchError, match=r'"llama" in .*, "mistral" in '):
        shardmix.plan_merge([(a, 0.5), (tmp_path / "b", 0.5)])


def test_bert_and_roberta_are_told_apart(tmp_path):
    shapes = {**SMALL, "max_position_embeddings": 32, "type_vocab_size": 2}
    for name in ("Bert", "Roberta"):
        config = getattr(transformers, f"{name}Config")(**shapes)
        getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / name)
    with pytest.raises(MismatchError, match=r'"bert" in .*, "roberta" in '):
        shardmix.plan_merge([(tmp_path / "Bert", 0.5), (tmp_path / "Roberta", 0.5)])


def test_the_output_loads_with_what_it_takes(tmp_path):
    """A difference that is told of is the first model's, and the output loads with it."""
    a = make(tmp_path / "a", "LlamaForCausalLM", 0)
    theta = {"rope_type": "default", "rope_theta": 5e5}
    b = make(tmp_path / "b", "LlamaForCausalLM", 1, rope_parameters=theta)
    report = shardmix.merge([(a, 0.5), (b, 0.5)], tmp_path / "out")
    assert [w.partition(";")[2] for w in report.warnings] == [" the output takes 10000.0"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("value", [[], {}, "yes"])
def test_a_tie_of_any_kind_is_compared(tmp_path, value):
    """A stranger's config may say anything; what is no boolean says nothing of a tie."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    for name, more in (("a", {}), ("b", {"tie_word_embeddings": value})):
        save_model(tmp_path / name, random_model(1), config=config | more)
    shardmix.plan_merge({str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5})
