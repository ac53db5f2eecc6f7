"""A merge by examples that was cut off goes on with the weights that it was begun with."""

import json
import os
import shutil
from contextlib import contextmanager

import pytest

import shardmix
from shardmix import mix_models_with_data
from shardmix.errors import OutputError
from shardmix.score_and_merge import merge_by_examples
from tests.support.cut_off import cut_off_after, folder_bytes
from tests.support.language_models import TEXTS, save_language_model
from tests.support.sampling import sample

NOTE = "no model was scored again"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [save_language_model("llama", root / f"m{seed}", seed=seed) for seed in range(3)]


@pytest.fixture
def models(originals, tmp_path):
    """Return models that may be changed."""
    return [shutil.copytree(model, tmp_path / model.name) for model in originals]


@contextmanager
def scored(monkeypatch, *, fail_at=None):
    """Count the models that are scored, and cut off the scoring at one of them."""
    from shardmix.scoring import scoring

    score_model, names = scoring.score_model, []

    def counted(checkpoint, *args, **options):
        if len(names) == fail_at:
            raise KeyboardInterrupt
        names.append(checkpoint.folder.name)
        return score_model(checkpoint, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_model", counted)
        yield names


def merge(models, out, *, examples=TEXTS, scoring=None, **options):
    options = {"max_shard_size": "8KB", "workers": 1, **options}
    return merge_by_examples(models, out, examples, "decoder", scoring=scoring or {}, **options)


def cut_off(models, out, **options):
    with cut_off_after(2), pytest.raises(KeyboardInterrupt):
        merge(models, out, **options)


def staged(tmp_path):
    return tmp_path / ".out.shardmix"


def test_another_budget_goes_on_unscored(models, tmp_path, monkeypatch):
    """Losses would differ in their last digits; so the first run's are taken."""
    cut_off(models, tmp_path / "out", max_memory="2GiB")
    assert shardmix.status(tmp_path / "out").unfinished.num_models_scored == 3
    lines = (staged(tmp_path) / "scores").read_text().splitlines()
    first = json.loads(lines[-1])[2]
    with scored(monkeypatch) as names:
        report = merge(models, tmp_path / "out", max_memory="4GiB", workers=2)
    assert names == []
    assert report.bytes_kept > 0
    assert report.weights == report.scores.weights == tuple(first["weights"])
    assert report.scores.losses == tuple(first["losses"])
    assert report.scores.bytes_read == 0
    assert any(NOTE in warning for warning in report.warnings)
    assert not staged(tmp_path).exists()
    by_hand = list(zip(models, report.weights, strict=True))
    options = {"max_shard_size": "8KB", "model_type": "decoder"}
    shardmix.merge(by_hand, tmp_path / "by-hand" / "out", **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "by-hand" / "out")


def test_undisturbed_merge_is_silent_of_it(models, tmp_path, monkeypatch):
    """An undisturbed merge says nothing of it."""
    with scored(monkeypatch) as names:
        report = merge(models, tmp_path / "out")
    assert names == ["m0", "m1", "m2"]
    assert not any(NOTE in warning for warning in report.warnings)
    assert not staged(tmp_path).exists()


def test_a_scoring_that_is_cut_off_goes_on(models, tmp_path, monkeypatch):
    with scored(monkeypatch, fail_at=2), pytest.raises(KeyboardInterrupt) as caught:
        merge(models, tmp_path / "out")
    assert "the losses of 2 of 3 models are kept in" in str(caught.value)
    status = shardmix.status(tmp_path / "out").unfinished
    assert (status.num_models_scored, status.merge) == (2, None)
    with scored(monkeypatch) as names:
        report = merge(models, tmp_path / "out", max_memory="4GiB")
    assert names == ["m2"]
    assert any("losses of 2 models are an earlier" in warning for warning in report.warnings)
    whole = merge(models, tmp_path / "whole")
    assert report.scores.losses == whole.scores.losses
    assert report.scores.bytes_read < whole.scores.bytes_read


def test_scoring_cut_early_leaves_nothing(models, tmp_path, monkeypatch):
    """A scoring cut off at once leaves nothing."""
    with scored(monkeypatch, fail_at=0), pytest.raises(KeyboardInterrupt):
        merge(models, tmp_path / "out")
    assert not staged(tmp_path).exists()


def edit_tokenizer(model):
    path = model / "tokenizer_config.json"
    path.write_text(path.read_text().rstrip() + "\n\n")


def edit_weights(model):
    path = next(model.glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"examples": TEXTS[:-1]}, "the examples are others"),
        ({"scoring": {"temperature": 2.0}}, "temperature 5.0 then, 2.0 now"),
        ({"scoring": {"dtype": "bfloat16"}}, "dtype auto then, bfloat16 now"),
    ],
)
def test_other_examples_are_scored_anew(models, tmp_path, monkeypatch, change, finding):
    """The merge is then another one; what was begun goes on with what it was begun with."""
    cut_off(models, tmp_path / "out")
    with scored(monkeypatch) as names:
        with pytest.raises(
            OutputError, match=rf"another merge: weights .*again, since {finding}\)"
        ):
            merge(models, tmp_path / "out", **change)
        assert names == ["m0", "m1", "m2"]
        assert merge(models, tmp_path / "out").bytes_kept > 0
    assert len(names) == 3


def test_changed_weights_are_scored_anew(models, tmp_path, monkeypatch):
    cut_off(models, tmp_path / "out")
    edit_weights(models[1])
    finding = r"scored again, since a model's weight files are not what they were"
    with scored(monkeypatch) as names, pytest.raises(OutputError, match=finding):
        merge(models, tmp_path / "out")
    assert names == ["m0", "m1", "m2"]


