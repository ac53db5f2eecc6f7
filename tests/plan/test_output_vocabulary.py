"""Mapped vocabularies with everything else: methods, kinds of sources, resuming, scoring."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmix
from shardmix.errors import OutputError
from shardmix.methods.registry import METHODS
from shardmix.options import RunSettings
from shardmix.plan.opening import open_models
from shardmix.plan.planner import plan_merge
from shardmix.recipe.build import build_recipe
from shardmix.sources.resolve import resolve_all
from tests.support.adapters import random_adapter, save_adapter, with_adapter
from tests.support.cut_off import cut_off, folder_bytes
from tests.support.fresh_process import python
from tests.support.models import load_model, save_model
from tests.support.quantised_models import FORMS, FP8
from tests.support.vocabularies import (
    EMBEDDING,
    HEAD,
    LLAMA,
    NORM,
    WIDTH,
    ids_of,
    model_of,
    numbered,
)

WORDS = [f"w{number}" for number in range(11)]
ADDED = {"base": ["<both>"], "b": ["<b>", "<both>"], "c": ["<both>", "<c>"]}
ORDERS = {"base": WORDS, "b": WORDS[::-1], "c": [*WORDS[5:], *WORDS[:5]]}
UNITED = [*WORDS, "<both>", "<b>", "<c>"]


def three(tmp_path, **options):
    """Save three models; of tokens that one lacks, only one other has them, or the base does."""
    return {
        name: model_of(tmp_path / name, numbered(ORDERS[name]), ADDED[name], seed=seed, **options)
        for seed, name in enumerate(ORDERS)
    }


def mapped_beforehand(tmp_path, saved, names):
    """Save some models with their united vocabulary, their rows put in order by torch."""
    ids = {name: ids_of(tmp_path / name) for name in names}
    united = [token for token in UNITED if any(token in its for its in ids.values())]
    for name in names:
        changed = dict(saved[name])
        for key in (EMBEDDING, HEAD):
            rows = []
            for token in united:
                owner = name if token in ids[name] else token.strip("<>")
                rows.append(saved[owner][key][ids[owner][token]])
            changed[key] = torch.stack(rows)
        folder = tmp_path / "mapped" / name
        folder.mkdir(parents=True)
        save_model(folder, changed, config={**LLAMA, "vocab_size": len(united)})
        shutil.copy(tmp_path / "base" / "tokenizer.json", folder)


def arguments(folder, method, names):
    """Return the arguments of a merge by a method."""
    base, *others = (str(folder / name) for name in names)
    known = [each.name for each in METHODS[method].parameters]
    needed = {"t": 0.3, "density": 0.5, "gamma": 0.1, "epsilon": 0.1}
    parameters = {name: value for name, value in needed.items() if name in known}
    if method == "linear":
        return [(path, 0.3) for path in (base, *others)], {"allow_weight_sum": True}
    models = [(path, 0.6) for path in others] if "weight" in known else others
    return models, {"method": method, "base_model": base, "parameters": parameters}


def names_for(method):
    """Return the models that a method takes: some take only one besides the base."""
    models, options = arguments(Path(), method, ORDERS)
    try:
        build_recipe(models, **options)
    except shardmix.RecipeError as error:
        if "takes at most 1" not in str(error):
            raise
        return list(ORDERS)[:2]
    return list(ORDERS)


@pytest.mark.parametrize("method", [name for name, its in METHODS.items() if not its.is_copy])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_method_takes_mapped_rows(tmp_path, method, dtype):
    """Byte for byte what it makes of models whose rows were mapped beforehand."""
    names = names_for(method)
    saved = three(tmp_path, dtype=dtype)
    mapped_beforehand(tmp_path, saved, names)
    models, options = arguments(tmp_path, method, names)
    shardmix.merge(models, tmp_path / "out", tokenizer_source="union", **options)
    models, options = arguments(tmp_path / "mapped", method, names)
    shardmix.merge(models, tmp_path / "wanted", **options)
    out, wanted = load_model(tmp_path / "out"), load_model(tmp_path / "wanted")
    assert out.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(out[name], tensor), name


def test_bin_gives_the_same_bytes(tmp_path):
    """Models of torch.save, as the same in safetensors."""
    saved = three(tmp_path)
    models = {str(tmp_path / name): 1 / 3 for name in ORDERS}
    shardmix.merge(models, tmp_path / "first", tokenizer_source="union")
    for name, tensors in saved.items():
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
    shardmix.merge(models, tmp_path / "again", tokenizer_source="union")
    first, again = folder_bytes(tmp_path / "first"), folder_bytes(tmp_path / "again")
    assert first["model.safetensors"] == again["model.safetensors"]
    assert first["config.json"] == again["config.json"]


def test_adapters_stay_changes(tmp_path):
    """Of adapters on the base only B·A is read, mapped with the base; as of merged ones."""
    base = model_of(tmp_path / "base", numbered(WORDS), seed=1, dtype=torch.float32)
    model_of(tmp_path / "b", numbered(WORDS[::-1]), ["<b>"], seed=2, dtype=torch.float32)
    tensors = random_adapter(base, ["lm_head"], rank=2, seed=3)
    save_adapter(tmp_path / "lora", tensors, r=2, lora_alpha=4)
    merged = with_adapter(base, tensors)
    (tmp_path / "merged").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tmp_path / "base" / name, tmp_path / "merged")
    save_file({n: t.contiguous() for n, t in merged.items()}, tmp_path / "merged/model.safetensors")
    found = []
    for text in (f"{tmp_path / 'base'}+{tmp_path / 'lora'}", str(tmp_path / "merged")):
        options = {"method": "task_arithmetic", "base_model": str(tmp_path / "base")}
        models = [(text, 0.5), (str(tmp_path / "b"), 0.5)]
        plan = shardmix.plan_merge(models, tokenizer_source="union", **options)
        assert plan.vocabulary.num_rows == 12
        changes = {segment.name: segment.are_changes for segment in plan.segments()}
        assert changes[HEAD] == (False, "+" in text, False)
        shardmix.merge(
            models, tmp_path / "out", tokenizer_source="union", overwrite=True, **options
        )
        found.append(load_model(tmp_path / "out"))
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor, rtol=1e-5, atol=1e-5 * 300)


def test_quantised_models_are_mapped(tmp_path):
    """Their rows by token are plain; other tensors are decoded."""
    saved = three(tmp_path)
    generator = torch.Generator().manual_seed(4)
    stored, decoded = next(iter(FORMS))((131, 130), generator)
    for name, tensors in saved.items():
        codes = {f"model.layers.0.mlp.up_proj.{key}": value for key, value in stored.items()}
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"quantization_config": FP8, "torch_dtype": "bfloat16"}
        save_model(tmp_path / name, {**tensors, **codes}, config=config)
    models = {str(tmp_path / name): 1 / 3 for name in ORDERS}
    shardmix.merge(models, tmp_path / "out", tokenizer_source="union", dtype="float32")
    out = load_model(tmp_path / "out")
    assert len(out[EMBEDDING]) == len(UNITED)
    matrix = out["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(matrix, torch.as_tensor(decoded), rtol=1e-6, atol=1e-6)


def large(tmp_path):
    """Save two models of 24 MB with permuted vocabularies."""
    words = [f"w{number}" for number in range(2000)]
    for number, own in enumerate((words, words[::-1])):
        folder = tmp_path / "ab"[number]
        model_of(folder, numbered(own), seed=number, width=1500, dtype=torch.float32)
    return {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}


def test_mapped_merge_resumes(tmp_path):
    """To the same bytes; a tokenizer that changed meanwhile is named."""
    models = large(tmp_path)
    shardmix.merge(models, tmp_path / "whole", tokenizer_source="base")
    cut_off(models, tmp_path / "out", tokenizer_source="base")
    with pytest.raises(OutputError, match="tokenizer base then, union now"):
        shardmix.merge(models, tmp_path / "out", tokenizer_source="union")
    path = tmp_path / "b" / "tokenizer.json"
    before = path.read_text()
    path.write_text(before.replace('"w5":', '"w?":').replace('"w6":', '"w5":').replace("w?", "w6"))
    with pytest.raises(OutputError, match="a tokenizer has changed since"):
        shardmix.merge(models, tmp_path / "out", tokenizer_source="base")
    path.write_text(before)
    report = shardmix.merge(models, tmp_path / "out", tokenizer_source="base")
    assert report.bytes_kept > 0
    whole, again = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "out")
    assert whole.keys() == again.keys()
    assert all(whole[name] == again[name] for name in whole if name != "README.md")


def test_chunks_and_workers_change_nothing(tmp_path):
    """Nor do the way to read and the backend, also for means and averages."""
    words = [f"w{number}" for number in range(300)]
    for number, own in enumerate((words[:250], words[20:], words[::-1])):
        folder = tmp_path / "abc"[number]
        model_of(folder, numbered(own), seed=number, width=700)
    models = {str(tmp_path / name): 1 / 3 for name in "abc"}
    options = {"tokenizer_source": "union", "pad_to_multiple_of": 64}
    shardmix.merge(models, tmp_path / "first", **options)
    for number, more in enumerate(
        ({"workers": 3}, {"io": "mmap"}, {"backend": "torch"}, {"max_memory": "4GiB", "workers": 1})
    ):
        out = tmp_path / str(number)
        shardmix.merge(models, out, **options, **more)
        name = "model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_models_are_scored_as_they_are(tmp_path):
    """What is opened for scoring has each model's own rows, config and tokenizer."""
    three(tmp_path)
    models = [(str(tmp_path / name), 1 / 3) for name in ORDERS]
    recipe = build_recipe(models, tokenizer_source="union")
    opened = open_models(recipe, resolve_all(recipe.sources), max_memory=None)
    for source, name in zip(opened.sources, ORDERS, strict=True):
        assert source.folder == tmp_path / name
        count = len(WORDS) + len(ADDED[name])
        assert source.config["vocab_size"] == count
        assert (count, WIDTH) in source.tensors.shapes
    plan = plan_merge(recipe, opened, RunSettings())
    assert f"[{len(UNITED)},{WIDTH}]" in plan.shards[0].header
    assert NORM in plan.shards[0].tensor_names


