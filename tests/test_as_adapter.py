"""Adapters put side by side: PEFT on the output equals the weighted sum of PEFT on each."""

import json
import re
import warnings

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import shardmix
from shardmix.cli.commands import app
from tests.sources.test_adapters_as_peft import (
    MOST_ERROR,
    PROJECTIONS,
    convolutions,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    peft,
    qwen_moe,
    transformers,
    vit,
)
from tests.support.adapters import PREFIX, random_adapter, save_adapter
from tests.support.cut_off import cut_off, folder_bytes, large_models
from tests.support.models import load_model, random_model, save_model
from tests.support.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore")


def t5():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=56, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


def save_peft(folder, make, seed, **config):
    """Save an adapter of random values, as PEFT does."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(make(), peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **config}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(make, base, adapter):
    """Return what PEFT makes of an adapter, and the warnings of keys that do not fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = type(make()).from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found = [str(each.message) for each in caught]
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    return state, [text for text in found if "missing" in text or "unexpected" in text]


def assert_sum(make, base, adapters, out):
    """Compare PEFT on the output with the base plus Σ weight · (PEFT on each - base)."""
    before = type(make()).from_pretrained(base, dtype=torch.float32).state_dict()
    expected = {name: tensor.double() for name, tensor in before.items()}
    for adapter, weight in adapters.items():
        for name, tensor in merged_by_peft(make, base, adapter)[0].items():
            expected[name] += weight * (tensor - before[name].double())
    found, misfits = merged_by_peft(make, base, out)
    assert misfits == []
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).abs().max()
        assert error <= MOST_ERROR * tensor.abs().max(), name
    assert any(not torch.equal(found[name], before[name].double()) for name in found)


MODULES = {"target_modules": ["q_proj", "up_proj"]}
EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
CONV1D = ["c_attn", "c_proj", "c_fc"]
PAIRS = {
    "plain": (llama, {"target_modules": PROJECTIONS}, {**MODULES, "use_rslora": True, "r": 3}),
    "patterns": (
        llama,
        {"target_modules": PROJECTIONS, "rank_pattern": {r"layers\.1\..*": 6}},
        {"target_modules": PROJECTIONS, "alpha_pattern": {"q_proj": 3}},
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "lm_head"]}, MODULES),
    "modules_to_save": (
        llama,
        {**MODULES, "modules_to_save": ["lm_head", "model.norm"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ),
    "biases": (
        llama,
        {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    "whole_biases": (llama, {**MODULES, "bias": "all"}, {**MODULES, "bias": "lora_only"}),
    "conv1d": (
        gpt2,
        {"target_modules": CONV1D, "fan_in_fan_out": True},
        {"target_modules": ["c_proj"], "task_type": "CAUSAL_LM"},
    ),
    "convolutions": (
        convolutions,
        {"target_modules": ["one", "two", "point", "three"]},
        {"target_modules": ["two", "three"], "r": 2},
    ),
    "parameters": (
        llama,
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
        {"target_modules": ["q_proj"]},
    ),
    "experts": (
        gpt_oss,
        EXPERTS,
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 2},
    ),
    "experts_stored_apart": (qwen_moe, EXPERTS, {**EXPERTS, "r": 3}),
    "experts_of_other_names": (
        mixtral,
        EXPERTS,
        {**EXPERTS, "rank_pattern": {"experts.down_proj": 2}},
    ),
    "class_names": (
        vit,
        {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]},
        {"target_modules": ["v_proj"]},
    ),
    "shared_embeddings": (
        t5,
        {"target_modules": ["q", "wi"], "task_type": "SEQ_2_SEQ_LM"},
        {"target_modules": ["q", "v"]},
    ),
}


@pytest.mark.parametrize("kind", sample("adapters side by side", PAIRS, 6))
def test_sum_is_as_peft(tmp_path, kind):
    make, *configs = PAIRS[kind]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    adapters = {
        save_peft(tmp_path / str(number), make, number, **config): weight
        for number, (config, weight) in enumerate(zip(configs, (0.5, -1.25), strict=True))
    }
    texts = {f"{tmp_path / 'base'}+{path}": weight for path, weight in adapters.items()}
    shardmix.merge(texts, tmp_path / "out", as_adapter=True)
    assert_sum(make, tmp_path / "base", adapters, tmp_path / "out")
    report = shardmix.verify(tmp_path / "out", recompute=True)
    assert report.problems == ()


def test_stack_is_two_adapters(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    paths = [save_peft(tmp_path / str(seed), llama, seed, **MODULES) for seed in (1, 2)]
    text = f"{tmp_path / 'base'}+{paths[0]}+{paths[1]}"
    shardmix.merge({text: 0.3}, tmp_path / "out", as_adapter=True)
    assert_sum(llama, tmp_path / "base", dict.fromkeys(paths, 0.3), tmp_path / "out")


@pytest.fixture
def pair(tmp_path):
    """A small base and two adapters on it, in bfloat16 and float32."""
    base = random_model(1)
    weights = [name for name, tensor in base.items() if tensor.dim() == 2 and tensor.numel()]
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    base = {f"{module}.weight": base[f"{module}.weight"] for module in modules}
    save_model(tmp_path / "base", base)
    a = random_adapter(base, modules, rank=4, seed=1, dtype=torch.bfloat16)
    b = random_adapter(base, modules[:1], rank=4, seed=2)
    save_adapter(tmp_path / "a", a, base_model_name_or_path="org/base")
    save_adapter(tmp_path / "b", b, base_model_name_or_path="org/base")
    return tmp_path, modules, a, b


def words_of(folder):
    return [f"{folder}/base+{folder}/a=1", f"{folder}/base+{folder}/b=0.3"]


def test_matrices_are_exact(pair):
    """A is copied; B is scaled in double precision and rounded once."""
    folder, modules, a, b = pair
    out = folder / "out"
    done = CliRunner().invoke(app, ["merge", *words_of(folder), "--as-adapter", "-o", str(out)])
    assert done.exit_code == 0, done.output
    stored = load_file(out / "adapter_model.safetensors")
    name_a, name_b = (f"{PREFIX}{modules[0]}.lora_{kind}.weight" for kind in "AB")
    assert torch.equal(stored[name_a], torch.cat([a[name_a].float(), b[name_a]]))
    scaled = [(2.0 * a[name_b].double()).float(), (0.3 * 2.0 * b[name_b].double()).float()]
    assert torch.equal(stored[name_b], torch.cat(scaled, dim=1))
    assert len(stored) == len(a)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert {path.name for path in out.iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "shardmix.json")
    }


def test_dtype_rounds_once(pair):
    folder, *_ = pair
    shardmix.merge({f"{folder}/base+{folder}/a": 1.0}, folder / "wide", as_adapter=True)
    shardmix.merge(
        {f"{folder}/base+{folder}/a": 1.0}, folder / "out", as_adapter=True, dtype="bfloat16"
    )
    wide, narrow = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("wide", "out")
    )
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_output_merges_as_its_sources(pair):
    folder, *_ = pair
    sources = {f"{folder}/base+{folder}/a": 1.0, f"{folder}/base+{folder}/b": 0.3}
    shardmix.merge(sources, folder / "adapter", as_adapter=True)
    options = {"method": "task_arithmetic", "base_model": folder / "base", "dtype": "float32"}
    shardmix.merge(sources, folder / "expected", **options)
    shardmix.merge({f"{folder}/base+{folder}/adapter": 1.0}, folder / "out", dtype="float32")
    expected, found = load_model(folder / "expected"), load_model(folder / "out")
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= MOST_ERROR * tensor.abs().max()


