import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.errors import RecipeError
from shardmix.recipe import Recipe, build_recipe, load_recipe, parse_source_words


def write(path, text):
    path.write_text(text)
    return path


def test_all_forms_mean_the_same_recipe(tmp_path):
    """Pairs, mappings and YAML mean the same recipe."""
    path = write(
        tmp_path / "recipe.yaml",
        "models:\n  - {source: a, weight: 0.75}\n  - {source: b, weight: 0.25}\n",
    )
    recipe = build_recipe({"a": 0.75, "b": 0.25})
    assert recipe.sources == ("a", "b")
    assert recipe.weights == (0.75, 0.25)
    assert build_recipe([("a", 0.75), ("b", 0.25)]) == recipe
    assert build_recipe(str(path)) == build_recipe(recipe) == recipe


def test_a_yaml_recipe_gives_every_option(tmp_path):
    path = write(
        tmp_path / "recipe.yaml",
        """
models:
  - source: org/a@main
    weight: 2
  - source: b
    weight: 6e-0  # text to YAML 1.1, a number to Python
dtype: bfloat16
config_from: c
max_shard_size: 5GB
normalize: true
allow_differences: [tokenizer, text_config.rope_theta]
""",
    )
    recipe = build_recipe(path)
    assert recipe.allow_differences == ("text_config.rope_theta", "tokenizer")
    assert recipe.weights == (0.25, 0.75)
    assert (recipe.dtype, recipe.config_from, recipe.max_shard_size) == ("bfloat16", "c", 5 * 10**9)


def test_options_override_the_recipe(tmp_path):
    """Options given beside a recipe override it."""
    path = write(
        tmp_path / "recipe.yaml",
        "models: [{source: a, weight: 1}, {source: b, weight: 0}]\ndtype: float16\n"
        "config_from: c\n",
    )
    recipe = build_recipe(path, dtype="float32", config_from=None)
    assert (recipe.dtype, recipe.config_from) == ("float32", "c")


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("model: []", "unknown key 'model'.*did you mean 'models'"),
        ("models: []\ndytpe: float16", "unknown key 'dytpe'.*did you mean 'dtype'"),
        ("models: [{source: a, wieght: 1}]", "unknown key 'wieght'.*did you mean 'weight'"),
        ("models: [{source: a}, {source: b, weight: 1}]", r"models\[1\]: `weight` is missing"),
        ("models: 3", "`models` must be a list"),
        ("{}", "`models` must be a list"),
        ("- a\n- b", "must be a mapping"),
        ("models: [a, b]", r"models\[1\]: must be a mapping"),
        ("models: [", "not valid YAML"),
        ("models: []\nmodels: []", "given twice"),
        ("models: [{source: a, weight: x}, {source: b, weight: 1}]", "'x' is not a number"),
        ("models: [{source: a, weight: true}, {source: b, weight: 1}]", "True is not a number"),
        ("models: []\nnormalize: maybe", "must be true or false"),
        ("models: []\nmax_shard_size: lots", "size 'lots'"),
        ("models: [{source: a, weight: 1}]", "1 model given: a merge needs at least two"),
        ("models: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("models: {{ x }}", "recipe.yaml"),
        ("? [a]\n: b", "recipe.yaml"),
        ("models: [{source: a, weight: 2020-13-45}, {source: b, weight: 1}]", "not valid YAML"),
        ("models: !!int abc", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("models: []\nmax_shard_size: true", "size True"),
        ("models: []\nmax_shard_size: 5.0e+9", "size 5000000000.0"),
        ("models: [{source: '', weight: 1}, {source: b, weight: 0}]", "source is empty"),
        (
            "models: [{source: a, weight: .5}, {source: b, weight: .5}]\nconfig_from: ''",
            "source is empty",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path, text, finding):
    with pytest.raises(RecipeError, match=finding):
        build_recipe(write(tmp_path / "recipe.yaml", text))


def test_absent_recipe_file_is_refused(tmp_path):
    """A recipe file that is absent is refused."""
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("weights", [(0.5, 0.6), (0.1, 0.1), (1.0, 0.0011), (-1.0, 1.9)])
def test_sum_unlike_one_must_be_meant(weights):
    """Weights that do not sum to one are refused unless meant."""
    pairs = list(zip("ab", weights, strict=True))
    with pytest.raises(RecipeError, match=r"weights sum to .*not 1"):
        build_recipe(pairs)
    assert build_recipe(pairs, allow_weight_sum=True).weights == weights


def test_sum_close_to_one_passes():
    """A sum within a thousandth of one passes as it is."""
    assert build_recipe([("a", 0.3333), ("b", 0.6667 + 0.0009)]).weights == (0.3333, 0.6676)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_are_refused(weight):
    """Weights that are not finite are refused, whatever is allowed."""
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", weight), ("b", 0.5)], allow_weight_sum=True)
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", weight), ("b", 0.5)], normalize=True)


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=9))
def test_normalised_weights_keep_ratios(weights):
    """Normalised weights sum to one and keep their ratios."""
    pairs = [(str(number), weight) for number, weight in enumerate(weights)]
    normalised = build_recipe(pairs, normalize=True).weights
    assert math.fsum(normalised) == pytest.approx(1, abs=1e-12)
    assert normalised[0] * weights[-1] == pytest.approx(normalised[-1] * weights[0], rel=1e-12)


