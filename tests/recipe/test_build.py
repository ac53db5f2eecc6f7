"""Recipes from words, pairs and options: what they mean, and the check of their sum."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.errors import RecipeError
from shardmix.recipe import Recipe, RecipeModel
from shardmix.recipe.build import (
    build_recipe,
    parse_parameter_words,
    parse_source_words,
    recipe_notes,
)
from shardmix.recipe.parameters import used_weights
from shardmix.recipe.recipe import plain


def test_all_forms_mean_the_same_recipe(tmp_path):
    """Pairs, mappings and YAML mean the same recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "models: [{model: a, parameters: {weight: 0.75}}, {model: b, parameters: {weight: .25}}]\n"
        "parameters: {normalize: false}\n"
    )
    recipe = build_recipe({"a": 0.75, "b": 0.25})
    assert recipe.sources == ("a", "b")
    assert used_weights(recipe) == (0.75, 0.25)
    assert build_recipe([("a", 0.75), ("b", 0.25)]) == recipe
    assert build_recipe(str(path)) == build_recipe(recipe) == recipe


@pytest.mark.parametrize("weights", [(0.5, 0.6), (0.1, 0.1), (1.0, 0.0011), (-1.0, 1.9)])
def test_sum_unlike_one_must_be_meant(weights):
    """Weights that do not sum to one are refused unless meant."""
    pairs = list(zip("ab", weights, strict=True))
    with pytest.raises(RecipeError, match=r"weights sum to .*not 1"):
        build_recipe(pairs)
    assert used_weights(build_recipe(pairs, allow_weight_sum=True)) == weights


def test_other_methods_check_no_sum():
    recipe = build_recipe({"a": 1, "b": 1}, method="task_arithmetic", base_model="c")
    assert used_weights(recipe) == (1.0, 1.0)
    assert recipe.sources == ("c", "a", "b")
    assert recipe.parameters == ()


def test_sum_close_to_one_passes():
    """A sum within a thousandth of one passes as it is."""
    recipe = build_recipe([("a", 0.3333), ("b", 0.6667 + 0.0009)])
    assert used_weights(recipe) == (0.3333, 0.6676)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e39, -1e39])
def test_nonfinite_weights_are_refused(weight):
    """Weights that are not finite in float32 are refused, whatever is allowed."""
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", weight), ("b", 0.5)], allow_weight_sum=True)
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", weight), ("b", 0.5)], normalize=True)


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=9))
def test_normalised_weights_keep_ratios(weights):
    """Normalised weights sum to one and keep their ratios, however often a recipe is built."""
    pairs = [(str(number), weight) for number, weight in enumerate(weights)]
    once = build_recipe(pairs, normalize=True)
    normalised = used_weights(once)
    assert math.fsum(normalised) == pytest.approx(1, abs=1e-12)
    assert normalised[0] * weights[-1] == pytest.approx(normalised[-1] * weights[0], rel=1e-12)
    assert build_recipe(build_recipe(once)) == once


def test_cancelling_weights_are_refused():
    """Weights that cancel cannot be normalised."""
    with pytest.raises(RecipeError, match="sum to 0"):
        build_recipe([("a", 1.0), ("b", -1.0)], normalize=True)


def test_infinite_normalised_is_refused():
    """Weights that are infinite once normalised are refused."""
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", 1e30), ("b", -1e30), ("c", 1e-10)], normalize=True)


def test_only_zeros_are_refused():
    """Weights that are all 0, or 0 in float32, leave nothing of any model."""
    with pytest.raises(RecipeError, match="every weight is 0"):
        build_recipe([("a", 0.0), ("b", 1e-60)], allow_weight_sum=True)


@pytest.mark.parametrize("models", [[], [("a", 1.0)], {"a": 1.0}])
def test_fewer_than_two_models_are_refused(models):
    with pytest.raises(RecipeError, match="at least two"):
        build_recipe(models)


@pytest.mark.parametrize("models", [["a", "bc"], [("a", 1, 2)], [3, 4], [("a", None), ("b", 1)]])
def test_pairs_that_are_none_are_refused(models):
    with pytest.raises(RecipeError):
        build_recipe(models)


def test_models_of_no_collection_are_refused():
    """Models that are no collection are refused."""
    with pytest.raises(RecipeError, match="int given"):
        build_recipe(3)


def test_unknown_dtype_has_a_suggestion():
    """An unknown dtype is refused with a suggestion."""
    with pytest.raises(RecipeError, match="did you mean 'bfloat16'"):
        build_recipe({"a": 0.5, "b": 0.5}, dtype="bfloat")


