"""Recipes in YAML: what is read, what is refused and how, what is written."""

from pathlib import Path

import pytest

from shardmix.errors import RecipeError
from shardmix.recipe.build import build_recipe
from shardmix.recipe.parameters import used_weights
from shardmix.recipe.recipe import Choice, plain
from shardmix.recipe.yaml_file import load_recipe, recipe_from_dict, recipe_to_dict

TWO = """models:
- model: a
  parameters: {weight: 3}
- model: b
  parameters: {weight: 1}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(tmp_path, text, **options):
    return build_recipe(write(tmp_path / "recipe.yaml", text), **options)


def test_yaml_gives_every_option(tmp_path):
    text = """
merge_method: task_arithmetic
models:
  - model: org/a@main
    parameters:
      weight: 6e-0  # text to YAML 1.1, a number to Python
  - model: {path: org/b, revision: v1}
    parameters: {weight: [1, 0]}
  - model: {model: {path: ./c}}
base_model: {model: d}
parameters:
  weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]
  lambda: 0.7
dtype: float16
out_dtype: bfloat16
config_from: c
max_shard_size: 5GB
model_type: decoder
allow_differences: [tokenizer, text_config.rope_theta]
"""
    recipe = load(tmp_path, text)
    assert recipe.merge_method == "task_arithmetic"
    assert recipe.sources == ("d", "org/a@main", "org/b@v1", "./c")
    assert recipe.models[0].parameters == plain({"weight": 6.0})
    assert recipe.models[1].parameters[0].choices == (Choice((1.0, 0.0)),)
    assert recipe.parameters[0].choices == (Choice((0.0, 1.0), "mlp"), Choice((0.5,)))
    assert (recipe.dtype, recipe.output_dtype) == ("float16", "bfloat16")
    assert (recipe.config_from, recipe.max_shard_size) == ("c", 5 * 10**9)
    assert recipe.allow_differences == ("text_config.rope_theta", "tokenizer")
    assert recipe.model_type == "decoder"
    # What is written reads the same.
    again = recipe_from_dict(recipe_to_dict(recipe))
    assert build_recipe(again) == recipe
    assert recipe_to_dict(again) == recipe_to_dict(recipe)


def test_mergekits_defaults_hold(tmp_path):
    """Weights are normalised unless a recipe says otherwise, and their sum is not checked."""
    assert used_weights(load(tmp_path, TWO)) == (0.75, 0.25)
    unnormalised = load(tmp_path, f"{TWO}parameters: {{normalize: false}}\n")
    assert used_weights(unnormalised) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("model: []", "unknown key 'model'.*did you mean 'models'"),
        ("models: []\ndytpe: float16", "unknown key 'dytpe'.*did you mean 'dtype'"),
        ("models: [{modle: a}]", r"models\[1\]: unknown key 'modle'.*did you mean 'model'"),
        ("models: [{source: a, weight: 1}]", "unknown key 'source'.*known keys: model, parameters"),
        ("models: [{model: a, weight: 1}]", "`weight` is a parameter; put it under `parameters`"),
        (f"{TWO}normalize: true", "`normalize` is a parameter; put it under `parameters`"),
        (f"{TWO}parameters: {{wieght: 1}}", "no parameter 'wieght'.*did you mean 'weight'"),
        (f"{TWO}parameters: {{lambda: 1}}", "linear has no parameter 'lambda'; its parameters are"),
        (f"{TWO}merge_method: liner", "'liner': is no merge method.*did you mean 'linear'"),
        (f"{TWO}merge_method: slerp\nbase_model: a", r"models\[1\] \(a\): slerp has no .*'weight'"),
        (
            "models: [{model: a, parameters: {weight: 1, normalize: true}}]",
            r"recipe.yaml: models\[1\] \(a\): `normalize` is a parameter of the merge as a whole",
        ),
        ("models: [{model: a}, {model: b}]", "recipe.yaml: a: `weight` is missing"),
        ("models: 3", "`models` must be a list"),
        ("{}", "`models` must be a list"),
        ("- a\n- b", "must be a mapping"),
        ("models: [a, b]", r"models\[1\]: must be a mapping"),
        ("models: [{parameters: {}}]", r"models\[1\]: `model` is missing"),
        ("models: [{model: a, parameters: 3}]", r"models\[1\]: `parameters` is 3; it must be a"),
        ("models: [{model: {path: 3}}]", r"models\[1\]: `model.path` is 3, not text"),
        ("models: [{model: {name: a}}]", r"models\[1\]: model: unknown key 'name'"),
        ("models: [", "not valid YAML"),
        ("models: []\nmodels: []", "given twice"),
        (TWO.replace("3", "x"), "weight 'x' is not a number"),
        (TWO.replace("3", "true"), "weight True is not a number"),
        (TWO.replace("3", ".nan"), "weight nan is not a finite number"),
        (TWO.replace("3", "[]"), "`weight` is an empty list"),
        (TWO.replace("3", "[{filter: a}]"), "weight: `value` is missing"),
        (TWO.replace("3", "[1, {filter: a, value: 1}]"), "weight: must be a mapping with filter"),
        (TWO.replace("3", "[{fliter: a, value: 1}]"), "'fliter'.*did you mean 'filter'"),
        (TWO.replace("3", "[{filter: 3, value: 1}]"), "`filter` is 3, not text"),
        (TWO.replace("3", "[{value: []}]"), "`value` is an empty list"),
        (f"{TWO}parameters: {{normalize: maybe}}", "must be true or false"),
        (f"{TWO}parameters: {{normalize: [true, false]}}", "only numbers can follow the layers"),
        (f"{TWO}max_shard_size: lots", "size 'lots'"),
        (f"{TWO}max_shard_size: true", "size True"),
        (f"{TWO}max_shard_size: 5.0e+9", "size 5000000000.0"),
        ("models: [{model: a, parameters: {weight: 1}}]", "1 model given: a merge needs at least"),
        ("models: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("models: {{ x }}", "recipe.yaml"),
        ("? [a]\n: b", "recipe.yaml"),
        (TWO.replace("3", "2020-13-45"), "not valid YAML"),
        ("models: !!int abc", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        (TWO.replace("model: a", "model: ''"), "source is empty"),
        (f"{TWO}config_from: ''", "source is empty"),
        (f"{TWO}dtype: bfloat", "did you mean 'bfloat16'"),
        (f"{TWO}out_dtype: bfloat", "did you mean 'bfloat16'"),
        (f"{TWO}base_model: c", "linear takes no base model, and c is none of the models"),
        (
            f"{TWO}merge_method: task_arithmetic\nbase_model: b",
            r"models\[2\] \(b\): is the base model, whose parameters would have no effect",
        ),
        (f"{TWO}merge_method: task_arithmetic", "task_arithmetic needs a base model"),
        (f"{TWO}---\n{TWO}", "single document.*give one a file"),
        (f"name: x\n{TWO}", "`name`: recipes that build on one another"),
        (f"{TWO}slices: []", "recipe.yaml: `slices`: merging by layers is not supported yet"),
        (f"{TWO}modules: {{}}", "`modules`: .*not supported yet"),
        (f"{TWO}tokenizer_source: base\ntokenizer: {{}}", "are both given"),
        (f"{TWO}tokenizer_source: unoin", "names unoin, which is none .*did you mean 'union'"),
        (f"{TWO}tokenizer_source: 7", "`tokenizer_source` is 7, not text"),
        (f"{TWO}tokenizer: {{pad_to: 8}}", "unknown key 'pad_to'"),
        (f"{TWO}tokenizer: {{base: c}}", "tokenizer.base: names c, which is none"),
        (f"{TWO}tokenizer: {{pad_to_multiple_of: 0}}", "is 0; it must be .* from 1 to 65536"),
        (f"{TWO}tokenizer: {{pad_to_multiple_of: -8}}", "is -8; it must be"),
        (f"{TWO}tokenizer: {{pad_to_multiple_of: true}}", "is True; it must be"),
        (f"{TWO}tokenizer: {{pad_to_multiple_of: 1e9}}", "it must be"),
        (f"{TWO}tokenizer: {{source: refuse, pad_to_multiple_of: 8}}", "maps no tokens"),
        (f"{TWO}tokenizer: {{tokens: [x]}}", "`tokens` is .*must be a mapping"),
        (f"{TWO}tokenizer: {{tokens: {{1: {{source: a}}}}}}", "`tokens` has 1, which is no token"),
        (f"{TWO}tokenizer: {{tokens: {{x: {{force: true}}}}}}", "'x'.*: `source` is missing"),
        (f"{TWO}tokenizer: {{tokens: {{x: {{source: c}}}}}}", "names c, which is none"),
        (
            f"{TWO}tokenizer: {{tokens: {{x: {{source: a, force: 1}}}}}}",
            "`force` is 1; it must be true",
        ),
        (f"{TWO}tokenizer: {{tokens: {{x: {{source: {{kind: one}}}}}}}}", "must be zero or model"),
        (
            f"{TWO}tokenizer: {{tokens: {{x: {{source: {{kind: zero, model: a}}}}}}}}",
            "the only key of its source",
        ),
        (
            f"{TWO}tokenizer: {{tokens: {{x: {{source: {{kind: model_token}}}}}}}}",
            "`model` is miss",
        ),
        (
            f"{TWO}tokenizer: {{tokens: {{x: {{source: {{kind: model_token, model: a}}}}}}}}",
            "either",
        ),
        (
            f"{TWO}tokenizer: {{tokens: {{x: {{source: {{kind: model_token, model: a, "
            "token_id: -1}}}}",
            "`token_id` is -1; it must be a whole number",
        ),
        (f"{TWO}chat_template: auto", "`chat_template`: .*`config_from`"),
        (f"{TWO}seed: 1", "`seed`: no method draws random numbers yet"),
        (f"{TWO}allow_weight_sum: true", "`allow_weight_sum`: .*not checked in a recipe"),
        ("models: [{model: {model: a, lora: [b]}}]", "`model.lora` is \\['b'\\], not text"),
        ("lora: b\nmodels: []", "unknown key 'lora'"),
    ],
)
def test_wrong_recipe_is_refused(tmp_path, text, finding):
    """A wrong recipe is refused by file, key and rule."""
    with pytest.raises(RecipeError, match=finding) as caught:
        load(tmp_path, text)
    assert str(tmp_path) in str(caught.value) or "recipe" not in finding


@pytest.mark.parametrize(
    ("method", "parameters", "finding"),
    [
        ("slerp", "{}", "`t` is missing: .*-p t=VALUE"),
        ("slerp", "{t: 1.5}", "parameters: t 1.5 must be at least 0 and at most 1"),
        ("slerp", "{t: [0, -0.5]}", "parameters: t -0.5 must be at least 0 and at most 1"),
        ("slerp", "{t: 0, normalize: true}", "slerp has no parameter 'normalize'"),
        ("task_arithmetic", "{lamda: 1}", "did you mean 'lambda'"),
    ],
)
def test_parameters_follow_the_method(tmp_path, method, parameters, finding):
    text = f"merge_method: {method}\nbase_model: a\nmodels: [{{model: b}}]\n"
    with pytest.raises(RecipeError, match=finding):
        load(tmp_path, f"{text}parameters: {parameters}\n")


def test_absent_recipe_file_is_refused(tmp_path):
    """A recipe file that is absent is refused."""
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_folder_may_have_a_plus(tmp_path, monkeypatch):
    """A folder whose name has a plus is no adapter; paths count from the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert load(tmp_path, TWO.replace("model: a", "model: a+b")).sources == ("a+b", "b")


