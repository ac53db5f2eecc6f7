"""Models with LoRA adapters applied while they are read, from the words to the verified output."""

import json
import os
import pickle

import pytest
import torch
from click.testing import CliRunner

import shardmix
from shardmix.cli.commands import app
from shardmix.errors import SourceChangedError, SourceError
from shardmix.scoring import score
from shardmix.sources.resolve import open_source
from tests.support.adapters import PREFIX, random_adapter, save_adapter, with_adapter
from tests.support.cut_off import cut_off
from tests.support.language_models import TEXTS, save_language_model
from tests.support.models import (
    assert_same_bits,
    load_model,
    random_tensor,
    round_once,
    save_model,
    weighted_sum,
)

SHAPES = {
    "model.embed_tokens.weight": (301, 96),
    **{f"model.layers.{n}.mlp.up_proj.weight": (1000 + n, 517) for n in range(3)},
    **{f"model.layers.{n}.mlp.down_proj.weight": (96, 700 + 64 * n) for n in range(3)},
    "model.norm.weight": (96,),
}
MODULES = [name.removesuffix(".weight") for name in SHAPES if "proj" in name]


def random_base(seed=0, dtype=torch.bfloat16):
    return {
        name: random_tensor(shape, seed=100 * seed + row).to(dtype)
        for row, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.fixture
def base(tmp_path):
    tensors = random_base()
    names = sorted(tensors)
    save_model(tmp_path / "base", tensors, shards=[names[:3], names[3:]])
    return tensors


@pytest.fixture
def adapters(tmp_path, base):
    """Two adapters, of which the second leaves some modules alone."""
    found = []
    for seed, modules in enumerate((MODULES, MODULES[1:4])):
        found.append(random_adapter(base, modules, seed=seed, dtype=torch.bfloat16))
        save_adapter(tmp_path / f"lora{seed}", found[-1])
    return found


def rounded(tensors, dtype=torch.bfloat16):
    return {
        name: round_once(tensor.double().numpy(), dtype) if tensor.dtype != dtype else tensor
        for name, tensor in tensors.items()
    }


WAYS = [{"io": "pread"}, {"io": "mmap"}, {"backend": "torch"}, {"workers": 1}, {"workers": 3}]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_adapter_is_merged_in(tmp_path, base, adapters, way):
    """One model with an adapter; each value is rounded once, to the base's dtype."""
    shardmix.merge({f"{tmp_path}/base+{tmp_path}/lora0": 1.0}, tmp_path / "out", **way)
    assert_same_bits(load_model(tmp_path / "out"), rounded(with_adapter(base, adapters[0])))


@pytest.mark.parametrize("chunk", ["90MiB", "150MiB"])
def test_chunks_do_not_matter(tmp_path, base, adapters, chunk):
    text, budget = f"{tmp_path}/base+{tmp_path}/lora0", f"{chunk}"
    plan = shardmix.plan_merge({text: 1.0}, workers=1)
    least = plan.memory.projected_peak_nbytes - 4 * plan.memory.chunk_nbytes
    options = {"max_memory": least + int(budget[:-3]) * 2**13, "workers": 1}
    shardmix.merge({text: 1.0}, tmp_path / "out", **options)
    assert_same_bits(load_model(tmp_path / "out"), rounded(with_adapter(base, adapters[0])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_float_is_changed(tmp_path, dtype):
    """In float32, or float64 if the base is."""
    tensors = random_base(3, dtype)
    matrices = random_adapter(tensors, MODULES, seed=7)
    text = f"{save_model(tmp_path / 'base', tensors)}+{save_adapter(tmp_path / 'lora', matrices)}"
    shardmix.merge({text: 1.0}, tmp_path / "out")
    expected = rounded(with_adapter(tensors, matrices), dtype)
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_stacked_adapters_follow_in_order(tmp_path, base, adapters):
    shardmix.merge({f"{tmp_path}/base+{tmp_path}/lora0+{tmp_path}/lora1": 1.0}, tmp_path / "out")
    expected = with_adapter(with_adapter(base, adapters[0]), adapters[1])
    assert_same_bits(load_model(tmp_path / "out"), rounded(expected))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_adapted_models_are_summed(tmp_path, base, adapters, way):
    texts = [f"{tmp_path}/base+{tmp_path}/lora{number}" for number in range(2)]
    shardmix.merge([(texts[0], 0.75), (texts[1], 0.25)], tmp_path / "out", **way)
    models = [with_adapter(base, each) for each in adapters]
    expected = {
        name: weighted_sum([model[name] for model in models], [0.75, 0.25], torch.bfloat16)
        for name in base
    }
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_words_may_be_one_source(tmp_path, base, adapters):
    """With or without a weight, on the command line and in a recipe."""
    text = f"{tmp_path}/base+{tmp_path}/lora0"
    recipe = tmp_path / "recipe.yaml"
    model = {"model": {"path": f"{tmp_path}/base"}, "lora": {"path": f"{tmp_path}/lora0"}}
    content = {"models": [{"model": model, "parameters": {"weight": 1}}], "merge_method": "linear"}
    recipe.write_text(json.dumps(content))
    expected = rounded(with_adapter(base, adapters[0]))
    for number, word in enumerate((text, f"{text}=1", str(recipe))):
        out = tmp_path / f"out{number}"
        result = CliRunner().invoke(app, ["merge", word, "-o", str(out), "--quiet"])
        assert result.exit_code == 0, result.output
        assert_same_bits(load_model(out), expected)
    result = CliRunner().invoke(app, ["merge", f"{tmp_path}/base=1", "-o", str(tmp_path / "no")])
    assert "a merge needs at least two" in result.output


def test_cut_off_merge_goes_on(tmp_path, base, adapters):
    large = {name: tensor.repeat(12, 1) for name, tensor in base.items() if tensor.ndim == 2}
    save_model(tmp_path / "large", large)
    matrices = random_adapter(large, MODULES)
    save_adapter(tmp_path / "lora", matrices)
    models = {f"{tmp_path}/large+{tmp_path}/lora": 1.0}
    cut_off(models, tmp_path / "out", num_leaves=2)
    report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    assert_same_bits(load_model(tmp_path / "out"), rounded(with_adapter(large, matrices)))


def test_another_adapter_is_another_merge(tmp_path, base, adapters):
    """Saved work tells by its adapters' files that it is of another merge."""
    large = {name: tensor.repeat(12, 1) for name, tensor in base.items() if tensor.ndim == 2}
    save_model(tmp_path / "large", large)
    save_adapter(tmp_path / "lora", random_adapter(large, MODULES))
    models = {f"{tmp_path}/large+{tmp_path}/lora": 1.0}
    cut_off(models, tmp_path / "out", num_leaves=2)
    save_adapter(tmp_path / "lora", random_adapter(large, MODULES), lora_alpha=9)
    with pytest.raises(shardmix.OutputError, match=r"lora/adapter_config.json has changed since"):
        shardmix.merge(models, tmp_path / "out")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_changed_adapter_is_found(tmp_path, base, adapters, file):
    source = open_source(f"{tmp_path}/base+{tmp_path}/lora0")
    source.check_unchanged()
    os.utime(tmp_path / "lora0" / file, ns=(0, 0))
    with pytest.raises(SourceChangedError, match=file):
        source.check_unchanged()


def test_output_is_verified(tmp_path, base, adapters):
    """Beside their output the sources are found by name; elsewhere by path, recorded or given."""
    text = f"{tmp_path}/base+{tmp_path}/lora0"
    shardmix.merge({text: 1.0}, tmp_path / "out")
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified
    shardmix.merge({text: 1.0}, tmp_path / "far" / "out", record_paths=True)
    assert shardmix.verify(tmp_path / "far" / "out", recompute=True).is_verified
    record = json.loads((tmp_path / "out" / "shardmix.json").read_text())
    assert str(tmp_path) not in json.dumps(record)
    (tmp_path / "lora0").rename(tmp_path / "moved")
    given = {"1": f"{tmp_path}/base+{tmp_path}/moved"}
    assert shardmix.verify(tmp_path / "out", recompute=True, sources=given).is_verified
    (tmp_path / "moved").rename(tmp_path / "lora0")
    assert record["sources"][0]["name"] == "base+lora0"
    assert record["sources"][0]["adapters"] == [{"name": "lora0"}]
    assert "`base+lora0`" in (tmp_path / "out" / "README.md").read_text()
    save_adapter(tmp_path / "lora0", random_adapter(base, MODULES, seed=9, dtype=torch.bfloat16))
    assert not shardmix.verify(tmp_path / "out", recompute=True).is_verified
    (tmp_path / "lora1").rename(tmp_path / "renamed")
    given = {"1": f"{tmp_path}/base+{tmp_path}/renamed"}
    with pytest.raises(SourceError, match=r"is not the base\+lora0 that was merged"):
        shardmix.verify(tmp_path / "out", recompute=True, sources=given)


def test_plan_is_pickled(tmp_path, base, adapters):
    plan = shardmix.plan_merge({f"{tmp_path}/base+{tmp_path}/lora0": 1.0})
    again = pickle.loads(pickle.dumps(plan))
    assert again.digest() == plan.digest()


def test_unchanged_tensors_stay_extents(tmp_path, base, adapters):
    source = open_source(f"{tmp_path}/base+{tmp_path}/lora1")
    changed = {f"{module}.weight" for module in MODULES[1:4]}
    for row, name in enumerate(source.tensors.names):
        assert (source.extent(row) is None) == (name in changed)


@pytest.mark.parametrize("method", ["task_arithmetic", "slerp"])
def test_every_method_takes_adapters(tmp_path, base, adapters, method):
    """It merges the values that the adapted model would have if it were saved in float32."""
    changed = {name: tensor.float() for name, tensor in with_adapter(base, adapters[0]).items()}
    save_model(tmp_path / "changed", changed)
    parameters = {"weight": 0.7} if method == "task_arithmetic" else {"t": 0.3}
    options = {"method": method, "base_model": tmp_path / "base", "parameters": parameters}
    shardmix.merge([f"{tmp_path}/base+{tmp_path}/lora0"], tmp_path / "out", **options)
    shardmix.merge([tmp_path / "changed"], tmp_path / "expected", **options)
    assert_same_bits(load_model(tmp_path / "out"), load_model(tmp_path / "expected"))


def test_adapted_models_are_scored(tmp_path):
    """The losses are those of the model with the adapter merged in."""
    path = save_language_model("llama", tmp_path / "base", dtype=torch.float32)
    tensors = load_model(path)
    modules = [name.removesuffix(".weight") for name in tensors if "_proj" in name]
    matrices = random_adapter(tensors, modules)
    save_adapter(tmp_path / "lora", matrices)
    text = f"{path}+{tmp_path / 'lora'}"
    shardmix.merge({text: 1.0}, tmp_path / "out")
    report = score([text, tmp_path / "out", path], "decoder", TEXTS, max_memory="4GiB")
    assert report.losses[0] == report.losses[1] != report.losses[2]


@pytest.mark.parametrize(
    ("adapter_prefix", "base_prefix"),
    [("base_model.model.", ""), ("base_model.model.model.", "x."), ("base_model.", "bert.")],
)
def test_prefixes_are_matched(tmp_path, adapter_prefix, base_prefix):
    """The base may store names of another class of its family."""
    plain = {f"encoder.layer.{n}.dense.weight": random_tensor((6, 5), seed=n) for n in range(12)}
    base = {base_prefix + name: tensor for name, tensor in plain.items()}
    modules = [name.removesuffix(".weight") for name in plain]
    matrices = random_adapter(plain, modules, prefix=adapter_prefix)
    text = f"{save_model(tmp_path / 'base', base)}+{save_adapter(tmp_path / 'lora', matrices)}"
    shardmix.merge({text: 1.0}, tmp_path / "out")
    changed = with_adapter(plain, matrices, prefix=adapter_prefix)
    expected = {base_prefix + name: tensor for name, tensor in changed.items()}
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_another_base_is_warned_of(tmp_path, base):
    matrices = random_adapter(base, MODULES)
    for name, is_same in [("org/base", True), ("/x/base/", True), ("org/other", False)]:
        save_adapter(tmp_path / "lora", matrices, base_model_name_or_path=name)
        plan = shardmix.plan_merge({f"{tmp_path}/base+{tmp_path}/lora": 1.0})
        assert any("was trained on" in warning for warning in plan.warnings) != is_same


def test_output_lies_in_no_adapter(tmp_path, base, adapters):
    text = f"{tmp_path}/base+{tmp_path}/lora0"
    with pytest.raises(shardmix.OutputError, match=r"is the input .*lora0 or lies inside it"):
        shardmix.plan_merge({text: 1.0}, tmp_path / "lora0" / "out")


def test_private_adapters_keep_it_private(tmp_path, base, adapters):
    for path in (tmp_path / "base").iterdir():
        path.chmod(0o644)
    (tmp_path / "lora0" / "adapter_model.safetensors").chmod(0o600)
    report = shardmix.merge({f"{tmp_path}/base+{tmp_path}/lora0": 1.0}, tmp_path / "out")
    assert any("lora0" in note for note in report.notes)


def test_wide_embeddings_are_adapted(tmp_path):
    """Matrices that are too large to keep are read piece by piece, with the same bits."""
    wide = {"embed.weight": random_tensor((2, 300_000), seed=1).bfloat16()}
    matrices = random_adapter(wide, ["embed"], rank=40)
    text = f"{save_model(tmp_path / 'base', wide)}+"
    save_adapter(tmp_path / "lora", matrices, r=40, lora_alpha=20)
    shardmix.merge({f"{text}{tmp_path / 'lora'}": 1.0}, tmp_path / "out")
    expected = rounded(with_adapter(wide, matrices, scaling=0.5))
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_embedding_matrices_are_swapped(tmp_path):
    tall = {"embed.weight": random_tensor((70_000, 8), seed=1).bfloat16()}
    matrices = random_adapter(tall, ["embed"])
    swapped = {
        f"{PREFIX}embed.lora_embedding_A": matrices[f"{PREFIX}embed.lora_B.weight"].T.contiguous(),
        f"{PREFIX}embed.lora_embedding_B": matrices[f"{PREFIX}embed.lora_A.weight"].T.contiguous(),
    }
    text = f"{save_model(tmp_path / 'base', tall)}+{save_adapter(tmp_path / 'lora', swapped)}"
    shardmix.merge({text: 1.0}, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), rounded(with_adapter(tall, matrices)))


def test_numpy_gives_the_same_bits(tmp_path, base, adapters, monkeypatch):
    """Without llvmlite, numpy computes what kernels do."""
    from shardmix.sources import adapted

    monkeypatch.setattr(adapted, "kernel", lambda dtype: None)
    shardmix.merge({f"{tmp_path}/base+{tmp_path}/lora0": 1.0}, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), rounded(with_adapter(base, adapters[0])))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp"])
def test_base_is_read_once(tmp_path, base, adapters, monkeypatch, method):
    """Of eight adapters on one base, one reads it; if changes are what counts, none does.

    What no adapter changes is read once, too.
    """
    num_bytes = 0
    read = os.preadv

    def counted(descriptor, buffers, offset):
        nonlocal num_bytes
        count = read(descriptor, buffers, offset)
        if "/base/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            num_bytes += count
        return count

    texts = [f"{tmp_path}/base+{tmp_path}/lora{number % 2}" for number in range(8)]
    for number in range(2):  # of which each changes all that is a matrix
        save_adapter(tmp_path / f"lora{number}", random_adapter(base, MODULES, seed=number))
    options = {"io": "pread", "backend": "torch", "method": method}
    if method == "linear":
        models = [(text, 1 / 8) for text in texts]
    else:
        models = texts[:1] if method == "slerp" else [(text, 1 / 8) for text in texts]
        options |= {"base_model": tmp_path / "base"}
        options |= {"parameters": {"t": 0.3}} if method == "slerp" else {}
    monkeypatch.setattr(os, "preadv", counted)
    shardmix.merge(models, tmp_path / "out", **options)
    changed = sum(base[f"{module}.weight"].nbytes for module in MODULES)
    others = sum(tensor.nbytes for tensor in base.values()) - changed
    # For slerp both models' values count, and tensors are held whole.
    assert num_bytes == (changed + others) * (2 if method == "slerp" else 1)


def test_changes_are_taken_as_they_are(tmp_path, base):
    """Task arithmetic with the adapters' base takes B·A itself, not fl(W + B·A) - W."""
    matrices = [random_adapter(base, MODULES, seed=seed) for seed in range(2)]
    texts = []
    for number, each in enumerate(matrices):
        tiny = {name: tensor * 1e-8 for name, tensor in each.items()}
        matrices[number] = tiny
        save_adapter(tmp_path / f"tiny{number}", tiny)
        texts.append(f"{tmp_path}/base+{tmp_path}/tiny{number}")
    stacked = f"{texts[0]}+{tmp_path}/tiny1"
    options = {"method": "task_arithmetic", "base_model": tmp_path / "base", "dtype": "float32"}
    shardmix.merge([(texts[0], 2.0**30), (stacked, 0.5)], tmp_path / "out", **options)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in base.items()}
    one = with_adapter(zeros, matrices[0])
    both = with_adapter(one, matrices[1])
    expected = {
        name: tensor.float() + (one[name] * 2.0**30 + both[name] * 0.5)
        for name, tensor in base.items()
    }
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_scaled_changes_are_subtracted(tmp_path, base):
    """DoRA has no change that is known without its base."""
    matrices = random_adapter(base, MODULES)
    for module in MODULES:
        size = base[f"{module}.weight"].shape[0]
        matrices[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.rand(size)
    save_adapter(tmp_path / "lora", matrices, use_dora=True)
    source = open_source(f"{tmp_path}/base+{tmp_path}/lora")
    assert source.changes_to(open_source(str(tmp_path / "base"))) is None


def test_experts_may_be_stacked(tmp_path):
    """An adapter of single experts fits a base that stacks them, with the same bits."""
    config = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}
    prefix = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (7, 5), "up_proj": (7, 5), "down_proj": (5, 7)}
    apart = {
        f"{prefix}.{expert}.{name}.weight": random_tensor(shape, seed=10 * expert + len(name))
        for expert in range(3)
        for name, shape in shapes.items()
    }
    modules = [name.removesuffix(".weight") for name in apart if ".1.up" not in name]
    matrices = random_adapter(apart, modules, rank=3)
    save_adapter(tmp_path / "lora", matrices, r=3, rank_pattern={})

    def stacked(tensors):
        of = {
            name: [tensors[f"{prefix}.{expert}.{name}.weight"] for expert in range(3)]
            for name in shapes
        }
        gate_up = [torch.cat(pair) for pair in zip(of["gate_proj"], of["up_proj"], strict=True)]
        return {
            f"{prefix}.gate_up_proj": torch.stack(gate_up),
            f"{prefix}.down_proj": torch.stack(of["down_proj"]),
        }

    save_model(tmp_path / "base", stacked(apart), config=config)
    shardmix.merge({f"{tmp_path}/base+{tmp_path}/lora": 1.0}, tmp_path / "out")
    scaling = float(torch.tensor(8 / 3))
    expected = stacked(with_adapter(apart, matrices, scaling=scaling))
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_pickled_adapters_are_applied(tmp_path, base, adapters):
    """As those in safetensors, and nothing in them is run."""
    folder = save_adapter(tmp_path / "pickled", {})
    (folder / "adapter_model.safetensors").unlink()
    strided = {name: tensor.T.contiguous().T for name, tensor in adapters[0].items()}
    torch.save(strided, folder / "adapter_model.bin")
    shardmix.merge({f"{tmp_path}/base+{folder}": 1.0}, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), rounded(with_adapter(base, adapters[0])))


def test_quantised_base_is_adapted(tmp_path):
    """What is decoded is changed before it is rounded."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn((256, 384), generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand((2, 3), generator=generator)
    tensors = {"q.weight": codes, "q.weight_scale_inv": scales, "norm.weight": torch.ones(4)}
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    save_model(tmp_path / "base", tensors, config={"quantization_config": quantisation})
    blocks = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    decoded = {"q.weight": codes.float() * blocks, "norm.weight": torch.ones(4)}
    matrices = random_adapter(decoded, ["q"])
    save_adapter(tmp_path / "lora", matrices)
    text = f"{tmp_path}/base+{tmp_path}/lora"
    shardmix.merge({text: 1.0}, tmp_path / "out", dtype="float32")
    assert_same_bits(load_model(tmp_path / "out"), with_adapter(decoded, matrices))