def test_cancelling_weights_are_refused():
    """Weights that cancel cannot be normalised."""
    with pytest.raises(RecipeError, match="sum to 0"):
        build_recipe([("a", 1.0), ("b", -1.0)], normalize=True)


@pytest.mark.parametrize("models", [[], [("a", 1.0)], {"a": 1.0}])
def test_fewer_than_two_models_are_refused(models):
    with pytest.raises(RecipeError, match="at least two"):
        build_recipe(models)


@pytest.mark.parametrize("models", [["a", "bc"], [("a", 1, 2)], [3, 4], [("a", None), ("b", 1)]])
def test_pairs_that_are_none_are_refused(models):
    with pytest.raises(RecipeError):
        build_recipe(models)


def test_unknown_dtype_has_a_suggestion():
    """An unknown dtype is refused with a suggestion."""
    with pytest.raises(RecipeError, match="did you mean 'bfloat16'"):
        build_recipe({"a": 0.5, "b": 0.5}, dtype="bfloat")


def test_last_equals_sign_divides():
    """The last equals sign of a word divides source and weight."""
    assert parse_source_words(["a=b/c=0.5", "org/x@v1=5e-1"]) == [("a=b/c", 0.5), ("org/x@v1", 0.5)]


@pytest.mark.parametrize("word", ["a", "a=", "=0.5", "a=x", "a=0.5x"])
def test_missing_weight_shows_an_example(word):
    """A word without a weight is refused with an example."""
    with pytest.raises(RecipeError, match=r"write SOURCE=WEIGHT|is not a number"):
        parse_source_words([word])


def test_a_recipe_is_a_value():
    assert hash(build_recipe({"a": 0.5, "b": 0.5})) == hash(build_recipe([("a", 0.5), ("b", 0.5)]))
    assert isinstance(build_recipe({"a": 0.5, "b": 0.5}), Recipe)


def test_switches_count_before_the_weights(tmp_path):
    """Switches given beside a recipe count before its weights are judged."""
    path = write(
        tmp_path / "recipe.yaml", "models: [{source: a, weight: 3}, {source: b, weight: 1}]\n"
    )
    assert build_recipe(path, normalize=True).weights == (0.75, 0.25)
    assert build_recipe(path, allow_weight_sum=True).weights == (3, 1)


def test_weights_are_normalised_once():
    """Weights are normalised once, however often a recipe is built."""
    weights = [0.1, 0.7, 0.3, 1e-9, 5.0]
    once = build_recipe([(str(i), w) for i, w in enumerate(weights)], normalize=True)
    assert build_recipe(build_recipe(once)) == once


@pytest.mark.parametrize("weight", [1e39, -1e39])
def test_weights_beyond_float32_are_refused(weight):
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", weight), ("b", 0.5)], allow_weight_sum=True)


def test_infinite_normalised_is_refused():
    """Weights that are infinite once normalised are refused."""
    with pytest.raises(RecipeError, match="not a finite number"):
        build_recipe([("a", 1e30), ("b", -1e30), ("c", 1e-10)], normalize=True)


def test_models_of_no_collection_are_refused():
    """Models that are no collection are refused."""
    with pytest.raises(RecipeError, match="int given"):
        build_recipe(3)


MERGEKIT = """
models:
  - model: org/a
    parameters: {weight: 0.25}
  - model: ./my b
    parameters: {weight: 0.75}
merge_method: linear
"""


@pytest.mark.parametrize(
    ("change", "command"),
    [
        ({}, "shardmix merge org/a=0.25 './my b=0.75' -o OUT"),
        ({"0.75": "1.75"}, "shardmix merge org/a=0.25 './my b=1.75' --normalize -o OUT"),
        ({"merge_method: linear": "dtype: bfloat16"}, "--dtype bfloat16 -o OUT"),
        ({"linear": "linear\nbase_model: org/c"}, "--config-from org/c -o OUT"),
        ({"linear": "linear\nbase_model: org/a"}, "'./my b=0.75' -o OUT"),
        (
            {"0.75": "2", "linear": "linear\nparameters: {normalize: false}"},
            "'./my b=2' --allow-weight-sum -o OUT",
        ),
    ],
)
def test_mergekits_linear_is_translated(tmp_path, change, command):
    """A linear recipe of mergekit is translated."""
    text = MERGEKIT
    for old, new in change.items():
        text = text.replace(old, new)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="is a recipe of mergekit; the same merge") as caught:
        build_recipe(tmp_path / "recipe.yaml")
    assert str(caught.value).endswith(command)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"linear": "ties"}, "for its method 'ties'"),
        ({"linear": "[3]"}, "for its method '[3]'"),
        ({"0.75": "[0, 1]"}, "no plain weighted sum"),
        ({"./my b": "./b+./lora"}, "no plain weighted sum"),
        ({"linear": "linear\nslices: []"}, "no plain weighted sum"),
        ({"parameters: {weight: 0.75}": "parameters: 3"}, "no plain weighted sum"),
    ],
)
def test_other_mergekit_is_recognised(tmp_path, change, finding):
    """Another recipe of mergekit is recognised."""
    text = MERGEKIT
    for old, new in change.items():
        text = text.replace(old, new)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="is a recipe of mergekit") as caught:
        build_recipe(tmp_path / "recipe.yaml")
    assert finding in str(caught.value)
