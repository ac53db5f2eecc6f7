"""Parameters resolved for every tensor: gradients, filters, levels."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.errors import RecipeError
from shardmix.recipe.build import build_recipe
from shardmix.recipe.parameters import resolve_parameters, source_weights, used_weights

numbers = st.floats(-10, 10)


def recipe_of(weights, parameters=None):
    """Return a linear recipe with these weights of models a, b, ..."""
    models = [(name, weight) for name, weight in zip("abcdefghij", weights, strict=False)]
    return build_recipe(models, parameters=parameters, allow_weight_sum=True)


def slerp(t):
    return build_recipe(["other"], method="slerp", base_model="base", parameters={"t": t})


def values(recipe, names, parameter="t"):
    """Return a shared parameter of each tensor."""
    resolved = resolve_parameters(recipe, names)
    return [resolved.groups[row].shared[parameter] for row in resolved.rows]


def test_one_group_if_nothing_depends():
    """Parameters that no tensor changes make one group, also for no tensors."""
    recipe = recipe_of([0.25, 0.75])
    resolved = resolve_parameters(recipe, ["x", "model.layers.3.y"])
    assert [params.numbers("weight") for params in resolved.groups] == [(0.25, 0.75)]
    assert resolved.rows.dtype == np.int32
    assert resolved.rows.tolist() == [0, 0]
    assert len(resolve_parameters(recipe, ()).groups) == 1


@given(
    points=st.lists(st.floats(0, 1), min_size=1, max_size=7),
    num_layers=st.integers(1, 12),
    prefix=st.sampled_from(
        [
            "model.layers.",
            "h.",
            "transformer.h.",
            "bert.encoder.layer.",
            "encoder.block.",
            "blocks.",
        ]
    ),
)
def test_gradients_follow_the_layers(points, num_layers, prefix):
    """Layers get points between those of the list; what is outside the layers gets the first."""
    names = [f"{prefix}{number}.weight" for number in range(num_layers)]
    outside = ["embed_tokens.weight", "norm.weight", "lm_head.weight"]
    # numpy's interpolation is the oracle.
    at = np.linspace(0, 1, num_layers) if num_layers > 1 else np.zeros(1)
    expected = np.interp(at, np.linspace(0, 1, len(points)) if len(points) > 1 else [0], points)
    found = values(slerp(points), [*outside, *names])
    assert found[:3] == [points[0]] * 3
    assert found[3:] == pytest.approx(expected.tolist(), abs=1e-12)


def test_each_stack_counts_by_itself():
    """Encoder and decoder have their own layers; inner layers are not counted."""
    names = [f"encoder.block.{n}.layer.{m}.weight" for n in range(3) for m in range(2)]
    names += [f"decoder.block.{n}.layer.2.weight" for n in range(5)]
    found = values(slerp([0, 1]), names)
    assert found == [0, 0, 0.5, 0.5, 1, 1, 0, 0.25, 0.5, 0.75, 1]


def test_first_filter_that_fits_counts():
    t = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "attn", "value": 0.25},
        {"filter": "*", "value": 0.75},
        {"value": 0.5},
    ]
    names = ["layers.0.self_attn.q", "layers.1.self_attn.q", "layers.1.attn.q", "norm"]
    assert values(slerp(t), names) == [0, 1, 0.25, 0.75]


def test_levels_follow_one_another():
    """A model's own setting comes first, then the recipe's, then the default."""
    own = [{"filter": "mlp", "value": 0.5}]
    recipe = build_recipe([("a", 1), ("b", own), "c"], parameters={"weight": [{"value": 0.25}]})
    resolved = resolve_parameters(recipe, ["mlp", "norm"])
    assert [resolved.groups[row].numbers("weight") for row in resolved.rows] == [
        (1, 0.5, 0.25),
        (1, 0.25, 0.25),
    ]
    assert used_weights(recipe) == ()
    assert source_weights(recipe) == (None, None, None)


def test_missing_for_one_tensor_is_named():
    recipe = build_recipe([("a", [{"filter": "mlp", "value": 1}]), ("b", 1)])
    with pytest.raises(RecipeError, match="a: `weight` is missing for norm"):
        resolve_parameters(recipe, ["mlp", "norm"])
    with pytest.raises(RecipeError, match="`t` is missing for norm"):
        resolve_parameters(slerp([{"filter": "mlp", "value": 1}]), ["mlp", "norm"])


def test_zeros_for_one_tensor_are_named():
    """Weights that are all 0 for some tensor are refused with its name."""
    recipe = recipe_of([[1, 0], [1, 0]])
    with pytest.raises(RecipeError, match=r"^layers.1: every weight is 0"):
        resolve_parameters(recipe, ["layers.0", "layers.1"])


def test_equal_parameters_share_a_group():
    """Tensors that come to the same parameters in several ways share a group."""
    t = [{"filter": "q", "value": 0.5}, {"filter": "k", "value": [0, 1]}, {"value": 1}]
    resolved = resolve_parameters(slerp(t), ["layers.0.q", "layers.1.k", "layers.2.v"])
    assert resolved.rows.tolist() == [0, 0, 1]
    assert len(resolved.groups) == 2


def test_too_many_groups_are_refused():
    """Names of strangers cannot ask for parameters without bound."""
    names = [f"{stack}.layers.{n}" for stack in range(30) for n in range(1000 + stack)]
    with pytest.raises(RecipeError, match="more than 20000 tensors have parameters of their own"):
        resolve_parameters(slerp([0, 1]), names)
    odd = ["layers.99999999999999999999.x", "layers.0.x"]  # no layer that a model could have
    assert values(slerp([0.25, 1]), odd) == [0.25, 0.25]


def test_many_tensors_are_cheap():
    """90,000 tensors of ten models by a gradient and filters: well below a second's work."""
    names = [f"model.layers.{n}.mlp.experts.{m}.up" for n in range(60) for m in range(1500)]
    weights = [[{"filter": "mlp", "value": [model, 1, 2]}, {"value": 1}] for model in range(10)]
    recipe = recipe_of(weights)
    start = time.process_time()
    resolved = resolve_parameters(recipe, names)
    assert time.process_time() - start < 3
    assert len(resolved.groups) == 60
