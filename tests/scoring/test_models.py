"""Losses of real architectures, streamed, against the reference's formula computed plainly."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardmix.errors import RecipeError, SourceError
from shardmix.scoring import compute_losses, fit, score, units
from shardmix.scoring.units import Grain
from tests.support.language_models import (
    KINDS,
    QUERIES,
    TEXTS,
    VOCABULARY,
    examples_for,
    plain_loss,
    save_language_model,
    save_tokenizer,
)
from tests.support.sampling import sample


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Give a folder of each kind of model, made when first asked for."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind, seed=0):
        path = root / f"{kind}-{seed}"
        return path if path.exists() else save_language_model(kind, path, seed=seed)

    return folder


def only(grain, monkeypatch, *, tokens=None):
    """Have models cut in one way alone, and passes no larger than so many tokens."""
    monkeypatch.setattr(fit, "_GRAINS", (grain,))
    if tokens is not None:
        monkeypatch.setattr(fit, "_LEAST_TOKENS", tokens)
        monkeypatch.setattr(fit, "BEST_TOKENS", {"cpu": tokens})


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_loss_is_the_plain_one(models, kind):
    examples = examples_for(kind)
    report = score([models(kind)], KINDS[kind][0], examples)
    assert report.losses[0] == pytest.approx(plain_loss(kind, models(kind), examples), rel=1e-5)
    assert report.weights == (1.0,)
    assert report.num_passes == (1,)


@pytest.mark.parametrize(
    ("kind", "grain"), sample("cuts of models", list(itertools.product(KINDS, Grain)), 24)
)
def test_cut_and_batches_do_not_matter(models, kind, grain, monkeypatch):
    """Neither the cut nor the batches matter."""
    examples = examples_for(kind)
    expected = plain_loss(kind, models(kind), examples)
    only(grain, monkeypatch, tokens=12)  # nearly every text a pass of its own
    losses = compute_losses([models(kind)], KINDS[kind][0], examples)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "t5", "mixtral"])
def test_head_in_slices_gives_the_same(models, kind, monkeypatch):
    """A head computed in slices gives the same."""
    monkeypatch.setattr(units, "SLICE_NBYTES", 300)  # two or three rows
    monkeypatch.setattr("shardmix.scoring.streamed_model.SLICE_NBYTES", 300)
    only(Grain.LEAF, monkeypatch, tokens=12)
    seen = []
    cut = units.cut

    def spy(*arguments, **options):
        partition = cut(*arguments, **options)
        seen.extend(unit.name for unit in partition.units if unit.kind is units.Kind.SLICES)
        return partition

    monkeypatch.setattr("shardmix.scoring.model_scoring.cut", spy)
    losses = compute_losses([models(kind)], KINDS[kind][0], TEXTS[:1])
    assert seen
    assert losses[0] == pytest.approx(plain_loss(kind, models(kind), TEXTS[:1]), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "bert", "bart"])
def test_weights_are_read_once(models, kind, monkeypatch):
    """Weights are read once for all passes."""
    only(Grain.BLOCK, monkeypatch, tokens=12)
    examples = examples_for(kind) * 3
    report = score([models(kind)], KINDS[kind][0], examples)
    assert report.num_passes == (1,)
    assert report.bytes_read <= 1.1 * report.bytes_stored


def test_weights_are_read_again_if_needed(models, monkeypatch):
    """If not all passes fit, the weights are read again."""
    only(Grain.BLOCK, monkeypatch, tokens=12)
    monkeypatch.setattr(fit, "_RUN_NBYTES", 0)
    monkeypatch.setattr(fit, "CHUNK_NBYTES", 0)
    monkeypatch.setattr("shardmix.scoring.model_scoring._room", lambda budget, held: 150_000)
    report = score([models("llama")], "decoder", TEXTS * 4)
    assert report.num_passes[0] > 1
    assert report.bytes_read > 1.5 * report.bytes_stored
    assert report.losses[0] == pytest.approx(plain_loss("llama", models("llama"), TEXTS * 4))


def test_bfloat16_model_computes_in_bfloat16(tmp_path):
    """A model in bfloat16 computes in it unless told otherwise."""
    folder = save_language_model("llama", tmp_path / "m", dtype=torch.bfloat16)
    own = score([folder], "decoder", TEXTS)
    wide = score([folder], "decoder", TEXTS, dtype="float32")
    assert (own.dtypes, wide.dtypes) == (("bfloat16",), ("float32",))
    assert own.losses[0] == pytest.approx(plain_loss("llama", folder, TEXTS), rel=1e-2)
    assert own.losses[0] != wide.losses[0]


def test_report_has_losses_of_each_example(models):
    """The report has losses of each model and example."""
    sources = [models("llama"), models("llama", 1)]
    report = score(sources, "decoder", TEXTS, temperature=0.5, batch_size=3)
    assert report.sources == tuple(map(str, sources))
    assert [len(row) for row in report.per_example] == [5, 5]
    for source, row in zip(sources, report.per_example, strict=True):
        for example, loss in zip(TEXTS, row, strict=True):
            assert loss == pytest.approx(plain_loss("llama", source, [example]), rel=1e-5)
    assert sum(report.weights) == pytest.approx(1.0, abs=1e-15)


def test_batches_average_over_one_another(models):
    """A batch averages over its tokens, and batches over one another."""
    one, two = (plain_loss("llama", models("llama"), TEXTS, batch_size=n) for n in (1, 2))
    assert abs(one - two) > 1e-3
    for size, expected in ((1, one), (2, two)):
        losses = compute_losses([models("llama")], "decoder", TEXTS, batch_size=size)
        assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_encoder_pools_by_mean_or_last_token(models):
    """An encoder can be scored by its mean or last token."""
    losses = {
        pooling: compute_losses([models("bert")], "encoder", QUERIES, pooling=pooling)[0]
        for pooling in ("cls", "mean", "lasttoken")
    }
    assert len(set(losses.values())) == 3


def test_absent_pooler_does_not_matter(models):
    """A pooler that is not stored does not matter.

    A masked language model has none; the encoder's states are what counts.
    """
    stored = json.loads((models("bert-masked") / "model.safetensors.index.json").read_text())
    assert not any("pooler" in name for name in stored["weight_map"])
    assert compute_losses([models("bert-masked")], "encoder", QUERIES)[0] > 0


def test_absent_head_is_no_reranker(models):
    """A head that is not stored is no reranker."""
    with pytest.raises(SourceError, match=r"stores nothing for classifier.*check --model-type"):
        score([models("bert")], "reranker", QUERIES)


def test_missing_pad_token_will_do(tmp_path):
    """A tokenizer without a pad token will do."""
    folder = save_language_model("llama", tmp_path / "m")
    expected = compute_losses([folder], "decoder", TEXTS)
    save_tokenizer(folder, pad_token=None)
    assert compute_losses([folder], "decoder", TEXTS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pad_token", ["</s>", None])
def test_batches_fill_with_models_padding(tmp_path, pad_token):
    """Batches are filled with what the model takes for padding.

    Its config and its tokenizer may differ; some models look for the last token by it.
    """
    folder = save_language_model("llama-reranker", tmp_path / "m")
    expected = plain_loss("llama-reranker", folder, QUERIES)
    save_tokenizer(folder, pad_token=pad_token)
    assert compute_losses([folder], "reranker", QUERIES)[0] == pytest.approx(expected, rel=1e-5)


def test_float32_of_transformers_stays(tmp_path):
    """What transformers keeps in float32 stays so.

    The bias by which a router picks experts: rounded, it picks others.
    """
    folder = save_language_model("deepseek", tmp_path / "m", dtype=torch.bfloat16)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("e_score_correction_bias"):
                tensors[name] = 100 + torch.arange(tensors[name].numel()) % 7 / 100
        save_file(tensors, path, metadata={"format": "pt"})
    expected = plain_loss("deepseek", folder, TEXTS)
    assert compute_losses([folder], "decoder", TEXTS)[0] == pytest.approx(expected, rel=5e-3)


def test_unused_tensors_are_told(tmp_path):
    """Tensors that the config does not use are told."""
    folder = save_language_model("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    report = score([folder], "decoder", TEXTS)
    assert any("model.layers.2" in text and "does not use" in text for text in report.warnings)


def test_indivisible_model_is_held_whole(models, monkeypatch):
    """A model that cannot be cut is held whole.

    Mamba hands the weights of a layer to a kernel, without calling the layer.
    """
    only(Grain.LEAF, monkeypatch)
    report = score([models("mamba")], "decoder", TEXTS)
    assert report.losses[0] == pytest.approx(plain_loss("mamba", models("mamba"), TEXTS), rel=1e-5)
    assert any("held in memory as a whole" in text for text in report.warnings)


def test_callers_own_error_stays(models):
    """An error of the caller's own stays it."""

    def stop(_event):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        score([models("llama")], "decoder", TEXTS, on_progress=stop)