def test_plain_sources_suit_slerp():
    """Models of a method without weights are plain sources; the base may be among them."""
    expected = Recipe((RecipeModel("b"),), "slerp", "a", plain({"t": 0.3}))
    options = {"method": "slerp", "base_model": "a", "parameters": {"t": 0.3}}
    assert build_recipe(["a", "b"], **options) == build_recipe(["b"], **options) == expected
    with pytest.raises(RecipeError, match="2 models given: slerp takes at most 1 beside the base"):
        build_recipe(["a", "b", "c"], **options)
    with pytest.raises(RecipeError, match="1 model given"):
        build_recipe(["a"], **options)
    with pytest.raises(RecipeError, match="slerp has no parameter 'weight'"):
        build_recipe({"a": 0.5, "b": 0.5}, **options)


def test_linear_base_gives_the_config():
    """The base model of the linear method is a model like all, and gives the config."""
    recipe = build_recipe({"a": 0.5, "b": 0.5}, base_model="b")
    assert (recipe.sources, recipe.base_model) == (("a", "b"), None)
    assert recipe.config_from == "b"
    assert build_recipe({"a": 1, "b": 0}, base_model="b", config_from="c").config_from == "c"


@pytest.mark.parametrize(
    ("dtypes", "note"),
    [
        ({}, None),
        ({"out_dtype": "float16"}, None),
        ({"dtype": "float16", "out_dtype": "float16"}, None),
        ({"dtype": "float32"}, None),
        ({"dtype": "float16"}, "dtype float16: is taken as the output's"),
        ({"dtype": "float16", "out_dtype": "float32"}, "dtype float16: has no effect, since"),
    ],
)
def test_dtype_is_noted(dtypes, note):
    """What mergekit would cast models to is the output's dtype here, and a note says so."""
    models = tuple(RecipeModel(name, plain({"weight": 0.5})) for name in "ab")
    notes = list(recipe_notes(build_recipe(Recipe(models, **dtypes))))
    assert len(notes) == (note is not None)
    assert all(text.startswith(note) for text in notes)


def test_last_equals_sign_divides():
    """The last equals sign of a word divides source and weight."""
    assert parse_source_words(["a=b/c=0.5", "org/x@v1=5e-1"]) == [("a=b/c", 0.5), ("org/x@v1", 0.5)]


def test_words_follow_the_method():
    """A word is a source if its models have no weight, or if it is the base model."""
    assert parse_source_words(["a=1", "b"], method="slerp") == ["a=1", "b"]
    assert parse_source_words(["a+b"]) == [("a+b", 1.0)]
    assert parse_source_words(["a+b=0.5", "c=0.5"]) == [("a+b", 0.5), ("c", 0.5)]
    words = parse_source_words(["a", "b=2"], method="task_arithmetic", base_model="a")
    assert words == ["a", ("b", 2.0)]


@pytest.mark.parametrize("word", ["a", "a=", "=0.5", "a=x", "a=0.5x"])
def test_missing_weight_shows_an_example(word):
    """A word without a weight is refused with an example."""
    with pytest.raises(RecipeError, match=r"write SOURCE=WEIGHT|is not a number"):
        parse_source_words([word])


def test_parameter_words_are_read():
    """Values divided by commas are a gradient; their types are the method's."""
    words = parse_parameter_words(["t=0,0.5,1e0"])
    assert words == {"t": ["0", "0.5", "1e0"]}
    recipe = build_recipe(["b"], method="slerp", base_model="a", parameters=words)
    assert recipe.parameters[0].choices[0].points == (0.0, 0.5, 1.0)
    on = build_recipe({"a": 1, "b": 1}, parameters=parse_parameter_words(["normalize=true"]))
    assert used_weights(on) == (0.5, 0.5)


@pytest.mark.parametrize("words", [["t"], ["=1"], ["t="], ["t=1", "t=2"]])
def test_wrong_parameter_words_are_refused(words):
    with pytest.raises(RecipeError, match=r"must be NAME=VALUE|given twice"):
        parse_parameter_words(words)


def test_a_recipe_is_a_value():
    assert hash(build_recipe({"a": 0.5, "b": 0.5})) == hash(build_recipe([("a", 0.5), ("b", 0.5)]))
    assert isinstance(build_recipe({"a": 0.5, "b": 0.5}), Recipe)
