"""Rows of models with different vocabularies, merged by token: against dictionaries and torch."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardmix
from tests.support.models import load_model
from tests.support.sampling import examples
from tests.support.vocabularies import EMBEDDING, HEAD, NORM, filled, ids_of, model_of, numbered

SHARED = [f"w{number}" for number in range(12)]


def merged(tmp_path, models, **options):
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    report = shardmix.merge(models, out, **options)
    return load_model(out), ids_of(out), report


def test_rows_follow_their_tokens(tmp_path):
    """Of a permuted vocabulary, each token's rows are averaged with one another."""
    a = model_of(tmp_path / "a", numbered(SHARED), seed=1)
    b = model_of(tmp_path / "b", numbered(SHARED[::-1]), seed=2)
    models = {str(tmp_path / "a"): 0.25, str(tmp_path / "b"): 0.75}
    with pytest.raises(shardmix.MismatchError, match="stand for other tokens"):
        shardmix.merge(models, tmp_path / "refused")
    out, ids, _ = merged(tmp_path, models, tokenizer_source="base")
    assert ids == numbered(SHARED)
    for name in (EMBEDDING, HEAD):
        wanted = 0.25 * a[name].double() + 0.75 * b[name].flip(0).double()
        assert torch.equal(out[name], wanted.bfloat16())
    assert torch.equal(out[NORM], (0.25 * a[NORM].double() + 0.75 * b[NORM].double()).bfloat16())


def test_one_vocabulary_gives_the_same_bytes(tmp_path):
    """Models that agree are merged as without a source of the tokenizer, padding included."""
    for number, name in enumerate("ab"):
        model_of(tmp_path / name, numbered(SHARED), ["<x>"], rows=20, seed=number)
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    plain = tmp_path / "plain"
    shardmix.merge(models, plain)
    for source in ("base", "union", str(tmp_path / "b")):
        out, _, _ = merged(tmp_path, models, tokenizer_source=source)
        assert out.keys() == load_model(plain).keys()
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()


words = st.lists(st.sampled_from([f"t{number}" for number in range(9)]), unique=True, max_size=9)


@st.composite
def vocabularies(draw):
    """Draw a model's own words, added tokens, padding and dtype."""
    own = ["<unk>", *draw(words)]
    added = [f"<{word}>" for word in draw(words)]
    padding = draw(st.integers(0, 3))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    return draw(st.permutations(own)), added, padding, dtype


@settings(
    max_examples=examples(15),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    models=st.lists(vocabularies(), min_size=2, max_size=4),
    source=st.sampled_from(["base", "union", 0, 1]),
    method=st.sampled_from(["linear", "task_arithmetic"]),
    tied=st.booleans(),
)
def test_rows_equal_a_dictionarys(tmp_path, models, source, method, tied):
    """For any vocabularies, sources, methods and dtypes."""
    tensors, ids, texts = [], [], []
    for number, (own, added, padding, dtype) in enumerate(models):
        folder = tmp_path / str(number)
        shutil.rmtree(folder, ignore_errors=True)
        count = len(own) + len(added) + padding
        saved = model_of(
            folder, numbered(own), added, rows=count, seed=number, dtype=dtype, tied=tied
        )
        tensors.append(saved)
        ids.append(ids_of(folder))
        texts.append(str(folder))
    has_base = method == "task_arithmetic"
    out, found, _ = merged(
        tmp_path,
        [(text, 0.5) for text in (texts[1:] if has_base else texts)],
        tokenizer_source=texts[source] if isinstance(source, int) else source,
        method=method,
        base_model=texts[0] if has_base else None,
        dtype="float32",
        allow_weight_sum=True,
    )
    giver = source if isinstance(source, int) else 0
    own = dict(ids[giver])
    if source == "union":
        for other in ids:
            for token in sorted(other, key=other.__getitem__):
                own.setdefault(token, len(own))
    assert found == own
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        stored = [each[name] for each in tensors]
        assert len(out[name]) == max(len(stored[giver]), len(own))
        for token, at in own.items():
            base = 0 if has_base else None
            rows = [filled(token, n, ids, stored, base).double() for n in range(len(models))]
            wanted = sum(0.5 * row for row in rows)
            if has_base:
                wanted = rows[0] + sum(0.5 * (row - rows[0]) for row in rows[1:])
            largest = max(float(row.abs().max()) for row in rows)
            assert (out[name][at].double() - wanted).abs().max() <= 5e-7 * largest