def test_a_changed_tokenizer_is_scored_anew(models, tmp_path, monkeypatch):
    """It comes to the same here, where only white space is another."""
    cut_off(models, tmp_path / "out")
    edit_tokenizer(models[1])
    with scored(monkeypatch) as names:
        assert merge(models, tmp_path / "out").bytes_kept > 0
    assert names == ["m0", "m1", "m2"]


def test_restarting_scores_anew(models, tmp_path, monkeypatch):
    cut_off(models, tmp_path / "out")
    with scored(monkeypatch) as names, cut_off_after(2), pytest.raises(KeyboardInterrupt):
        merge(models, tmp_path / "out", restart=True)
    assert len(names) == 3
    with scored(monkeypatch) as names:
        assert merge(models, tmp_path / "out").bytes_kept > 0
    assert names == []


@pytest.mark.parametrize("part", sample("torn scores", [0.1, 0.5, 0.9, 0.999], 2))
def test_a_torn_record_is_ignored(models, tmp_path, monkeypatch, part):
    """Whatever of it a power cut has left."""
    with scored(monkeypatch, fail_at=2), pytest.raises(KeyboardInterrupt):
        merge(models, tmp_path / "out")
    path = staged(tmp_path) / "scores"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    num_whole = path.read_bytes().count(b"\n")
    with scored(monkeypatch) as names:
        report = merge(models, tmp_path / "out")
    assert names == ["m0", "m1", "m2"][max(num_whole - 1, 0) :]
    assert report.scores.losses == merge(models, tmp_path / "whole").scores.losses


@pytest.mark.parametrize("content", [b"\xff\n", b"[]\n", b"[" * 10_000 + b"\n", b'["x",1,{}]\n'])
def test_what_is_no_record_is_ignored(models, tmp_path, monkeypatch, content):
    cut_off(models, tmp_path / "out")
    (staged(tmp_path) / "scores").write_bytes(content)
    shutil.rmtree(staged(tmp_path) / "model")
    (staged(tmp_path) / "journal").unlink()
    with scored(monkeypatch) as names:
        merge(models, tmp_path / "out")
    assert names == ["m0", "m1", "m2"]


def test_weights_follow_from_losses(models, tmp_path, monkeypatch):
    """Those in the record are not taken, nor is a report that is of other models."""
    cut_off(models, tmp_path / "out")
    path = staged(tmp_path) / "scores"
    lines = path.read_text().splitlines()
    digest, _, report = json.loads(lines[-1])
    forged = [digest, 0, {**report, "weights": [1.0, 0.0, 0.0]}]
    path.write_text("\n".join([*lines[:-1], json.dumps(forged)]) + "\n")
    assert merge(models, tmp_path / "out").weights == tuple(report["weights"])
    cut_off(models, tmp_path / "out2")
    path = tmp_path / ".out2.shardmix" / "scores"
    forged = [digest, 0, {**report, "losses": [1.0], "weights": [1.0]}]
    path.write_text("\n".join([*lines[:-1], json.dumps(forged)]) + "\n")
    with scored(monkeypatch) as names:
        assert merge(models, tmp_path / "out2").weights == tuple(report["weights"])
    assert names == []  # each model's own score is there


@pytest.mark.parametrize("score", [{}, [], {"losses": {"mean": 1.0, "per_example": [1.0]}}])
def test_a_score_of_no_use_is_found_anew(models, tmp_path, monkeypatch, score):
    with scored(monkeypatch, fail_at=2), pytest.raises(KeyboardInterrupt):
        merge(models, tmp_path / "out")
    path = staged(tmp_path) / "scores"
    head, first, second = path.read_text().splitlines()
    digest, _, whole = json.loads(first)
    forged = json.dumps([digest, 1, {**whole, **score} if score else score])
    path.write_text("\n".join([head, forged, second]) + "\n")
    with scored(monkeypatch) as names:
        merge(models, tmp_path / "out")
    assert names == ["m0", "m2"]


def test_a_planted_link_is_refused(models, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("thesis")
    staged(tmp_path).mkdir()
    (staged(tmp_path) / "scores").symlink_to(precious)
    with pytest.raises(OutputError, match=r"scores: is a link"):
        merge(models, tmp_path / "out")
    assert precious.read_text() == "thesis"
    assert shardmix.status(tmp_path / "out").unfinished.num_models_scored == 0


def test_mixing_goes_on_with_them(models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    names = [str(model) for model in models]
    options = {"output_path": out, "max_shard_size": "8KB"}
    with cut_off_after(2), pytest.raises(KeyboardInterrupt):
        mix_models_with_data(names, "decoder", TEXTS, **options)
    first = json.loads((staged(tmp_path) / "scores").read_text().splitlines()[-1])[2]["weights"]
    with scored(monkeypatch) as again:
        mix_models_with_data(names, "decoder", TEXTS, max_memory="4GiB", **options)
    assert again == []
    printed = capsys.readouterr().out
    assert all(f"{name} {weight}" in printed for name, weight in zip(names, first, strict=True))


def test_a_plain_merge_leaves_them_alone(models, tmp_path, monkeypatch):
    """It is refused as another one, and what was found stays."""
    cut_off(models, tmp_path / "out")
    equal = [(model, 1 / 3) for model in models]
    with pytest.raises(OutputError, match="another merge: weights"):
        shardmix.merge(equal, tmp_path / "out", max_shard_size="8KB", allow_weight_sum=True)
    with scored(monkeypatch) as names:
        merge(models, tmp_path / "out")
    assert names == []
