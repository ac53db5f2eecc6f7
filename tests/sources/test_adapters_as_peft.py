"""PEFT's `merge_and_unload` in float32 is the oracle of every variant of LoRA."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import shardmix
from tests.support.models import load_model

peft = pytest.importorskip("peft", reason="peft, the oracle of adapters, is not installed")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

MOST_ERROR = 1e-6
"""Of the largest magnitude in the tensor."""
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def llama():
    config = transformers.LlamaConfig(**SMALL, attention_bias=True)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    """A model of Conv1D layers, some of them square."""
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=40, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def gpt_oss():
    """Experts that are stacked and transposed, of matrices that are square."""
    config = transformers.GptOssConfig(
        **SMALL | {"intermediate_size": 32}, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def qwen_moe():
    """Experts that transformers stacks, and whose files store them one by one."""
    config = transformers.Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=4
    )
    return transformers.Qwen2MoeForCausalLM(config)


def mixtral():
    """The same, under other names."""
    config = transformers.MixtralConfig(**SMALL | {"intermediate_size": 24}, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def vit():
    """A class whose names are not those of its files."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=56,
        image_size=32,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


class Convolutions(transformers.PreTrainedModel):
    """Convolutions of one, two and three dimensions."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.one = torch.nn.Conv1d(6, 8, 3)
        self.two = torch.nn.Conv2d(6, 8, (3, 2))
        self.point = torch.nn.Conv2d(6, 8, 1)
        self.three = torch.nn.Conv3d(6, 8, 2)
        self.post_init()


def convolutions():
    return Convolutions(transformers.PretrainedConfig())


def save_pair(folder: Path, make, config, seed: int) -> None:
    """Save a base and an adapter of random values."""
    torch.manual_seed(seed)
    make().save_pretrained(folder / "base")
    model = peft.get_peft_model(make(), peft.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
        elif parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "lora")


def assert_as_peft(folder: Path, make, config, *, seed: int = 0) -> None:
    save_pair(folder, make, config, seed)
    base = type(make()).from_pretrained(folder / "base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, folder / "lora").merge_and_unload()
    merged.save_pretrained(folder / "expected")
    expected = load_model(folder / "expected")
    shardmix.merge({f"{folder / 'base'}+{folder / 'lora'}": 1.0}, folder / "out")
    before = load_model(folder / "base")
    out = load_model(folder / "out")
    assert set(out) == set(expected)
    for name, tensor in expected.items():
        error = (out[name] - tensor).abs().max() if tensor.numel() else 0
        assert error <= MOST_ERROR * tensor.abs().max(), name
    assert any(not torch.equal(out[name], before[name]) for name in out)


VARIANTS = {
    "plain": (llama, {"target_modules": PROJECTIONS}),
    "rslora": (llama, {"target_modules": PROJECTIONS, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": PROJECTIONS,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6, "^model.layers.0.mlp": 9},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, r".*\.1\..*_proj": 5},
        },
    ),
    "dora": (llama, {"target_modules": PROJECTIONS, "use_dora": True}),
    "lora_bias": (llama, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "bias_all": (llama, {"target_modules": ["q_proj", "k_proj"], "bias": "all"}),
    "bias_lora_only": (llama, {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embeddings_dora": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "modules_to_save": (
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 96, 5]}),
    "parameters": (llama, {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d_unsaid": (gpt2, {"target_modules": ["c_proj"]}),
    "conv1d_dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "convolutions": (convolutions, {"target_modules": ["one", "two", "point", "three"]}),
    "convolutions_dora": (
        convolutions,
        {"target_modules": ["one", "two", "point", "three"], "use_dora": True},
    ),
    "convolutions_bias": (convolutions, {"target_modules": ["one", "two"], "lora_bias": True}),
    "experts": (
        gpt_oss,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "experts_stored_apart": (
        qwen_moe,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    "experts_of_other_names": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "class_names": (
        vit,
        {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
    ),
    "experts_half": (
        gpt_oss,
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_as_peft(tmp_path, variant):
    make, config = VARIANTS[variant]
    assert_as_peft(tmp_path, make, {"r": 4, "lora_alpha": 7, **config})


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rank=st.integers(1, 32),
    alpha=st.floats(0.1, 64),
    is_stabilised=st.booleans(),
    is_scaled=st.booleans(),
    modules=st.lists(st.sampled_from([*PROJECTIONS, "embed_tokens"]), min_size=1, unique=True),
    ranks=st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from([r"layers\.0\..*", "q_proj"]), st.integers(1, 99)),
    seed=st.integers(0, 1000),
)
def test_any_config_is_as_peft(
    tmp_path_factory, rank, alpha, is_stabilised, is_scaled, modules, ranks, alphas, seed
):
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": is_stabilised,
        "use_dora": is_scaled,
        "target_modules": modules,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    assert_as_peft(tmp_path_factory.mktemp("pair"), llama, config, seed=seed)


@pytest.mark.filterwarnings("ignore")
def test_grouped_convolution_is_refused(tmp_path):
    """PEFT refuses to merge it, too."""

    def grouped():
        model = convolutions()
        model.one = torch.nn.Conv1d(6, 8, 3, groups=2)
        return model

    save_pair(tmp_path, grouped, {"r": 4, "target_modules": ["one"]}, 0)
    with pytest.raises(shardmix.SourceError, match=r"one\.weight, a convolution in groups"):
        shardmix.plan_merge({f"{tmp_path / 'base'}+{tmp_path / 'lora'}": 1.0})


@pytest.mark.filterwarnings("ignore")
def test_other_kinds_are_refused(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    kinds = {
        "IA³": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "LoHa": peft.LoHaConfig(target_modules=["k_proj"]),
        "LoKr": peft.LoKrConfig(target_modules=["k_proj"]),
        "OFT": peft.OFTConfig(target_modules=["k_proj"], oft_block_size=4),
        "VeRA": peft.VeraConfig(target_modules=["q_proj"]),
        "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "aLoRA": peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2]
        ),
    }
    for number, (name, config) in enumerate(kinds.items()):
        folder = tmp_path / str(number)
        peft.get_peft_model(llama(), config).save_pretrained(folder)
        assert load_file(folder / "adapter_model.safetensors")
        with pytest.raises(shardmix.SourceError, match=f"is not applied here: {name}"):
            shardmix.plan_merge({f"{tmp_path / 'base'}+{folder}": 1.0})