def test_config_has_the_outputs_ids(tmp_path):
    """Special tokens keep their texts, and get the ids of the output."""
    special = ["<s>", "</s>", "<pad>"]
    ids = {"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 2}
    model_of(tmp_path / "a", numbered([*special, *SHARED]), **ids)
    model_of(tmp_path / "b", numbered([*SHARED, "</s>", "<s>"]), ["<new>"])
    suppressed = {"suppress_tokens": [2, 7, -1], "bos_token_id": 0}
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps(suppressed))
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    _, found, report = merged(tmp_path, models, tokenizer_source=str(tmp_path / "b"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 15
    assert config["bos_token_id"] == found["<s>"] == 13
    assert config["eos_token_id"] == [found["</s>"], found["w2"]] == [12, 2]
    assert config["pad_token_id"] is None
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"suppress_tokens": [found["w4"], -1], "bos_token_id": 13}
    assert any("pad_token_id 2, suppress_tokens 2" in note for note in report.warnings)


def pair(tmp_path, **options):
    """Save two models of which each has tokens that the other lacks; return paths and tensors."""
    a = model_of(tmp_path / "a", numbered(SHARED), ["<a>", "<both>"], seed=1, **options)
    b = model_of(tmp_path / "b", numbered(SHARED), ["<both>", "<b>", "<c>"], seed=2, **options)
    return str(tmp_path / "a"), str(tmp_path / "b"), a, b


def test_refusal_names_the_tokens(tmp_path):
    """By default; if only rows differ in number it says so."""
    a, b, _, _ = pair(tmp_path)
    with pytest.raises(shardmix.MismatchError) as caught:
        shardmix.merge({a: 0.5, b: 0.5}, tmp_path / "out")
    assert f'only in {a}: "<a>"; only in {b}: "<b>", "<c>"' in str(caught.value)
    assert "--tokenizer-source base or union" in str(caught.value)
    model_of(tmp_path / "wide", numbered(SHARED), ["<a>", "<both>"], rows=64)
    with pytest.raises(shardmix.MismatchError, match="same tokens, other rows are padding"):
        shardmix.merge({a: 0.5, str(tmp_path / "wide"): 0.5}, tmp_path / "out")


def recipe(tmp_path, models, tokens, **tokenizer):
    """Write a recipe with mergekit's `tokenizer`."""
    content = {
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in models],
        "merge_method": "linear",
        "dtype": "float32",
        "tokenizer": {**tokenizer, "tokens": tokens},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def test_tokens_take_the_rows_that_are_named(tmp_path):
    """A model's row, another token's, an id's, zeros; with force in models that have one, too."""
    a, b, of_a, of_b = pair(tmp_path)
    tokens = {
        "<a>": {"source": a},
        "<both>": {"source": b, "force": True},
        "<b>": {"source": {"kind": "zero"}},
        "<c>": {"source": {"kind": "model_token", "model": a, "token": "w3"}, "force": True},
        "w5": {"source": {"kind": "zero"}},
        "w6": {"source": {"kind": "zero"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": b, "token_id": 4}},
    }
    out, ids, _ = merged(tmp_path, recipe(tmp_path, [a, b], tokens))
    va, vb = ids_of(tmp_path / "a"), ids_of(tmp_path / "b")
    assert ids == {**va, "<b>": 14, "<c>": 15, "<new>": 16}
    for name in (EMBEDDING, HEAD):
        x, y = of_a[name].double(), of_b[name].double()
        wanted = {
            "<a>": x[va["<a>"]],
            "<both>": y[vb["<both>"]],
            "<b>": y[vb["<b>"]] / 2,
            "<c>": x[3],
            "w5": (x[5] + y[5]) / 2,
            "w6": torch.zeros(6),
            "<new>": y[4],
        }
        for token, row in wanted.items():
            assert torch.equal(out[name][ids[token]], row.float()), token


def test_padding_is_the_givers(tmp_path):
    """Rows without a token are merged where both have them, else they are the giver's."""
    a = model_of(tmp_path / "a", numbered(SHARED), rows=20, seed=1)
    b = model_of(tmp_path / "b", numbered(SHARED), ["<b>"], rows=16, seed=2)
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    for source, rows, first in (("base", 20, 13), ("union", 20, 13), (str(tmp_path / "b"), 16, 13)):
        out, _, _ = merged(tmp_path, models, tokenizer_source=source, dtype="float32")
        x, y = a[EMBEDDING].float(), b[EMBEDDING].float()
        assert len(out[EMBEDDING]) == rows
        assert torch.equal(out[EMBEDDING][first:16], (x[first:16] + y[first:16]) / 2)
        assert torch.equal(out[EMBEDDING][16:], x[16:20] if rows == 20 else x[:0])
        # Row 12 is a token in one model, and padding in the other.
        assert torch.equal(out[EMBEDDING][12], x[12] if source == "base" else y[12])


@pytest.mark.parametrize(("multiple", "rows"), [(1, 13), (8, 16), (64, 64)])
def test_rows_are_a_multiple(tmp_path, multiple, rows):
    """Beyond the giver's rows they are averages of all rows before, in each model."""
    a = model_of(tmp_path / "a", numbered(SHARED), rows=14, seed=1)
    b = model_of(tmp_path / "b", numbered(SHARED), ["<b>"], rows=40, seed=2)
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    options = {"tokenizer_source": "union", "pad_to_multiple_of": multiple, "dtype": "float32"}
    out, _, _ = merged(tmp_path, models, **options)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    for name in (EMBEDDING, HEAD):
        x, y = a[name].double(), b[name].double()
        own = torch.cat([(x[:12] + y[:12]) / 2, y[12:13]])
        assert len(out[name]) == rows
        assert torch.equal(out[name][:13], own.float())
        if rows > 13:
            own = torch.cat([own, (x[13:14] + y[13:14]) / 2])
            torch.testing.assert_close(out[name][13], own[13].float())
            for row in out[name][14:]:
                torch.testing.assert_close(row, own.mean(0).float(), rtol=1e-6, atol=1e-6)


def test_options_say_what_a_recipe_says(tmp_path):
    """They replace its source and its multiple."""
    a, b, _, _ = pair(tmp_path)
    path = recipe(tmp_path, [a, b], {}, source="base")
    first, _, _ = merged(tmp_path, path, tokenizer_source="union", pad_to_multiple_of=8)
    path = recipe(tmp_path, [a, b], {}, source="union", pad_to_multiple_of=8)
    again, _, _ = merged(tmp_path, path)
    assert len(first[EMBEDDING]) == 16
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(shardmix.MismatchError, match="shapes must match"):
        shardmix.merge(path, tmp_path / "refused", tokenizer_source="refuse")


def test_base_of_linear_fills_in(tmp_path):
    """As in mergekit: a base model that is one of the models gives rows that others lack."""
    words = {
        name: numbered([*SHARED, *more])
        for name, more in {"a": [], "b": ["new"], "c": ["new"]}.items()
    }
    saved = {
        name: model_of(tmp_path / name, vocab, seed=seed)
        for seed, (name, vocab) in enumerate(words.items())
    }
    models = {str(tmp_path / name): 0.25 if name != "c" else 0.5 for name in "abc"}
    rows = [saved[name][EMBEDDING][12].double() for name in "bc"]
    for base, lacking in ((None, sum(rows) / 2), (str(tmp_path / "c"), rows[1])):
        out, ids, _ = merged(
            tmp_path, models, tokenizer_source="union", base_model=base, dtype="float32"
        )
        wanted = 0.25 * lacking.float().double() + 0.25 * rows[0] + 0.5 * rows[1]
        torch.testing.assert_close(
            out[EMBEDDING][ids["new"]].double(), wanted, rtol=1e-6, atol=1e-6
        )
        report = shardmix.verify(
            tmp_path / "out", recompute=True, sources={name: tmp_path / name for name in "abc"}
        )
        assert report.is_verified, report.problems


def slow(folder, files, tokens, seed):
    """Save a model whose tokenizer is in files of slow tokenizers."""
    tensors = model_of(folder, numbered(tokens), seed=seed)
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_text(content)
    return tensors


@pytest.mark.parametrize("kind", ["vocab.txt", "vocab.json"])
def test_rows_follow_slow_tokenizers(tmp_path, kind):
    """Words by line or by number, and added tokens beside them."""

    def files(words, added):
        ids = {token: len(words) + number for number, token in enumerate(added)}
        whole = json.dumps(numbered(words))
        own = "".join(f"{word}\n" for word in words) if kind == "vocab.txt" else whole
        decoder = {str(number): {"content": token} for token, number in ids.items()}
        config = json.dumps({"added_tokens_decoder": decoder})
        beside = {"added_tokens.json": json.dumps(ids), "tokenizer_config.json": config}
        return {kind: own, **(beside if added else {})}

    reverse = SHARED[::-1]
    a = slow(tmp_path / "a", files(SHARED, []), SHARED, seed=1)
    b = slow(tmp_path / "b", files(reverse, ["<b>"]), [*reverse, "<b>"], seed=2)
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    shardmix.merge(models, tmp_path / "out", tokenizer_source="base", dtype="float32")
    out = load_model(tmp_path / "out")[EMBEDDING]
    x, y = a[EMBEDDING].float(), b[EMBEDDING].float()
    assert torch.equal(out, (x + y[:12].flip(0)) / 2)
    shardmix.merge(models, tmp_path / "of-b", tokenizer_source=tmp_path / "b", dtype="float32")
    out = load_model(tmp_path / "of-b")[EMBEDDING]
    assert torch.equal(out, torch.cat([(x.flip(0) + y[:12]) / 2, y[12:]]))
    for name in files(reverse, ["<b>"]):
        copied = (tmp_path / "of-b" / name).read_bytes()
        assert copied == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(shardmix.SourceError, match="new tokens are written only into a tokenizer"):
        shardmix.merge(models, tmp_path / "united", tokenizer_source="union")


def test_kinds_of_files_meet(tmp_path):
    """A vocab.txt of one model and a tokenizer.json of another say the same of tokens."""
    reverse = SHARED[::-1]
    words = {"vocab.txt": "".join(f"{word}\n" for word in SHARED)}
    a = slow(tmp_path / "a", words, SHARED, seed=1)
    b = model_of(tmp_path / "b", numbered(reverse), ["<b>"], seed=2, kind="WordLevel")
    models = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    out, ids, _ = merged(tmp_path, models, tokenizer_source=str(tmp_path / "b"), dtype="float32")
    assert ids == {**numbered(reverse), "<b>": 12}
    x, y = a[HEAD].float(), b[HEAD].float()
    assert torch.equal(out[HEAD], torch.cat([(x.flip(0) + y[:12]) / 2, y[12:]]))
