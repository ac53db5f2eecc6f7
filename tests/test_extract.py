"""Changes of a model as an adapter: PEFT on the output, and the errors that are reported."""

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import shardmix
from shardmix.cli.commands import app
from shardmix.output.factor_store import FactorStore
from tests.sources.test_adapters_as_peft import (
    MOST_ERROR,
    SMALL,
    gpt2,
    gpt_oss,
    llama,
    mixtral,
    transformers,
    vit,
)
from tests.support.adapters import PREFIX, random_adapter, save_adapter
from tests.support.cut_off import folder_bytes
from tests.support.models import load_model, save_model
from tests.support.quantised_models import FP8, fp8_blocks
from tests.support.sampling import sample
from tests.test_as_adapter import PAIRS, merged_by_peft, save_peft, t5

pytestmark = pytest.mark.filterwarnings("ignore")

MAKERS = {
    "llama": llama,
    "tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL | {"tie_word_embeddings": True})
    ),
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
}


def save_tuned(folder, make, *, rank=4, all_else=True, seed=0):
    """Save a base, and a model whose matrices differ by a low rank, and all else at random."""
    torch.manual_seed(seed)
    model = make()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rows, columns = parameter.shape
                parameter += 0.05 * torch.randn(rows, rank) @ torch.randn(rank, columns)
            elif all_else:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder / "tuned")
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_low_ranks_are_recovered(tmp_path, kind):
    """Norms, embeddings, biases and parameters that share a tensor among them."""
    expected = save_tuned(tmp_path, MAKERS[kind])
    report = shardmix.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    assert report.low_rank.relative_error <= 1e-7
    found, misfits = merged_by_peft(MAKERS[kind], tmp_path / "base", tmp_path / "out")
    assert misfits == []
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= MOST_ERROR * tensor.abs().max(), name
    shardmix.merge({f"{tmp_path / 'base'}+{tmp_path / 'out'}": 1.0}, tmp_path / "again")
    again, tuned = load_model(tmp_path / "again"), load_model(tmp_path / "tuned")
    for name, tensor in tuned.items():
        assert (again[name] - tensor).abs().max() <= MOST_ERROR * tensor.abs().max(), name
    assert shardmix.verify(tmp_path / "out").problems == ()


