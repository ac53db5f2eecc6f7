"""Scoring's bounds, each in a fresh process: its peak resident memory, and what it reads."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from shardmix.system.units import MIB
from tests.support.language_models import TEXTS, save_tokenizer, write_examples

pytestmark = pytest.mark.machine

HIDDEN, INNER, LAYERS, VOCABULARY = 1024, 2816, 14, 32000


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A decoder of 480 MB in bfloat16 and 8 shards; the budget is to be less than the model."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    save_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape):
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    # One layer's values serve all: what is tested is where they go, not what they are.
    layer = {
        **{f"self_attn.{name}_proj.weight": matrix(HIDDEN, HIDDEN) for name in "qkvo"},
        "mlp.gate_proj.weight": matrix(INNER, HIDDEN),
        "mlp.up_proj.weight": matrix(INNER, HIDDEN),
        "mlp.down_proj.weight": matrix(HIDDEN, INNER),
        "input_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
        "post_attention_layernorm.weight": torch.ones(HIDDEN).bfloat16(),
    }
    ends = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    weight_map = {}
    for number in range(0, LAYERS + 2, 2):
        tensors = ends if number == LAYERS else {}
        for index in range(number, min(number + 2, LAYERS)):
            tensors = tensors | {f"model.layers.{index}.{k}": v.clone() for k, v in layer.items()}
        filename = f"model-{number // 2 + 1:05d}-of-00008.safetensors"
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, filename))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def scored(folder, examples, *options):
    """Return the report of a `shardmix score` in a process of its own."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "shardmix", "score", str(folder), "--data", str(examples)),
            *("--model-type", "decoder", "--json", "--quiet", *map(str, options)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


def test_large_model_is_scored_on_a_budget(large_model, tmp_path):
    """A model larger than the budget is scored within it."""
    examples = write_examples(tmp_path / "examples.jsonl", TEXTS * 2)
    status, refusal = scored(large_model, examples, "--max-memory", "64MiB")
    assert status == 1
    least = int(refusal["error"]["message"].split("works here is ")[1].split("MiB")[0]) * MIB
    budget = least + 8 * MIB
    status, report = scored(large_model, examples, "--max-memory", budget)
    assert status == 0, report
    assert report["bytes_stored"] > 1.2 * (budget - 350 * MIB)
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"] <= budget
    assert report["num_passes"] == [1]
    assert report["bytes_read"] <= 1.1 * report["bytes_stored"]


@pytest.fixture(scope="module")
def report(large_model, tmp_path_factory):
    """What one model's score took, without a budget."""
    examples = write_examples(tmp_path_factory.mktemp("texts") / "examples.jsonl", TEXTS)
    status, report = scored(large_model, examples)
    assert status == 0, report
    return report


def test_one_layer_at_a_time_is_held(report):
    """Without a budget, one layer at a time is held."""
    assert report["peak_rss_bytes"] <= report["projected_peak_bytes"]
    # Python and its libraries take 400 MB of it.
    assert report["peak_rss_bytes"] < 450e6 + report["bytes_stored"] / 2


def test_several_models_take_as_much_as_one(report, large_model, tmp_path):
    """Several models take no more than one."""
    examples = write_examples(tmp_path / "examples.jsonl", TEXTS)
    _, three = scored(large_model, examples, large_model, large_model)
    assert three["losses"] == report["losses"] * 3
    assert three["peak_rss_bytes"] <= report["peak_rss_bytes"] * 1.1
