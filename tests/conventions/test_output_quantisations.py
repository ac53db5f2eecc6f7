"""What is quantised is what transformers' FP8 loader holds as codes, and it loads."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import shardmix
from shardmix.conventions.output_quantisations import linear_weights
from shardmix.errors import RecipeError
from tests.support.fp8_reference import decoded, quantised
from tests.support.sampling import sample
from tests.support.small_configs import small_config

CLASSES = [
    "BartForConditionalGeneration",
    "BertForMaskedLM",
    "BloomForCausalLM",
    "CLIPModel",
    "CohereForCausalLM",
    "DebertaV2ForMaskedLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DistilBertForMaskedLM",
    "ElectraForMaskedLM",
    "GPTJForCausalLM",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Glm4MoeForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "JambaForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "ModernBertForMaskedLM",
    "MptForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "OlmoeForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "RobertaForMaskedLM",
    "SiglipModel",
    "StableLmForCausalLM",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
]
QUANTIZE = {"quantize": "fp8-blocks", "fsync": False}


def save_small(folder, name, seed=0, **changes):
    torch.manual_seed(seed)
    cls = getattr(transformers, name)
    cls(small_config(cls, **changes)).float().save_pretrained(folder)
    return cls


def stored_in(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def held_as_codes(cls, quantisation):
    """Return the modules that the loader holds as codes: linear layers, and experts."""
    with torch.device("meta"):
        model = cls(small_config(cls))
    config = transformers.FineGrainedFP8Config(**quantisation)
    FineGrainedFP8HfQuantizer(config, pre_quantized=True)._process_model_before_weight_loading(
        model
    )
    modules = list(model.named_modules())
    return [
        {name for name, module in modules if isinstance(module, kind)}
        for kind in (FP8Linear, FP8Experts)
    ]


@pytest.mark.parametrize("name", sample("quantised classes", CLASSES, 8))
def test_transformers_loads_it(tmp_path, name):
    """Dequantised by transformers, each parameter has the bits of what our own reader decodes."""
    cls = save_small(tmp_path / "model", name)
    shardmix.convert(tmp_path / "model", tmp_path / "out", **QUANTIZE)
    shardmix.convert(tmp_path / "out", tmp_path / "decoded", dtype="float32")
    stored = stored_in(tmp_path / "out")
    coded = {each for each in stored if f"{each}_scale_inv" in stored}
    for each, values in stored_in(tmp_path / "decoded").items():
        scales = stored.get(f"{each}_scale_inv")
        assert torch.equal(values, decoded(stored[each], scales) if each in coded else stored[each])
    found, info = cls.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    expected = cls.from_pretrained(tmp_path / "decoded", dtype=torch.float32).state_dict()
    found = found.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each], expected[each]) for each in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    linear, experts = held_as_codes(cls, config["quantization_config"])
    assert len(linear) == len([each for each in coded if ".experts." not in each])
    assert bool(experts) == any(".experts." in each for each in coded)


@pytest.mark.parametrize("name", ["FalconForCausalLM", "GPT2LMHeadModel"])
def test_other_linear_classes_are_refused(tmp_path, name):
    """The loader knows no layers of these classes."""
    save_small(tmp_path / "model", name)
    with pytest.raises(RecipeError, match="nothing to quantise"):
        shardmix.convert(tmp_path / "model", tmp_path / "out", **QUANTIZE)


def test_deepseek_v3_is_as_published():
    """Of its names the same are codes as in the published checkpoint, its last layer included."""
    layer = "model.layers.61"
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    experts = [
        f"mlp.{each}.{part}_proj"
        for each in ("experts.0", "experts.255", "shared_experts")
        for part in ("gate", "up", "down")
    ]
    coded = [
        f"{layer}.{each}.weight" for each in (*(f"self_attn.{a}" for a in attention), *experts)
    ]
    floats = [
        *(f"{layer}.{each}.weight" for each in ("eh_proj", "embed_tokens", "mlp.gate")),
        *(f"{layer}.shared_head.{each}.weight" for each in ("head", "norm")),
        *("model.embed_tokens.weight", "lm_head.weight"),
    ]
    shapes = dict.fromkeys((*coded, *floats), (7168, 7168))
    assert list(linear_weights(shapes, {"model_type": "deepseek_v3"})) == coded


@pytest.mark.parametrize(
    ("name", "is_coded"),
    [
        ("layers.0.q_proj.weight", True),
        ("0.q_proj.weight", True),
        ("model.layers.11.attention.output.dense.weight", True),
        ("model.pooler.dense.weight", False),
        ("layers.0.xq_proj.weight", False),
        ("layers.0.q_proj.bias", False),
        ("layers.0.q_proj.0.weight", False),
        ("layers.\u0663.q_proj.weight", False),
        ("layers.0x.q_proj.weight", False),
        ("1." * 2_000_000 + "q_projector.weight", False),  # whoever tries each part takes years
        ("1." * 2_000_000 + "experts.down_project", False),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_names_decide(name, is_coded):
    for shape in ((4, 4), (4, 4, 4)):
        assert list(linear_weights({name: shape}, {})) == [name] * (is_coded and len(shape) == 2)


@pytest.mark.parametrize(
    ("up", "down", "more", "is_coded"),
    [
        ((4, 64, 32), (4, 32, 32), (), True),
        ((4, 32, 64), (4, 32, 32), (), False),  # inputs before outputs, as Llama 4 has them
        ((4, 64, 32), (4, 32, 32), ("down_proj_bias",), False),
        ((4, 64, 32), None, (), False),
    ],
    ids=["outputs first", "inputs first", "with a bias", "one of two"],
)
def test_fused_experts(up, down, more, is_coded):
    module = "model.layers.0.mlp.experts"
    shapes = {f"{module}.gate_up_proj": up, **{f"{module}.{each}": (4, 32) for each in more}}
    if down is not None:
        shapes[f"{module}.down_proj"] = down
    assert len(list(linear_weights(shapes, {}))) == 2 * is_coded


def test_fused_experts_load(tmp_path):
    """As transformers dequantises them."""
    name = "layers.0.mlp.experts"
    tensors = {f"{name}.gate_up_proj": torch.randn(3, 512, 256)}
    tensors[f"{name}.down_proj"] = torch.randn(3, 256, 256)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "test"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shardmix.convert(folder, tmp_path / "out", **QUANTIZE)
    stored = stored_in(tmp_path / "out")
    for each in tensors:
        codes, scales = stored[each], stored[f"{each}_scale_inv"]
        found = Fp8Dequantize(SimpleNamespace())._dequantize_one(codes, scales, torch.float32)
        assert torch.equal(found, decoded(codes, scales))


@pytest.mark.parametrize("shape", [(300, 128), (200, 128), (128, 200)], ids=str)
def test_ragged_blocks_are_misread(shape):
    """By transformers' dequantisation, of which the plan warns; if this fails, it need not."""
    codes, scales = quantised(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    try:
        found = Fp8Dequantize(SimpleNamespace())._dequantize_one(codes, scales, torch.float32)
    except ValueError:
        return
    assert not torch.equal(found, decoded(codes, scales))


def test_a_llama_from_fp8_loads(tmp_path):
    """A merge of an FP8 base and a tuned model in bfloat16 loads, with the bits of the merge."""
    cls = save_small(tmp_path / "a", "LlamaForCausalLM")
    save_small(tmp_path / "b", "LlamaForCausalLM", seed=1)
    shardmix.convert(tmp_path / "a", tmp_path / "fp8", **QUANTIZE)
    shardmix.merge({str(tmp_path / "fp8"): 0.5, str(tmp_path / "b"): 0.5}, tmp_path / "out")
    found, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert getattr(found.config, "quantization_config", None) is None
    base = cls.from_pretrained(tmp_path / "fp8", dtype=torch.float32).state_dict()
    other = cls.from_pretrained(tmp_path / "b", dtype=torch.float32).state_dict()
    for name, values in found.state_dict().items():
        mean = 0.5 * base[name] + 0.5 * other[name]
        assert torch.equal(values.float(), mean.to(values.dtype).float()), name


def test_a_gpt_oss_from_mxfp4_loads(tmp_path):
    """Merged to bfloat16, it loads with the parameters that transformers itself dequantises."""
    cls = save_small(tmp_path / "model", "GptOssForCausalLM", intermediate_size=64)
    stored = stored_in(tmp_path / "model")
    stored = {name: x.bfloat16() if x.is_floating_point() else x for name, x in stored.items()}
    g = torch.Generator().manual_seed(3)
    for name in [each for each in stored if each.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        for ending, low, high, size in (("blocks", 0, 256, shape), ("scales", 118, 124, shape[:3])):
            codes = torch.randint(low, high, size, generator=g, dtype=torch.uint8)
            stored[f"{name}_{ending}"] = codes
    save_file(stored, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    path.write_text(json.dumps({**config, "dtype": "bfloat16"}))
    shardmix.merge([(tmp_path / "model", 0.5)] * 2, tmp_path / "out")
    found, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    quantisation = transformers.Mxfp4Config(dequantize=True)
    expected = cls.from_pretrained(tmp_path / "model", quantization_config=quantisation)
    assert found.dtype == expected.dtype == torch.bfloat16
    expected = expected.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, values in found.state_dict().items():
        assert torch.equal(values, expected[name]), name