def test_a_private_tokenizer_stays_private(tmp_path):
    """The output is no more readable than the tokenizer's files, whichever model gives them."""
    three(tmp_path)
    for name in ORDERS:
        for path in (tmp_path / name).iterdir():
            path.chmod(0o644)
    (tmp_path / "b" / "tokenizer.json").chmod(0o600)
    models = {str(tmp_path / name): 1 / 3 for name in ORDERS}
    shardmix.merge(models, tmp_path / "base-s", tokenizer_source="base")
    shardmix.merge(models, tmp_path / "b-s", tokenizer_source=str(tmp_path / "b"))
    modes = [
        (tmp_path / out / "tokenizer.json").stat().st_mode & 0o077 for out in ("base-s", "b-s")
    ]
    assert modes == [0o044, 0]


def test_tied_models_meet_untied_ones(tmp_path):
    """A head that one model shares with its embedding is mapped as that is."""
    a = model_of(tmp_path / "a", numbered(WORDS), ["<a>"], seed=1, tied=True)
    b = model_of(tmp_path / "b", numbered(WORDS[::-1]), ["<b>"], seed=2)
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    shardmix.merge(models, tmp_path / "out", tokenizer_source="union", dtype="float32")
    out, ids = load_model(tmp_path / "out"), ids_of(tmp_path / "out")
    assert set(ids) == {*WORDS, "<a>", "<b>"}
    for name, shared in ((EMBEDDING, EMBEDDING), (HEAD, EMBEDDING)):
        x, y = a[shared].float(), b[name].float()
        for number, word in enumerate(WORDS):
            assert torch.equal(out[name][ids[word]], (x[number] + y[10 - number]) / 2)
        assert torch.equal(out[name][ids["<a>"]], x[11])
        assert torch.equal(out[name][ids["<b>"]], y[11])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_config_may_be_another_models(tmp_path):
    """Of a model that is not merged: its special tokens keep their texts; the tokenizer is ours."""
    three(tmp_path)
    model_of(tmp_path / "d", numbered(["</s>", *WORDS]), seed=5, eos_token_id=3, bos_token_id=0)
    models = {str(tmp_path / name): 1 / 3 for name in ORDERS}
    report = shardmix.merge(
        models, tmp_path / "out", tokenizer_source="base", config_from=tmp_path / "d"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ids_of(tmp_path / "out") == ids_of(tmp_path / "base")
    assert config["eos_token_id"] == 2
    assert config["bos_token_id"] is None
    assert config["vocab_size"] == 12
    assert any("bos_token_id 0" in note for note in report.warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The tokenizer is that of `base`, to whose tokens" in card
    assert "beside the weights are those of `d`" in card


def test_another_special_token_is_told(tmp_path):
    """If config and tokenizer are of two models."""
    model_of(tmp_path / "a", numbered(WORDS), seed=1, eos_token_id=3)
    model_of(tmp_path / "b", numbered(WORDS[::-1]), seed=2, eos_token_id=10)
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    report = shardmix.merge(models, tmp_path / "out", tokenizer_source=str(tmp_path / "b"))
    (note,) = [note for note in report.warnings if "see which one" in note]
    assert note.startswith("eos_token_id is 7, as a has it")
    assert "it is 10" in note


def test_plans_agree_between_processes(tmp_path):
    """Hashes of texts differ in each; digests of plans do not."""
    three(tmp_path)
    models = {str(tmp_path / name): 1 / 3 for name in ORDERS}
    script = (
        "import json, sys, shardmix; models = json.loads(sys.argv[1]); "
        "print(shardmix.plan_merge(models, tokenizer_source='union').digest())"
    )
    assert len({python(script, json.dumps(models)) for _ in range(2)}) == 1


def test_a_single_file_brings_its_tokenizer(tmp_path):
    """What lies beside a file is its model's, by name."""
    three(tmp_path)
    models = {str(tmp_path / name / "model.safetensors"): 1 / 3 for name in ORDERS}
    shardmix.merge(models, tmp_path / "out", tokenizer_source="union")
    assert ids_of(tmp_path / "out").keys() == set(UNITED)
    assert len(load_model(tmp_path / "out")[HEAD]) == len(UNITED)


def test_one_model_gets_more_rows(tmp_path):
    """A conversion with another multiple: old rows bit for bit, new ones their average."""
    saved = model_of(tmp_path / "a", numbered(WORDS), seed=1)
    options = {"tokenizer_source": "base", "pad_to_multiple_of": 8}
    shardmix.convert(tmp_path / "a", tmp_path / "out", **options)
    out = load_model(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 16
    for name in (EMBEDDING, HEAD):
        assert torch.equal(out[name][:11], saved[name])
        wanted = saved[name].double().mean(0).bfloat16()
        assert all(torch.equal(row, wanted) for row in out[name][11:])
    assert torch.equal(out[NORM], saved[NORM])
