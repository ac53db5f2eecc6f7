"""The LM-Cocktail functions, as a program that used LM_Cocktail calls them."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import shardmix
from shardmix import mix_models, mix_models_by_layers, mix_models_with_data
from shardmix.errors import MismatchError, OutputError, RecipeError, SourceError
from tests.support.language_models import (
    QUERIES,
    TEXTS,
    examples_for,
    save_language_model,
    write_examples,
)
from tests.support.models import assert_same_bits, load_model, weighted_sum

ALL_TYPES = {
    "decoder": "llama",
    "encoder": "bert",
    "reranker": "bert-reranker",
    "encoder-decoder": "t5",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Give two models of a kind."""
    root = tmp_path_factory.mktemp("models")

    def pair(kind):
        folders = [root / f"{kind}-{seed}" for seed in (0, 1)]
        for seed, folder in enumerate(folders):
            if not folder.exists():
                save_language_model(kind, folder, seed=seed)
        return [str(folder) for folder in folders]

    return pair


@pytest.mark.parametrize("mix", [mix_models, mix_models_by_layers])
@pytest.mark.parametrize(("model_type", "kind"), ALL_TYPES.items())
def test_every_type_mixes_and_loads(models, tmp_path, mix, model_type, kind):
    """Every type mixes, and comes back loaded."""
    names = models(kind)
    model = mix(names, model_type, [0.7, 0.3], str(tmp_path / "mixed"))
    saved = load_model(tmp_path / "mixed")
    sources = [load_model(Path(name)) for name in names]
    for name, tensor in saved.items():
        expected = weighted_sum([source[name] for source in sources], [0.7, 0.3], tensor.dtype)
        assert torch.equal(tensor, expected), name
    state = model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in set(saved) & set(state))
    assert set(saved) & set(state)
    assert AutoTokenizer.from_pretrained(tmp_path / "mixed").vocab_size


@pytest.mark.parametrize(("model_type", "kind"), ALL_TYPES.items())
def test_mix_without_a_path_leaves_nothing(models, tmp_path, monkeypatch, model_type, kind):
    """Without an output path the model is the same, and nothing is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    saved = mix_models(models(kind), model_type, [0.7, 0.3], tmp_path / "mixed")
    unsaved = mix_models(models(kind), model_type, [0.7, 0.3])
    assert_same_bits(unsaved.state_dict(), saved.state_dict())
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(("model_type", "kind"), ALL_TYPES.items())
def test_weights_come_from_examples(models, tmp_path, capsys, model_type, kind):
    examples = examples_for(kind)
    scores = shardmix.scoring.score(models(kind), model_type, examples, temperature=0.5)
    model = mix_models_with_data(
        models(kind), model_type, examples, 0.5, output_path=str(tmp_path / "mixed")
    )
    expected = mix_models(models(kind), model_type, scores.weights, quiet=True)
    assert_same_bits(model.state_dict(), expected.state_dict())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "***weight for each model***: "
    assert lines[1] == f"{models(kind)[0]} {scores.weights[0]}"


def test_arguments_are_lm_cocktails(models, tmp_path):
    """Arguments are those of LM-Cocktail, in its order."""
    by_position = mix_models_with_data(
        models("bert"), "encoder", QUERIES, 0.5, 3, 64, 2, str(tmp_path / "a")
    )
    by_name = mix_models_with_data(
        model_names_or_paths=models("bert"),
        model_type="encoder",
        example_ata=QUERIES,  # as LM-Cocktail 0.0.4 spells it
        temperature=0.5,
        batch_size=3,
        max_input_length=64,
        neg_number=2,
        output_path=str(tmp_path / "b"),
    )
    assert_same_bits(by_position.state_dict(), by_name.state_dict())


def test_earlier_output_is_replaced(models, tmp_path):
    """An earlier output is replaced, as LM-Cocktail does."""
    mix_models(models("llama"), "decoder", [0.7, 0.3], tmp_path / "mixed")
    mix_models_by_layers(models("llama"), "decoder", [0.5, 0.5], tmp_path / "mixed")
    with pytest.raises(OutputError, match="exists"):
        mix_models(models("llama"), "decoder", [0.7, 0.3], tmp_path / "mixed", overwrite=False)


def test_one_model_may_be_given_twice(models):
    """As LM-Cocktail's README does for rerankers."""
    name = models("bert-reranker")[0]
    mixed = mix_models([name, name], "reranker", [0.5, 0.5])
    assert_same_bits(mixed.state_dict(), mix_models([name, name], "reranker", [1, 0]).state_dict())


