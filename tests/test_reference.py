"""The independent oracle: merges that LM_Cocktail made of small models of real architectures."""

import json

import pytest
import torch
from safetensors.torch import load_file

import shardmix
from shardmix.scoring import score
from tests.support.models import assert_same_bits, load_model, weighted_sum

CASES = ("decoder/merged", "encoder/merged", "encoder-decoder/merged", "reranker/merged")


@pytest.fixture(scope="module")
def expected(reference):
    return json.loads((reference / "expected.json").read_text())


def test_every_case_with_a_merge_is_tested(expected):
    assert {name for name, case in expected.items() if "expected" in case} == set(CASES)


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("name", CASES)
def test_float32_merge_is_the_references(reference, expected, tmp_path, name, io):
    """A float32 merge is the reference's, bit for bit."""
    case = expected[name]
    models = [
        (reference / model, weight)
        for model, weight in zip(case["models"], case["weights"], strict=True)
    ]
    shardmix.merge(models, tmp_path / "out", io=io)
    merged = load_model(tmp_path / "out")
    oracle = load_file(reference / case["expected"])
    assert_same_bits(merged, {key: oracle[key] for key in merged})
    # What the oracle has besides are names that a model has in memory alone, for tied tensors.
    for key in set(oracle) - set(merged):
        assert torch.equal(oracle[key], oracle["shared.weight"])


@pytest.mark.parametrize("dtype", ["keep", "float16", "float32"])
def test_bfloat16_merge_keeps_the_contract(reference, expected, tmp_path, dtype):
    """A bfloat16 merge is rounded by the contract."""
    case = expected["decoder-bf16-tied@5.0"]
    sources = [reference / model for model in case["models"]]
    shardmix.merge(zip(sources, case["weights"], strict=True), tmp_path / "out", dtype=dtype)
    models = [load_model(source) for source in sources]
    out_dtype = torch.bfloat16 if dtype == "keep" else getattr(torch, dtype)
    oracle = {
        name: weighted_sum([model[name] for model in models], case["weights"], out_dtype)
        for name in models[0]
    }
    assert_same_bits(load_model(tmp_path / "out"), oracle)


SCORED = [
    "decoder@5.0",
    "decoder@0.5",
    "decoder-short@0.5",
    "decoder-bf16-tied@5.0",
    "encoder@5.0",
    "encoder@0.5",
    "encoder-decoder@0.5",
]


@pytest.mark.parametrize("name", SCORED)
def test_losses_are_the_references(reference, name):
    """Losses and weights are the reference's."""
    case = json.loads((reference / "expected.json").read_text())[name]
    report = score(
        [reference / model for model in case["models"]],
        case["model_type"],
        reference / case["examples"],
        **case["arguments"],
    )
    assert report.losses == pytest.approx(case["losses"], rel=1e-3)
    assert report.weights == pytest.approx(case["weights"], abs=1e-4)


def test_every_scored_case_is_tested(reference):
    """Every scored case of the reference is tested."""
    cases = json.loads((reference / "expected.json").read_text())
    assert {name for name, case in cases.items() if "losses" in case} == set(SCORED)
