import json

import pytest

import shardmix
from shardmix.errors import MismatchError, RecipeError
from shardmix.matching.differences import Difference, same_number, settle
from shardmix.recipe.build import build_recipe
from shardmix.recipe.yaml_file import difference_keys
from tests.support.models import random_model, save_model

PAIRS = [("a", 0.5), ("b", 0.5)]
HEADS = Difference("num_heads", "num_heads: 2 in a, 4 in b", "the output takes 2", is_refused=True)
THETA = Difference("text_config.theta", "theta: 1 in a, 2 in b", "the output takes 1", False)


@pytest.mark.parametrize(
    "given",
    [["b", "a"], ("a", "b", "a"), "a,b", ["a , b"], {"a", "b"}],
)
def test_keys_are_sorted_each_once(given):
    """Lists and text with commas name the same keys."""
    assert build_recipe(PAIRS, allow_differences=given).allow_differences == ("a", "b")


@pytest.mark.parametrize("given", [1, True, {"a": 1}, [1], "", ["a,,b"], ["a\nb"], ["\ud800"]])
def test_what_names_no_key_is_refused(given):
    with pytest.raises(RecipeError, match="allow_differences"):
        difference_keys(given)


def test_refused_difference_names_the_remedy():
    with pytest.raises(MismatchError, match=r"2 in a, 4 in b.*--allow-differences num_heads "):
        settle([HEADS, THETA], ())


def test_misspelt_key_is_told_with_the_error():
    with pytest.raises(MismatchError, match=r"num_haeds, in which.*did you mean num_heads\?"):
        settle([HEADS], ("num_haeds",))


def test_an_allowed_difference_is_a_warning():
    assert settle([HEADS, THETA], ("num_heads",)) == (
        "num_heads: 2 in a, 4 in b; the output takes 2",
        "theta: 1 in a, 2 in b; the output takes 1",
    )


def test_a_key_allows_what_lies_below_it():
    below = Difference("text_config.act", "act", "", is_refused=True)
    assert settle([below], ("text_config",)) == ("act",)
    with pytest.raises(MismatchError):
        settle([below], ("text_conf",))


def test_an_unused_key_is_told():
    assert settle([THETA], ("text_config.thata",))[1] == (
        "allow_differences names text_config.thata, in which no models differ "
        "(did you mean text_config.theta?)"
    )


def test_verify_plans_with_the_merges_keys(tmp_path):
    """Verify plans with the keys of the merge.

    shardmix.json records them, and a recomputation takes them from there.
    """
    models = [(save_model(tmp_path / str(seed), random_model(seed)), 0.5) for seed in (1, 2)]
    shardmix.merge(models, tmp_path / "out", allow_differences=["b,a"])
    record = json.loads((tmp_path / "out" / "shardmix.json").read_text())
    assert record["recipe"]["allow_differences"] == ["a", "b"]
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (1e-5, 9.999999747378752e-06, True),
        (1e-5, 1.00001e-5, False),
        ([0.485, 0.5], [0.48500001430511475, 0.5], True),
        ([0.485, 0.5], [0.485], False),
        (500_000, 500_001, False),
        (1, 1.0, True),
        (float("inf"), 1e300, False),
        ([[1.0]], [[1]], True),
        ("1", 1, False),
    ],
)
def test_number_rounded_to_float32_is_equal(one, other, is_same):
    """A number rounded to float32 is the same."""
    assert same_number(one, other) is is_same
    assert same_number(other, one) is is_same