@pytest.fixture
def pair(tmp_path):
    """A base and a tuned model of three matrices; one changed by little, one not at all."""
    torch.manual_seed(0)
    shapes = {"big": (130, 70), "small": (40, 90), "same": (30, 30)}
    base = {f"layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    tuned = dict(base)
    for name, scale in (("big", 0.1), ("small", 0.001)):
        key = f"layers.0.{name}.weight"
        spectrum = torch.exp(-torch.arange(min(shapes[name])) / 6.0)
        u = torch.linalg.qr(torch.randn(shapes[name][0], len(spectrum)))[0]
        v = torch.linalg.qr(torch.randn(shapes[name][1], len(spectrum)))[0]
        tuned[key] = base[key] + scale * (u * spectrum) @ v.T
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", tuned)
    return tmp_path, base, tuned


def product(folder, name):
    stored = load_file(folder / "adapter_model.safetensors")
    a, b = (stored[f"{PREFIX}{name}.lora_{kind}.weight"].double() for kind in "AB")
    return b @ a


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_errors_are_the_measured_ones(pair, dtype):
    """And within 1.05 of the least, unless the factors are rounded to 16 bits."""
    folder, base, tuned = pair
    report = shardmix.extract(
        folder / "base", folder / "tuned", folder / "out", rank=5, dtype=dtype
    )
    errors = {each.name: each for each in report.low_rank.parameters}
    for name in ("layers.0.big", "layers.0.small"):
        change = tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        error = (change - product(folder / "out", name)).norm() / change.norm()
        found = errors[f"{name}.weight"]
        assert found.rank == 5
        assert found.relative_error == pytest.approx(float(error), rel=1e-6)
        assert found.energy == pytest.approx(1 - float(error) ** 2, rel=1e-6)
        least = torch.linalg.svdvals(change)[5:].norm() / change.norm()
        assert error <= (1.05 if dtype is None else 1.5) * least
    assert errors["layers.0.same.weight"].rank == 0
    stored = json.loads((folder / "out" / "low_rank.json").read_text())
    assert stored["relative_error"] == report.low_rank.relative_error
    assert [each["name"] for each in stored["parameters"]] == list(errors)
    assert "numpy" in stored["computed_by"][0]
    assert not any("same" in name for name in load_file(folder / "out/adapter_model.safetensors"))


def test_energy_chooses_ranks(pair):
    folder, base, tuned = pair
    report = shardmix.extract(
        folder / "base", folder / "tuned", folder / "out", rank=30, energy=0.9
    )
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    changed = [each for each in report.low_rank.parameters if each.rank]
    assert len(changed) == 2
    for each in changed:
        change = tuned[each.name].double() - base[each.name].double()
        squares = torch.linalg.svdvals(change).square()
        least = int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1
        module = each.name.removesuffix(".weight")
        assert each.rank == least
        assert each.energy >= 0.9 - 1e-6
        assert config["rank_pattern"].get(module, config["r"]) == least


def test_command_prints_the_errors(pair):
    folder, *_ = pair
    words = ["extract", f"{folder}/base", f"{folder}/tuned", "--rank", "3", "-o", f"{folder}/out"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "relative error" in done.output
    assert "layers.0.big.weight: rank 3" in done.output
    done = CliRunner().invoke(app, [*words, "--overwrite", "--json"])
    report = json.loads(done.stdout)
    assert {each["name"] for each in report["low_rank"]["parameters"]} >= {"layers.0.big.weight"}


def test_quantised_base_is_decoded(tmp_path):
    generator = torch.Generator().manual_seed(0)
    stored, values = fp8_blocks((200, 140), generator)
    base = {f"layers.0.up_proj.{name}": tensor for name, tensor in stored.items()}
    save_model(tmp_path / "base", base, config={"quantization_config": FP8})
    change = torch.randn(200, 2) @ torch.randn(2, 140)
    save_model(tmp_path / "tuned", {"layers.0.up_proj.weight": values + change})
    options = {"allow_differences": ["quantization_config"]}
    shardmix.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=2, **options)
    found = product(tmp_path / "out", "layers.0.up_proj")
    assert (found - change).norm() <= 1e-6 * change.norm()


def test_adapters_with_dora_are_extracted(tmp_path):
    """What no sum of matrices does is read from the model that it makes."""
    llama().save_pretrained(tmp_path / "base")
    save_peft(tmp_path / "lora", llama, 1, target_modules=["q_proj"], use_dora=True)
    tuned = f"{tmp_path / 'base'}+{tmp_path / 'lora'}"
    shardmix.merge({tuned: 1.0}, tmp_path / "merged")
    report = shardmix.extract(tmp_path / "base", tuned, tmp_path / "out", rank=32)
    assert report.low_rank.relative_error < 1e-5
    found, _ = merged_by_peft(llama, tmp_path / "base", tmp_path / "out")
    for name, tensor in load_model(tmp_path / "merged").items():
        assert (found[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max()


# Reduced in the space of adapters.


KINDS = ["plain", "embeddings", "conv1d", "convolutions", "experts", "experts_stored_apart"]


@pytest.mark.parametrize("kind", sample("reduced sums of adapters", KINDS, 3))
def test_reduced_sums_are_the_best(tmp_path, kind):
    """The exact sum, decomposed by numpy, has no better product of the rank."""
    make, *configs = PAIRS[kind]
    if kind == "embeddings":
        configs = [{"target_modules": ["q_proj", "up_proj"]}, {"target_modules": ["up_proj"]}]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    texts = {}
    for number, config in enumerate(configs):
        path = save_peft(tmp_path / str(number), make, number, **config)
        texts[f"{tmp_path / 'base'}+{path}"] = 0.5 + number
    shardmix.merge(texts, tmp_path / "exact", as_adapter=True)
    report = shardmix.merge(texts, tmp_path / "out", as_adapter=True, rank=2)
    exact, _ = merged_by_peft(make, tmp_path / "base", tmp_path / "exact")
    found, misfits = merged_by_peft(make, tmp_path / "base", tmp_path / "out")
    assert misfits == []
    base = type(make()).from_pretrained(tmp_path / "base", dtype=torch.float32).state_dict()
    total = least = measured = 0.0
    for name, tensor in exact.items():
        change = (tensor - base[name].double()).numpy()
        own = (found[name] - base[name].double()).numpy()
        stack = change.reshape(-1, *change.shape[-2:]) if change.ndim == 3 else None
        if stack is None or "experts" not in name:
            stack = change.reshape(1, len(change), -1) if change.ndim > 1 else None
        if stack is None or not np.abs(change).max() > 1e-6:
            continue
        for matrix in stack:
            values = np.linalg.svd(matrix, compute_uv=False)
            least += float(np.square(values[2:]).sum())
        measured += float(np.square(change - own).sum())
        total += float(np.square(change).sum())
    assert measured <= 1.0001 * least + 1e-12 * total
    assert report.low_rank.relative_error == pytest.approx((measured / total) ** 0.5, rel=1e-3)


def test_small_sums_stay_exact(tmp_path):
    """A rank that the adapters together do not have changes nothing."""
    base = {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(40, 30)}
    save_model(tmp_path / "base", base)
    for seed in (1, 2):
        modules = ["a", "b"] if seed == 1 else ["a"]
        save_adapter(tmp_path / str(seed), random_adapter(base, modules, rank=4, seed=seed))
    texts = {f"{tmp_path / 'base'}+{tmp_path / str(seed)}": 0.5 for seed in (1, 2)}
    shardmix.merge(texts, tmp_path / "exact", as_adapter=True)
    report = shardmix.merge(texts, tmp_path / "out", as_adapter=True, rank=5)
    assert [each.name for each in report.low_rank.parameters] == ["a"]
    exact, out = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exact", "out")
    )
    name = f"{PREFIX}b.lora_B.weight"
    assert torch.equal(exact[name], out[name])
    assert out[f"{PREFIX}a.lora_B.weight"].shape == (40, 5)


# Going on, and verifying.


def cut_off_extraction(folder, count):
    add, stored = FactorStore.add, []

    def add_or_fail(self, *args):
        if len(stored) == count:
            raise KeyboardInterrupt
        stored.append(args)
        add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorStore, "add", add_or_fail)
        with pytest.raises(KeyboardInterrupt, match="the same call goes on"):
            shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    return folder / ".out.shardmix" / "factors"


@pytest.mark.parametrize("damage", [None, "torn", "changed"])
def test_cut_off_goes_on(pair, monkeypatch, damage):
    """Stored factors are taken if they are whole, and computed again if not."""
    folder, *_ = pair
    shardmix.extract(folder / "base", folder / "tuned", folder / "whole", rank=4)
    factors = cut_off_extraction(folder, 2)
    content = factors.read_bytes()
    if damage == "torn":
        factors.write_bytes(content[:-10])
    elif damage == "changed":
        factors.write_bytes(content[:-10] + bytes(10))
    add, stored = FactorStore.add, []

    def counted(self, record, arrays):
        stored.append(record.name)
        add(self, record, arrays)

    monkeypatch.setattr(FactorStore, "add", counted)
    shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    assert len(stored) == (1 if damage is None else 2)
    whole, out = (folder_bytes(folder / name) for name in ("whole", "out"))
    for name in ("adapter_model.safetensors", "low_rank.json", "adapter_config.json"):
        assert whole[name] == out[name]
    assert not factors.exists()


def test_killed_process_goes_on(pair):
    """As `kill -9` leaves it, once in the factors and once in the output."""
    folder, *_ = pair
    code = textwrap.dedent("""
        import os, sys, shardmix
        from shardmix.output.factor_store import FactorStore
        from shardmix.output.journal import Journal
        kind = FactorStore if sys.argv[2] == "factors" else Journal
        add = kind.add
        def add_and_die(self, *args):
            add(self, *args)
            os._exit(9)
        kind.add = add_and_die
        folder = sys.argv[1]
        shardmix.extract(f"{folder}/base", f"{folder}/tuned", f"{folder}/out", rank=4)
    """)
    for moment in ("factors", "journal"):
        done = subprocess.run([sys.executable, "-c", code, str(folder), moment], check=False)
        assert done.returncode == 9
    report = shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    assert report.bytes_kept > 0
    assert shardmix.verify(folder / "out").problems == ()


def test_factors_outlive_a_failure(pair, monkeypatch):
    """Also one that comes before anything of the adapter is written."""
    folder, *_ = pair

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr("shardmix.execute.merge.execute_plan", fail)
        shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    monkeypatch.setattr(FactorStore, "add", fail)
    shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    assert "relative error of its factors is 0." in (folder / "out" / "README.md").read_text()


def test_another_rank_is_refused(pair):
    folder, *_ = pair
    cut_off_extraction(folder, 1)
    with pytest.raises(shardmix.OutputError, match="rank 4 then, 5 now"):
        shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=5)
    report = shardmix.extract(
        folder / "base", folder / "tuned", folder / "out", rank=5, restart=True
    )
    assert report.low_rank.parameters[0].rank == 5


