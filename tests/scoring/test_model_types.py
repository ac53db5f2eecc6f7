"""Types of models: a new one is a row and a line; one that its objective contradicts is refused."""

from dataclasses import replace

import pytest

from shardmix.conventions.model_types import CONTINUATION, MODEL_TYPES, TEXTS
from shardmix.errors import RecipeError
from shardmix.scoring import score
from shardmix.scoring.examples import load_examples
from shardmix.scoring.objectives import OBJECTIVES, objective_for
from shardmix.scoring.options import check_options
from tests.support.language_models import save_language_model

QUERIES = [{"query": "why", "pos": ["because"], "neg": ["no", "maybe so"]}] * 3
TEXT = {"input": "why", "output": "because"}


def add_type(monkeypatch, **changes):
    """Add a type `judge`, as the reranker but for these fields, with the reranker's loss."""
    row = replace(MODEL_TYPES["reranker"], name="judge", **changes)
    monkeypatch.setitem(MODEL_TYPES, "judge", row)
    monkeypatch.setitem(OBJECTIVES, "judge", OBJECTIVES["reranker"])


def test_a_new_type_is_a_row_and_a_line(tmp_path, monkeypatch):
    folder = save_language_model("llama-reranker", tmp_path / "m")
    add_type(monkeypatch)
    (loss,) = score([folder], "judge", QUERIES).losses
    assert loss == score([folder], "reranker", QUERIES).losses[0] != 0


@pytest.mark.parametrize(
    ("reads", "example"), [(CONTINUATION, TEXT), (TEXTS, QUERIES[0])], ids=["text", "query"]
)
def test_an_ill_fitting_row_is_refused(tmp_path, monkeypatch, reads, example):
    """An objective gets no examples that are read in another way: their loss would be 0."""
    folder = save_language_model("llama-reranker", tmp_path / "m")
    add_type(monkeypatch, reads=reads)
    with pytest.raises(RecipeError, match=f"'judge': its row says reads='{reads.name}', embeds"):
        score([folder], "judge", [example])


def test_pooling_for_nobody_is_refused(monkeypatch):
    """An objective that takes no embedding is not for a type that has one."""
    add_type(monkeypatch, embeds=True)
    with pytest.raises(RecipeError, match="says reads='pairs', embeds=True"):
        objective_for(None, check_options("judge", {}))


def test_a_type_without_objective_is_refused(monkeypatch):
    add_type(monkeypatch)
    monkeypatch.delitem(OBJECTIVES, "judge")
    with pytest.raises(RecipeError, match="'judge': has no line in"):
        objective_for(None, check_options("judge", {}))


def test_each_model_type_has_an_objective():
    assert OBJECTIVES.keys() == MODEL_TYPES.keys()
    for name, row in MODEL_TYPES.items():
        assert (OBJECTIVES[name].reads, OBJECTIVES[name].embeds) == (row.reads, row.embeds)


@pytest.mark.parametrize(
    ("loaded_for", "used_for", "example"),
    [("decoder", "reranker", TEXT), ("reranker", "decoder", QUERIES[0])],
)
def test_examples_of_other_types_refused(loaded_for, used_for, example):
    """Also if they are loaded already."""
    loaded = load_examples([example], check_options(loaded_for, {}))
    with pytest.raises(RecipeError, match=f"example 1: is a .*; a model of type {used_for} takes"):
        load_examples(loaded, check_options(used_for, {}))
