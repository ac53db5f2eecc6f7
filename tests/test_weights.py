"""Weights of 0, weights that are 0 in float32, and negative ones."""

import json
import math

import pytest
import torch

import shardmix
from shardmix.methods.base import vanishes_in_float32
from tests.support.cut_off import cut_off, large_models
from tests.support.models import (
    assert_same_bits,
    load_model,
    random_model,
    save_model,
    weighted_sum,
)

BACKENDS = ["torch", "llvm"]


def broken(tensors):
    """Return a model of NaN and infinities alone."""
    values = {name: torch.full_like(tensor, math.nan) for name, tensor in tensors.items()}
    values["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], -math.inf)
    return values


def summed(pairs, dtype=torch.float32):
    models, weights = zip(*pairs, strict=True)
    return {
        name: weighted_sum([model[name] for model in models], weights, dtype) for name in models[0]
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [0.0, -0.0, 1e-50, -1e-46])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_weight_of_zero_leaves_a_model_out(tmp_path, backend, zero, place):
    """Also the first model, and weights that are 0 in float32: 0 times NaN is NaN."""
    if backend == "llvm":
        pytest.importorskip("llvmlite", reason="needs llvmlite")
    a, b = random_model(1), random_model(2)
    tensors, weights = [a, b], [0.75, 0.25]
    tensors.insert(place, broken(a))
    weights.insert(place, zero)
    models = [
        (save_model(tmp_path / f"m{number}", own), weight)
        for number, (own, weight) in enumerate(zip(tensors, weights, strict=True))
    ]
    report = shardmix.merge(models, tmp_path / "out", backend=backend)
    assert_same_bits(load_model(tmp_path / "out"), summed([(a, 0.75), (b, 0.25)]))
    assert report.nonfinite == ()
    assert report.bytes_read == 2 * sum(tensor.nbytes for tensor in a.values())
    told = "0: left out, none" if zero == 0 else f"{zero!r}, which is 0 in float32: left out"
    assert any(f"m{place}: has the weight {told}" in text for text in report.warnings)
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_one_model_may_be_all_that_is_left(tmp_path):
    """Its values are kept bit by bit, but for what a product with 1 changes: nothing."""
    a = random_model(1, torch.bfloat16)
    a["lm_head.weight"][0, 0] = -0.0
    models = [
        (save_model(tmp_path / "z", broken(random_model(2))), 0),
        (save_model(tmp_path / "a", a), 1),
    ]
    for backend in BACKENDS:
        out = tmp_path / backend
        shardmix.merge(models, out, backend=backend, dtype="bfloat16")
        assert_same_bits(load_model(out), a)


def test_first_model_of_weight_0_gives_names(tmp_path):
    """The first model gives names all the same.

    Layout, config, dtypes and integers are the first model's also if its weight is 0.
    """
    first = {"w": torch.full((9,), math.nan).half(), "ids": torch.arange(3), "n": torch.ones(2)}
    others = [
        {"w": torch.ones(9), "ids": torch.arange(3) + number, "n": torch.ones(2)}
        for number in (1, 0)
    ]
    config = {"architectures": ["TestModel"], "model_type": "test", "torch_dtype": "float16"}
    models = [
        (save_model(tmp_path / "m0", first, shards=[["w"], ["ids", "n"]], config=config), 0.0),
        (save_model(tmp_path / "m1", others[0], config=config), 0.5),
        (save_model(tmp_path / "m2", others[1], config=config), 0.5),
    ]
    report = shardmix.merge(models, tmp_path / "out")
    merged = load_model(tmp_path / "out")
    assert_same_bits(merged, {"w": torch.ones(9).half(), "ids": first["ids"], "n": torch.ones(2)})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    (differing,) = (text for text in report.warnings if text.startswith("ids: differs in"))
    assert "m1" in differing
    assert "m2" not in differing


def test_integers_left_out_are_not_compared(tmp_path):
    models = [
        (save_model(tmp_path / f"m{n}", {"w": torch.ones(2), "ids": torch.arange(3) + n}), weight)
        for n, weight in enumerate((0.5, 0.0, 0.5))
    ]
    report = shardmix.merge(models, tmp_path / "out")
    (differing,) = (text for text in report.warnings if text.startswith("ids: differs in"))
    assert "m2" in differing
    assert "m1" not in differing
    assert report.bytes_read == 2 * (8 + 24)


@pytest.mark.parametrize(
    ("change", "finding"),
    [({"w": torch.ones(3)}, "shapes must match"), ({"v": torch.ones(2)}, "tensor sets differ")],
)
def test_a_model_left_out_must_still_match(tmp_path, change, finding):
    models = [
        (save_model(tmp_path / "a", {"w": torch.ones(2)}), 1.0),
        (save_model(tmp_path / "b", change), 0.0),
    ]
    with pytest.raises(shardmix.MismatchError, match=finding):
        shardmix.plan_merge(models)


def test_in_float64_a_small_weight_counts(tmp_path):
    """1e-50 is 0 in float32 but not in float64, in which a tensor with such a source is summed."""
    wide, narrow = torch.tensor([2.0**170], dtype=torch.float64), torch.ones(1)
    models = [
        (save_model(tmp_path / "a", {"n": narrow, "w": torch.zeros(1)}), 1.0),
        (save_model(tmp_path / "b", {"n": narrow * math.nan, "w": wide}), 1e-50),
    ]
    shardmix.merge(models, tmp_path / "out")
    expected = {"n": narrow, "w": torch.tensor([1e-50 * 2.0**170]).float()}
    assert_same_bits(load_model(tmp_path / "out"), expected)


def test_omitted_float64_widens_nothing(tmp_path):
    """A float64 model left out widens nothing."""
    models = [
        (save_model(tmp_path / "a", random_model(1)), 1.0),
        (save_model(tmp_path / "b", random_model(2, torch.float64)), 0.0),
    ]
    (segment,) = (
        segment for shard in shardmix.plan_merge(models).shards for segment in shard.segments
    )
    assert ([source[:2] for source in segment.sources], segment.factors) == ([(0, "F32")], (1.0,))


@pytest.mark.parametrize("weights", [(0, 0), (-0.0, 0.0), (1e-50, -1e-60)])
def test_all_weights_zero_is_refused(tmp_path, weights):
    models = [
        (save_model(tmp_path / name, random_model(1)), weight)
        for name, weight in zip("ab", weights, strict=True)
    ]
    with pytest.raises(shardmix.RecipeError, match="every weight is 0"):
        shardmix.plan_merge(models, allow_weight_sum=True)


@pytest.mark.parametrize(
    ("weight", "vanishes"),
    [(0.0, True), (-0.0, True), (7e-46, True), (7.1e-46, False), (-1e-40, False), (1.0, False)],
)
def test_what_vanishes_in_float32(weight, vanishes):
    assert vanishes_in_float32(weight) == vanishes


def test_going_on_with_a_model_left_out(tmp_path):
    (a, _), (b, _), (c, _) = large_models(tmp_path, num_models=3)
    models = [(a, 0.6), (b, 0.0), (c, 0.4)]
    cut_off(models, tmp_path / "out")
    report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    assert report.bytes_kept + report.bytes_read == 2 * (28_000_000 + 80)
    shardmix.merge([(a, 0.6), (c, 0.4)], tmp_path / "two")
    assert_same_bits(load_model(tmp_path / "out"), load_model(tmp_path / "two"))


BATCH_NORM = {
    "bn1.weight": torch.ones(2),
    "bn1.running_mean": torch.zeros(2),
    "bn1.running_var": torch.ones(2),
    "bn1.num_batches_tracked": torch.tensor(7),
    "bn2.running_var": torch.ones(2),
    "quantizer.codebook.cluster_size": torch.ones(4),
    "stem.moving_variance": torch.ones(2),
    "normalize.buffer_state.std": torch.ones(2),
    "head.log_std": torch.zeros(2),
    "log_var": torch.zeros(2),
    "variance.weight": torch.zeros(2),
}


def variance_warnings(tmp_path, weights, tensors=BATCH_NORM):
    models = [
        (save_model(tmp_path / f"m{number}", tensors), weight)
        for number, weight in enumerate(weights)
    ]
    plan = shardmix.plan_merge(models, allow_weight_sum=True)
    return [text for text in plan.warnings if "never negative" in text]


def test_variances_warn_of_negative_weights(tmp_path):
    """Variances with a negative weight warn.

    Counted and the first one named, with the weight; logarithms and means may be negative.
    """
    (warning,) = variance_warnings(tmp_path, (1.0, 0.5, -0.5))
    assert warning.startswith("bn1.running_var and 4 more: ")
    assert "the weight -0.5 of" in warning
    assert "m2" in warning


@pytest.mark.parametrize(
    "weights", [(0.5, 0.5), (1.0, 0.0), (2.0, 3.0), (1.0, -0.0), (1.0, -1e-50)]
)
def test_other_weights_do_not_warn(tmp_path, weights):
    """Other weights do not warn of variances."""
    assert variance_warnings(tmp_path, weights) == []


def test_no_variances_no_warning(tmp_path):
    tensors = {
        name: value for name, value in BATCH_NORM.items() if name in ("log_var", "bn1.weight")
    }
    assert variance_warnings(tmp_path, (1.5, -0.5), tensors) == []


def test_counts_of_batches_are_kept(tmp_path):
    others = {**BATCH_NORM, "bn1.num_batches_tracked": torch.tensor(9)}
    models = [
        (save_model(tmp_path / "a", BATCH_NORM), 1.5),
        (save_model(tmp_path / "b", others), -0.5),
    ]
    shardmix.merge(models, tmp_path / "out")
    assert load_model(tmp_path / "out")["bn1.num_batches_tracked"].item() == 7


def test_of_many_integers_some_are_named(tmp_path):
    """A line each for the first ten; thousands would bury every other warning."""
    tensors = {f"ids.{number:02d}": torch.arange(3) for number in range(13)}
    models = [
        (save_model(tmp_path / "a", {**tensors, "w": torch.ones(2)}), 0.5),
        (
            save_model(
                tmp_path / "b", {"w": torch.ones(2)} | {k: v + 1 for k, v in tensors.items()}
            ),
            0.5,
        ),
    ]
    warnings = shardmix.merge(models, tmp_path / "out").warnings
    named = [text for text in warnings if ": differs in" in text]
    assert [text[:6] for text in named] == [f"ids.{number:02d}" for number in range(10)]
    assert any(text.startswith("3 more tensors of integers differ") for text in warnings)