def test_recipe_asks_for_it(pair):
    folder, *_ = pair
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "as_adapter: true\nmodels:\n"
        + "".join(
            f"  - {{model: {folder}/base+{folder}/{name}, parameters: {{weight: {weight}}}}}\n"
            for name, weight in (("a", 1), ("b", 0.3))
        )
    )
    shardmix.merge(recipe, folder / "one")
    shardmix.merge(
        {f"{folder}/base+{folder}/a": 1.0, f"{folder}/base+{folder}/b": 0.3},
        folder / "two",
        as_adapter=True,
    )
    one, two = (folder_bytes(folder / name) for name in ("one", "two"))
    assert one["adapter_model.safetensors"] == two["adapter_model.safetensors"]


def test_cut_off_goes_on(tmp_path):
    ((base, _),) = large_models(tmp_path, num_models=1)
    tensors = load_model(base)
    modules = [f"layer{number}" for number in range(7)]
    save_adapter(tmp_path / "a", random_adapter(tensors, modules, rank=300), r=300)
    sources = {f"{base}+{tmp_path / 'a'}": 0.5}
    cut_off(sources, tmp_path / "out", num_leaves=2, as_adapter=True)
    report = shardmix.merge(sources, tmp_path / "out", as_adapter=True)
    assert report.bytes_kept > 0
    shardmix.merge(sources, tmp_path / "whole", as_adapter=True)
    whole, out = (folder_bytes(tmp_path / name) for name in ("whole", "out"))
    assert out["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "slerp", "-p", "t=0.5"], "slerp"),
        (["--max-shard-size", "1GB"], "max_shard_size: has no effect"),
        (["--base-model", "{folder}/base/+{folder}/a"], "has an adapter itself"),
        (["--base-model", "{folder}/other"], "is not an adapter on"),
        (["{folder}/other=1", "--base-model", "{folder}/base"], "is not an adapter on"),
        (["{folder}/other+{folder}/a=1"], "are adapters on 2 models"),
    ],
)
def test_bad_words_are_refused(pair, words, message):
    folder, *_ = pair
    save_model(folder / "other", load_model(folder / "base"))
    words = [word.format(folder=folder) for word in words]
    command = ["merge", *words_of(folder), "--as-adapter", "-o", str(folder / "out"), *words]
    done = CliRunner().invoke(app, command)
    assert done.exit_code in (1, 2), done.output
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr


def test_rank_needs_an_adapter(pair):
    folder, *_ = pair
    with pytest.raises(shardmix.RecipeError, match="rank: is for adapters"):
        shardmix.merge({f"{folder}/base+{folder}/a": 1.0}, folder / "out", rank=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MODULES, "use_dora": True}, "DoRA"),
        ({**MODULES, "trainable_token_indices": [3, 5]}, "trainable_token_indices"),
        ({"target_modules": ["up_proj"]}, "which has no bias"),
    ],
)
def test_no_sums_are_refused(tmp_path, config, message):
    """Beside an adapter with lora_bias, one on a module without a bias cannot stand."""
    llama().save_pretrained(tmp_path / "base")
    save_peft(tmp_path / "a", llama, 1, **config)
    save_peft(tmp_path / "b", llama, 2, target_modules=["q_proj"], lora_bias=True)
    texts = {f"{tmp_path / 'base'}+{tmp_path / name}": 1.0 for name in "ab"}
    with pytest.raises(shardmix.SourceError, match=message):
        shardmix.merge(texts, tmp_path / "out", as_adapter=True)


def test_zero_weights_write_nothing(pair):
    folder, *_ = pair
    with pytest.raises(shardmix.SourceError, match="no matrix of an adapter has an effect"):
        shardmix.merge({f"{folder}/base+{folder}/a": 0.0}, folder / "out", as_adapter=True)