def test_changed_source_is_refused(pair):
    folder, _, tuned = pair
    cut_off_extraction(folder, 1)
    save_model(folder / "tuned", {name: tensor + 1 for name, tensor in tuned.items()})
    with pytest.raises(shardmix.OutputError, match="has changed since"):
        shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)


def test_factors_are_not_recomputed(pair):
    folder, *_ = pair
    shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    with pytest.raises(shardmix.SourceError, match="singular value decompositions"):
        shardmix.verify(folder / "out", recompute=True)
    path = folder / "out" / "low_rank.json"
    path.write_text(path.read_text().replace("0", "1", 1))
    assert "low_rank.json: its bytes" in shardmix.verify(folder / "out").problems[0]


def test_plan_tells_the_most(pair):
    folder, *_ = pair
    plan = shardmix.plan_merge(
        {folder / "tuned": 1.0}, base_model=folder / "base", as_adapter=True, rank=4
    )
    assert plan.factoring.num_tasks == 3
    assert "factors of 3 parameters are computed first" in plan.warnings[-1]
    report = shardmix.extract(folder / "base", folder / "tuned", folder / "out", rank=4)
    assert report.warnings == ()
    assert (folder / "out/adapter_model.safetensors").stat().st_size <= plan.write_nbytes


# Refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "0"], "rank 0: must be a whole number from 1"),
        (["--rank", "91"], "rank 91: is beyond every matrix: the largest rank .* is 70"),
        (["--rank", "2", "--energy", "0"], r"energy 0\.0: must be above 0"),
        (["--rank", "2", "--energy", "nan"], "energy nan: must be above 0"),
        (["--rank", "2", "--energy", "1.5"], "energy 1.5: must be above 0"),
        (["--rank", "2", "--max-memory", "60MiB"], "least that works"),
    ],
)
def test_bad_words_are_refused(pair, words, message):
    folder, *_ = pair
    command = ["extract", f"{folder}/base", f"{folder}/tuned", "-o", f"{folder}/out", *words]
    done = CliRunner().invoke(app, command)
    assert done.exit_code in (1, 2), done.output
    assert done.stderr.count("\n") == 1
    assert re.search(message, done.stderr), done.stderr
    assert {path.name for path in folder.iterdir()} == {"base", "tuned"}