def test_stored_tied_head_counts_as_stored(tmp_path):
    """A tied head that is stored all the same counts as stored."""
    untied = save_language_model("llama", tmp_path / "m", tie_word_embeddings=False)
    expected = compute_losses([untied], "decoder", TEXTS)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert compute_losses([untied], "decoder", TEXTS) == expected


def test_nonfinite_weights_name_the_model(tmp_path):
    """Weights that are not finite name the model and the example."""
    folder = save_language_model("llama", tmp_path / "m")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"][3] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"/m: its loss on example 1 is nan; .*--dtype float32"):
        score([folder], "decoder", TEXTS)


def test_shapes_unlike_the_configs_are_named(tmp_path):
    """Shapes that are not the config's are named."""
    folder = save_language_model("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(SourceError, match=r"is stored as \[48, 32\].*config says \[40, 32\]"):
        score([folder], "decoder", TEXTS)


def test_tokens_beyond_vocabulary_are_named(models, tmp_path):
    """Tokens beyond the vocabulary are named."""
    small = save_language_model("llama", tmp_path / "m", vocab_size=10)
    with pytest.raises(SourceError, match=r"/m: cannot be run.*check --model-type"):
        score([models("llama"), small], "decoder", TEXTS)


def test_a_model_of_another_type_is_named(models):
    with pytest.raises(SourceError, match="cannot be built as AutoModelForSeq2SeqLM"):
        score([models("llama")], "encoder-decoder", TEXTS)


def test_models_own_code_is_not_run_unasked(tmp_path):
    """A model with code of its own is not run unless asked."""
    folder = save_language_model("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(SourceError, match="--trust-remote-code"):
        score([folder], "decoder", TEXTS)


def test_long_text_is_cut_and_told(models):
    """A text longer than the model is cut, and said to be."""
    long = [{"input": "why", "output": "the cat " * 60}]
    report = score([models("llama")], "decoder", long)
    assert report.warnings == (
        "1 of 1 texts were cut off at 64 tokens (the model takes no more; 2048 were asked for)",
    )


def test_output_cut_off_entirely_is_an_error(models):
    """An output that is cut off entirely is an error naming it."""
    long = {"input": "the cat " * 60, "output": "yes"}
    with pytest.raises(RecipeError, match="example 3: `output` is cut off entirely"):
        score([models("llama")], "decoder", [*TEXTS[:2], long])


def test_cut_output_counts_for_nothing(models):
    """Beside others in its batch it counts for nothing."""
    long = {"input": "the cat " * 60, "output": "yes"}
    report = score([models("llama")], "decoder", [TEXTS[0], long])
    alone = score([models("llama")], "decoder", [TEXTS[0]])
    assert report.losses == pytest.approx(alone.losses, rel=1e-6)
    assert report.per_example[0][1] is None
    assert any("example 2: `output` is cut off entirely" in text for text in report.warnings)


def test_chat_template_frames_the_example(models, tmp_path):
    """A chat template puts the example into a conversation."""
    template = (
        "{% for m in messages %}{{ 'the ' if m.role == 'user' else 'a ' }}{{ m.content }}"
        "{{ ' mat ' if m.role == 'user' else ' tree' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
    )
    folder = save_language_model("llama", tmp_path / "m")
    save_tokenizer(folder, chat_template=template)
    example = {"input": "why does it rain", "output": "because of cold"}
    # By hand: the same words with the template's around them, and neither [CLS] nor </s>.
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = ["the", "why", "does", "it", "rain", "mat", "a", "because", "of", "cold", "tree"]
    ids = torch.tensor([VOCABULARY.index(word) for word in words])
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[6:-1], ids[7:]).item()
    losses = compute_losses([folder], "decoder", [example], chat_template=True)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_a_missing_chat_template_is_an_error(models):
    with pytest.raises(RecipeError, match="has no chat template"):
        score([models("llama")], "decoder", TEXTS, chat_template=True)


def test_progress_tells_model_and_share(models):
    """Progress tells which model, and how far."""
    events = []
    score([models("llama"), models("llama", 1)], "decoder", TEXTS, on_progress=events.append)
    assert [event.model for event in events] == sorted(event.model for event in events)
    assert {event.model for event in events} == {1, 2}
    fractions = [event.fraction for event in events if event.model == 2]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] == 1
    assert [event for event in events if event.is_end] == events[-1:]