def test_options_override_the_recipe(tmp_path):
    """Options given beside a recipe override it."""
    text = f"{TWO}dtype: float16\nout_dtype: float16\nconfig_from: c\n"
    recipe = load(tmp_path, text, dtype="float32", config_from=None, normalize=False)
    assert (recipe.output_dtype, recipe.config_from) == ("float32", "c")
    assert used_weights(recipe) == (3.0, 1.0)
    changed = load(
        tmp_path, TWO, method="task_arithmetic", base_model="c", parameters={"lambda": 2}
    )
    assert changed.sources == ("c", "a", "b")
    assert changed.parameters == plain({"lambda": 2.0})
    with pytest.raises(RecipeError, match="parameter 'weight': would change nothing"):
        load(tmp_path, TWO, parameters={"weight": 1})
    with pytest.raises(RecipeError, match="task_arithmetic needs a base model"):
        load(tmp_path, TWO, method="task_arithmetic")


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("a+b", "a+b"),
        ("{model: a, lora: b}", "a+b"),
        ("{model: {path: o/a, revision: v1}, lora: {path: o/b, revision: v2}}", "o/a@v1+o/b@v2"),
    ],
)
def test_adapters_follow_a_plus(tmp_path, model, source):
    """As in mergekit; one model with an adapter is enough."""
    text = f"models: [{{model: {model}, parameters: {{weight: 1}}}}]\nmerge_method: linear\n"
    assert load(tmp_path, text).sources == (source,)


REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "methods" / "recipes"


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs ../shared/reference beside the checkout")
def test_reference_recipes_are_known():
    """Every recipe of the reference is read, or refused by the name of what is missing."""
    refused = {}
    recipes = sorted(REFERENCE.glob("*.yaml"))
    for path in recipes:
        try:
            assert len(build_recipe(path).sources) >= 2
        except RecipeError as error:
            refused[path.stem] = error
    read = {path.stem for path in recipes} - set(refused)
    assert read >= {
        *("linear", "linear-plain", "linear-filters", "linear-gradient"),
        *("task_arithmetic", "task_arithmetic-lambda", "slerp"),
    }
    for name, error in refused.items():
        words = ("`slices`", "is no merge method")
        assert any(word in str(error) for word in words), name