def test_other_shapes_are_refused(pair):
    folder, base, _ = pair
    save_model(folder / "other", {**base, "layers.0.big.weight": torch.randn(130, 71)})
    with pytest.raises(shardmix.MismatchError, match=r"layers\.0\.big\.weight"):
        shardmix.extract(folder / "base", folder / "other", folder / "out", rank=2)


def test_same_model_is_refused(pair):
    folder, base, _ = pair
    with pytest.raises(shardmix.RecipeError, match="is base and tuned model alike"):
        shardmix.extract(folder / "base", folder / "base", folder / "out", rank=2)
    save_model(folder / "copy", base)
    with pytest.raises(shardmix.SourceError, match="changed no weight of a linear layer"):
        shardmix.extract(folder / "base", folder / "copy", folder / "out", rank=2)


def test_nan_is_refused(pair):
    folder, _, tuned = pair
    tuned["layers.0.big.weight"][3, 4] = float("nan")
    save_model(folder / "nan", tuned)
    with pytest.raises(shardmix.NonfiniteError, match=r"layers\.0\.big\.weight: the change holds"):
        shardmix.extract(folder / "base", folder / "nan", folder / "out", rank=2)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_are_refused(tmp_path, make):
    """PEFT 0.21 finds no module for them; the other changes can be had."""
    save_tuned(tmp_path, make)
    with pytest.raises(shardmix.SourceError, match=r"experts.*nothing that a LoRA adapter"):
        shardmix.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    report = shardmix.extract(
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "out",
        rank=4,
        skip_others=True,
        restart=True,
    )
    assert any("experts" in name for name in report.low_rank.left_out)
    assert any("left as in" in warning for warning in report.warnings)
    assert report.low_rank.kept_whole == ()
    _, misfits = merged_by_peft(make, tmp_path / "base", tmp_path / "out")
    assert misfits == []