def test_encoder_loads_with_cls_and_norm(models, tmp_path):
    """An encoder loads as a SentenceTransformer with CLS and norm."""
    model = mix_models(models("bert"), "encoder", [0.5, 0.5], tmp_path / "mixed")
    embedder = SentenceTransformer(str(tmp_path / "mixed"), device="cpu")
    texts = ["why does it rain", "the cat sat on the mat"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "mixed")(
        texts, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        states = model(**tokens).last_hidden_state[:, 0]
    expected = torch.nn.functional.normalize(states, dim=-1)
    assert torch.allclose(torch.tensor(embedder.encode(texts)), expected, atol=1e-5)


def test_encoder_keeps_its_own_modules(models, tmp_path):
    """An encoder with modules of its own keeps them."""
    names = []
    for name in models("bert"):
        embedder = SentenceTransformer(name, device="cpu")  # mean pooling, where nothing is said
        embedder.save(str(tmp_path / name.split("/")[-1]))
        names.append(str(tmp_path / name.split("/")[-1]))
    mix_models(names, "encoder", [0.5, 0.5], tmp_path / "mixed")
    modules = json.loads((tmp_path / "mixed" / "modules.json").read_text())
    assert modules == json.loads((tmp_path / "bert-0" / "modules.json").read_text())
    pooling = json.loads((tmp_path / "mixed" / "1_Pooling" / "config.json").read_text())
    assert "cls" not in str(pooling.get("pooling_mode"))
    assert not (tmp_path / "mixed" / "2_Normalize").exists()


def test_other_types_get_no_modules(models, tmp_path):
    mix_models(models("bert-reranker"), "reranker", [0.5, 0.5], tmp_path / "mixed")
    assert not (tmp_path / "mixed" / "modules.json").exists()


@pytest.mark.parametrize(
    ("arguments", "finding"),
    [
        ((["a"], "decoder", [1.0]), "mixing takes a list of two models or more"),
        (("ab", "decoder", [1.0]), "mixing takes a list of two models or more"),
        ((["a", "b"], "decoder", [1.0]), "1 weights given for 2 models"),
        ((["a", "b"], "llm", [0.5, 0.5]), "model type 'llm'"),
        ((["a", "b"], "decoder", [0.1, 0.1]), "weights sum to 0.2, not 1"),
    ],
)
def test_a_mistake_is_a_clear_error(arguments, finding):
    with pytest.raises(RecipeError) as error:
        mix_models(*arguments)
    assert finding in str(error.value)


def test_examples_are_checked_first(tmp_path):
    """Examples are checked before any model is opened."""
    with pytest.raises(RecipeError, match="example 1: `output` is missing"):
        mix_models_with_data(["none/a", "none/b"], "decoder", [{"input": "x"}])
    with pytest.raises(RecipeError, match="no example_data given"):
        mix_models_with_data(["none/a", "none/b"], "decoder")


def test_unloadable_type_is_refused_early(models, tmp_path):
    """A type that could not be loaded is refused before anything is written."""
    with pytest.raises(SourceError, match="which AutoModelForSeq2SeqLM does not load"):
        mix_models(models("llama"), "encoder-decoder", [0.5, 0.5], tmp_path / "mixed")
    assert list(tmp_path.iterdir()) == []


def test_examples_may_come_from_a_generator(models):
    """Examples may come from a generator, and under one name only."""
    model = mix_models_with_data(models("llama"), "decoder", (text for text in TEXTS))
    same = mix_models_with_data(models("llama"), "decoder", TEXTS)
    assert_same_bits(model.state_dict(), same.state_dict())
    with pytest.raises(RecipeError, match="give one of them"):
        mix_models_with_data(models("llama"), "decoder", TEXTS, example_ata=TEXTS)


def test_weights_survive_a_merge_that_fails(models, tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise OutputError("the disk is full")

    monkeypatch.setattr("shardmix.api.merge_opened", fail)
    with pytest.raises(OutputError, match=r"the disk is full; .* gave the weights 0\.\d+ 0\.\d+:"):
        mix_models_with_data(models("llama"), "decoder", TEXTS, output_path=tmp_path / "mixed")


def test_unmergeable_models_are_not_scored(models, tmp_path, monkeypatch):
    """What cannot be merged is found before it is scored."""
    wide = save_language_model("llama", tmp_path / "wide", intermediate_size=56)
    monkeypatch.setattr("shardmix.scoring.scoring.score_opened", None)
    with pytest.raises(MismatchError):
        mix_models_with_data([models("llama")[0], str(wide)], "decoder", TEXTS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError):
        mix_models_with_data(models("llama"), "decoder", TEXTS, output_path=tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_program_merges_by_a_file(models, tmp_path):
    """A program can merge by a file of examples."""
    examples = write_examples(tmp_path / "examples.jsonl", TEXTS)
    report = shardmix.merge_by_examples(
        models("llama"),
        tmp_path / "merged",
        examples,
        "decoder",
        scoring={"temperature": 0.1},
        max_memory="4GiB",
    )
    assert report.scores is not None
    assert report.weights == report.scores.weights
    assert report.scores.losses[0] != report.scores.losses[1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
