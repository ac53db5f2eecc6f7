"""Each model reads the examples by its own tokenizer, and that is told if they differ."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from click.testing import CliRunner
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace

from shardmix.cli.commands import app
from shardmix.errors import SourceError
from shardmix.scoring import reading, score
from tests.support.language_models import (
    QUERIES,
    TEXTS,
    VOCABULARY,
    examples_for,
    plain_loss,
    save_language_model,
    save_tokenizer,
    write_examples,
)
from tests.support.sampling import sample


def two_models(tmp_path: Path, kind: str) -> list[Path]:
    return [save_language_model(kind, tmp_path / f"{seed}", seed=seed) for seed in range(2)]


def use_letters(folder: Path) -> None:
    """Give a model a tokenizer that reads letter by letter, and other ids."""
    for path in folder.glob("*token*"):
        path.unlink()
    letters = ["[UNK]", "[PAD]", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = Tokenizer(WordLevel({letter: n for n, letter in enumerate(letters)}, "[UNK]"))
    tokens.pre_tokenizer = Split(Regex("."), "isolated")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)


def permute(folder: Path) -> None:
    """Give a model's tokenizer other ids for the same words."""
    words = [*VOCABULARY[:6], *reversed(VOCABULARY[6:])]
    tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)


@pytest.fixture
def num_loaded(monkeypatch):
    """Count the tokenizers that are loaded."""
    loaded = []
    load = reading.load_tokenizer

    def counted(source, *args, **options):
        loaded.append(source)
        return load(source, *args, **options)

    monkeypatch.setattr(reading, "load_tokenizer", counted)
    return loaded


@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "bert-reranker"])
@pytest.mark.parametrize("change", [use_letters, permute])
def test_each_model_has_its_own_tokenizer(tmp_path, kind, change):
    """Each model reads by its own tokenizer."""
    folders = two_models(tmp_path, kind)
    change(folders[1])
    examples = examples_for(kind)
    model_type = {"llama": "decoder", "t5": "encoder-decoder", "bert": "encoder"}
    report = score(folders, model_type.get(kind, "reranker"), examples)
    for folder, loss in zip(folders, report.losses, strict=True):
        assert loss == pytest.approx(plain_loss(kind, folder, examples), rel=1e-3)
    [warning] = [each for each in report.warnings if "tokenizers differ" in each]
    assert all(str(folder) in warning for folder in folders)
    assert ("not comparable" in warning) == (kind in ("llama", "t5"))


def test_the_same_files_are_read_once(tmp_path, num_loaded):
    folders = two_models(tmp_path, "llama")
    assert not score(folders, "decoder", TEXTS).warnings
    assert num_loaded == [str(folders[0])]


def test_files_that_read_alike_are_not_told(tmp_path, num_loaded):
    """Other files that read alike are not told."""
    folders = two_models(tmp_path, "llama")
    config = json.loads((folders[1] / "tokenizer_config.json").read_text())
    (folders[1] / "tokenizer_config.json").write_text(json.dumps(config | {"note": "saved anew"}))
    assert not score(folders, "decoder", TEXTS).warnings
    assert num_loaded == list(map(str, folders))


def test_missing_tokenizer_is_the_firsts(tmp_path):
    """A model without a tokenizer has the first's."""
    folders = two_models(tmp_path, "llama")
    expected = score(folders, "decoder", TEXTS).losses
    for path in folders[1].glob("*token*"):
        path.unlink()
    report = score(folders, "decoder", TEXTS)
    assert report.losses == expected
    [warning] = report.warnings
    assert f"{folders[1]}: has no tokenizer" in warning
    with pytest.raises(SourceError, match="its config or tokenizer cannot be loaded"):
        score(folders[::-1], "decoder", TEXTS)


def test_fewer_positions_read_less(tmp_path):
    """A model with fewer positions reads less."""
    folders = two_models(tmp_path, "gpt2")
    few = {"n_positions": 12, "max_position_embeddings": 12}
    shorter = save_language_model("gpt2", tmp_path / "short", seed=1, **few)
    report = score([folders[0], shorter], "decoder", TEXTS)
    assert any(
        f"{shorter}: " in each and "cut off at 12 tokens" in each for each in report.warnings
    )
    assert report.losses[0] == pytest.approx(plain_loss("gpt2", folders[0], TEXTS), rel=1e-3)


def test_tokenizer_in_a_module_is_found(tmp_path):
    """A tokenizer in a module's folder is found."""
    folders = two_models(tmp_path, "bert")
    place = tmp_path / "st" / "0_Transformer"
    shutil.copytree(folders[1], place)
    permute(place)
    chain = [{"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    chain += [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "st" / "modules.json").write_text(json.dumps(chain))
    (tmp_path / "st" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}
    (tmp_path / "st" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    report = score([folders[0], tmp_path / "st"], "encoder", QUERIES)
    assert report.losses[1] == pytest.approx(plain_loss("bert", place, QUERIES), rel=1e-3)
    assert any("tokenizers differ" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    "words", sample("ways to be quiet", [[], ["-q"], ["--json"], ["--json", "-q"]], 2)
)
def test_difference_is_told_in_quiet(tmp_path, words):
    """The difference is told also in quiet.

    On standard error, but where nothing but JSON is wanted: there it is in the report.
    """
    folders = two_models(tmp_path, "llama")
    permute(folders[1])
    examples = write_examples(tmp_path / "examples.jsonl", TEXTS)
    arguments = ["score", *map(str, folders), "--data", str(examples), "--model-type", "decoder"]
    done = CliRunner().invoke(app, [*arguments, *words])
    assert done.exit_code == 0, done.output
    assert ("tokenizers differ" in " ".join(done.stderr.split())) == (words != ["--json", "-q"])
    if "--json" in words:
        report = json.loads(done.stdout)
        assert any("tokenizers differ" in warning for warning in report["warnings"])


def test_saving_a_tokenizer_changes_nothing(tmp_path):
    """Saving a tokenizer anew changes nothing."""
    folders = two_models(tmp_path, "bert")
    save_tokenizer(folders[1], model_max_length=None)
    assert not score(folders, "encoder", QUERIES).warnings
