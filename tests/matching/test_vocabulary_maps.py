"""Rows of models with different vocabularies, merged by token: against dictionaries and torch."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardmix
from tests.support.models import load_model
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
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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
