"""What a config's keys mean, also in the configs nested in it."""

import pytest

from shardmix.conventions.naming import config_parts, declared_quantisation, without_quantisation

QUANTISED = {"quantization_config": {"quant_method": "gptq"}}


@pytest.mark.parametrize(
    "config",
    [
        QUANTISED,
        {"text_config": QUANTISED},
        {"vision_config": {"hidden_size": 8}, "llm_config": QUANTISED},
        {"encoder": QUANTISED},
        {"decoder": QUANTISED},
        {"text_config": {"compression_config": {"quant_method": "gptq"}}},
        {"text_config": {"quantization": {"quant_method": "gptq"}}},
    ],
)
def test_quantisation_of_a_part_is_found(config):
    key, method = declared_quantisation(config)
    assert method == "gptq"
    part = config
    for word in key.split("."):
        part = part[word]
    assert part == {"quant_method": "gptq"}
    assert declared_quantisation(without_quantisation({**config, "a": 1})) is None
    assert without_quantisation({**config, "a": 1})["a"] == 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None, "text_config": {"quantization_config": {}}},
        {"generation_config": QUANTISED},
        {"task_specific_params": QUANTISED},
        {"encoder": "bert", "text_config": [QUANTISED]},
    ],
)
def test_what_is_no_part_is_not_searched(config):
    assert declared_quantisation(config) is None


def test_parts_of_a_config():
    parts = {"text_config": {"a": 1}, "vision_config": {"b": 2}, "encoder": {"c": 3}}
    others = {"quantization_config": {"d": 4}, "generation_config": {"e": 5}, "rope_scaling": {}}
    config = {"model_type": "x", **parts, **others}
    assert config_parts(config) == [config, *parts.values()]
