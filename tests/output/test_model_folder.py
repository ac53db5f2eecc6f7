import errno
import json
import os

import pytest
import torch
import yaml

import shardmix
from shardmix.errors import SourceError
from shardmix.output.model_folder import untied
from shardmix.recipe.build import build_recipe
from shardmix.recipe.parameters import used_weights
from shardmix.sources.auxiliary_files import find_auxiliary_files
from tests.support.models import CONFIG, random_model, save_model


def two_models(tmp_path, **options):
    return [
        (save_model(tmp_path / name, random_model(seed), **options), 0.5)
        for seed, name in enumerate("ab")
    ]


AUXILIARY = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "tokenizer.model": b"\x00\xffspm",
    "vocab.txt": b"a\nb\n",
    "merges.txt": b"a b\n",
    "generation_config.json": b'{"eos_token_id": 2}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ rag }}",
    "modeling_custom.py": b"class Custom: ...\n",
    "LICENSE": b"terms\n",
    "preprocessor_config.json": b"{}",
    "bpe.codes": b"a b 10\n",
    "vocab": b"a\n",
    "mel_filters.npz": b"npz",
    "params.json": b"{}",
    "tekken.json": b"{}",
    "colbert_linear.pt": b"pickle",
    "code/layers/attention.py": b"class Attention: ...\n",
    "speech_tokenizer/config.json": b"{}",
    "speech_tokenizer/pytorch_model.bin": b"pickle",
}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "trainer_state.json": b"{}",
    "all_results.json": b"{}",
    "README.md": b"the first model's own card\n",
    "model.onnx": b"onnx",
    "model.fp16.safetensors": b"weights",
    "checkpoint-500/config.json": b"{}",
    ".git/config": b"",
}


def add_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_only_a_models_files_go_along(tmp_path):
    """What makes a model goes along, and nothing else."""
    models = two_models(tmp_path)
    add_files(models[0][0], AUXILIARY | OTHERS)
    add_files(models[1][0], {"tokenizer.json": b"another", "special_tokens_map.json": b"{}"})
    report = shardmix.merge(models, tmp_path / "out")
    out = tmp_path / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    made = {"config.json", "model.safetensors", "README.md", "shardmix.json"}
    assert files == {*AUXILIARY, *made}
    for name, content in AUXILIARY.items():
        assert (out / name).read_bytes() == content
    assert (out / "config.json").read_bytes() == (models[0][0] / "config.json").read_bytes()
    told = [warning for warning in report.warnings if warning.startswith("left out")]
    assert told == [
        "left out of the output, though a has it: checkpoint-500/ (a trainer's checkpoint); "
        "model.fp16.safetensors (other weights of the model); model.onnx, pytorch_model.bin "
        "(weights in another format); --json lists all"
    ]
    assert {finding.name for finding in report.left_out} == {
        *(name for name in OTHERS if "/" not in name),
        *("checkpoint-500/", ".git/"),
    }
    assert (
        "colbert_linear.pt, speech_tokenizer/pytorch_model.bin: copied, not merged; their values "
        "are those of a"
    ) in report.warnings


def test_config_from_gives_auxiliary_files(tmp_path):
    """The config source gives the auxiliary files instead of the first model."""
    models = two_models(tmp_path)
    add_files(models[0][0], {"tokenizer.json": b"first"})
    donor = save_model(tmp_path / "donor", {}, config={**CONFIG, "note": "donor"})
    add_files(donor, {"tokenizer.json": b"donor"})
    shardmix.merge(models, tmp_path / "out", config_from=donor)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"donor"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["note"] == "donor"


def test_module_folders_are_copied_whole(tmp_path):
    """Module folders of sentence-transformers are copied whole."""
    models = two_models(tmp_path)
    modules = [
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "Projection", "type": "sentence_transformers.models.Dense"},
    ]
    files = {
        "modules.json": json.dumps(modules).encode(),
        "config_sentence_transformers.json": b"{}",
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        "Projection/config.json": b"{}",
        "Projection/weights.pkl": b"the same weights",
    }
    for folder, _ in models:
        add_files(folder, files)
    report = shardmix.merge(models, tmp_path / "out")
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert not report.warnings


def test_unreadable_module_is_not_skipped(tmp_path, monkeypatch):
    """A module folder that cannot be read is not passed over."""
    models = two_models(tmp_path)
    modules = {"modules.json": b'[{"path": "1_Pooling"}]', "1_Pooling/config.json": b"{}"}
    add_files(models[0][0], modules)
    scandir = os.scandir

    def deny(path):
        if str(path).endswith("1_Pooling"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(SourceError, match="1_Pooling: cannot be read"):
        shardmix.merge(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b"])
def test_module_outside_the_model_is_refused(tmp_path, path):
    folder = save_model(tmp_path / "m", random_model(1))
    (folder / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(SourceError, match="outside the model's folder"):
        find_auxiliary_files(folder)


@pytest.mark.parametrize("content", ["{}", "[", '[{"no": "path"}]', "[3]"])
def test_damaged_modules_are_refused(tmp_path, content):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(SourceError, match=r"modules\.json"):
        find_auxiliary_files(tmp_path)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_names_the_outputs_dtype(tmp_path, key):
    config = {"model_type": "x", key: "float32", "text_config": {key: "float32"}, "n": 1}
    models = two_models(tmp_path, config=config)
    shardmix.merge(models, tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, key: "bfloat16", "text_config": {key: "bfloat16"}}
    assert list(written) == list(config)


def test_named_dtype_replaces_a_wrong_one(tmp_path):
    """The dtype named is the output's, also if the config was wrong."""
    folder = save_model(
        tmp_path / "m", random_model(1, torch.bfloat16), config={"torch_dtype": "float32"}
    )
    shardmix.merge([(folder, 0.5), (folder, 0.5)], tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "bfloat16"


def test_config_gets_the_dtype_asked_for(tmp_path):
    """A config without a dtype gets the one that was asked for."""
    models = two_models(tmp_path, config={"model_type": "x"})
    shardmix.merge(models, tmp_path / "out", dtype="float16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {"model_type": "x", "torch_dtype": "float16"}
    shardmix.merge(models, tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == {"model_type": "x"}


def test_folder_of_downloads_is_no_model(tmp_path):
    """A folder of downloads is not taken for a model's."""
    models = two_models(tmp_path, config=None)
    add_files(models[0][0], {"invoice.txt": b"private", "notes.json": b"{}"})
    files = [(folder / "model.safetensors", weight) for folder, weight in models]
    shardmix.merge(files, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "README.md",
        "shardmix.json",
    }


def test_cards_recipe_merges_the_same(tmp_path):
    """The card's recipe merges as it was merged."""
    models = two_models(tmp_path)
    options = {"max_shard_size": 2000, "allow_weight_sum": True, "dtype": "bfloat16"}
    options["allow_differences"] = "tokenizer"
    shardmix.merge([(models[0][0], 2.0), (models[1][0], 1.0)], tmp_path / "out", **options)
    text = (tmp_path / "out" / "README.md").read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.split("```yaml\n")[1].split("```")[0])
    assert used_weights(build_recipe(recipe)) == (2.0, 1.0)
    assert build_recipe(recipe).allow_differences == ("tokenizer",)
    assert "max_shard_size: 2000" in recipe.read_text()


def test_untying_reaches_the_config():
    """Untying reaches the config that says so."""
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "a": 1}}
    assert untied(config, ("", "text_config")) == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "a": 1},
    }
    assert untied(config, ()) == config
    assert untied({}, ("",)) == {"tie_word_embeddings": False}


def test_index_names_tensors_and_size(tmp_path):
    """The index names every tensor, and the size of the data."""
    shardmix.merge(two_models(tmp_path), tmp_path / "out", max_shard_size=1500)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(random_model(0))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in random_model(0).values())
    assert all((tmp_path / "out" / name).exists() for name in index["weight_map"].values())


def test_card_says_what_was_merged_and_how(tmp_path):
    models = two_models(tmp_path)
    shardmix.merge([(models[0][0], 1 / 3), (models[1][0], 2 / 3)], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["base_model"] == ["a", "b"]
    assert card["base_model_relation"] == "merge"
    assert card["tags"] == ["merge", "shardmix"]
    assert card["library_name"] == "transformers"
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    weights = [model["parameters"]["weight"] for model in recipe["models"]]
    assert weights == [1 / 3, 2 / 3]
    assert str(tmp_path) not in text  # a card travels; the paths of a machine don't
