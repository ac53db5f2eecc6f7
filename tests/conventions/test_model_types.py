"""A type of model that the config contradicts is refused; what a config may mean is not."""

import json

import pytest
import transformers

import shardmix
from shardmix.conventions.model_types import contradiction
from shardmix.errors import RecipeError
from tests.support.models import random_model, save_model

SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "d_model": 8,
    "d_ff": 16,
    "d_kv": 4,
    "num_layers": 1,
    "num_heads": 2,
}
CLASSES = {
    "LlamaForCausalLM": {"decoder"},
    "LlamaModel": {"decoder", "encoder", "reranker", "encoder-decoder"},
    "LlamaForSequenceClassification": {"reranker"},
    "GPT2LMHeadModel": {"decoder"},
    "GPT2Model": {"decoder", "encoder", "reranker", "encoder-decoder"},
    "BertModel": {"encoder"},
    "BertForMaskedLM": {"encoder"},
    "BertForPreTraining": {"encoder"},
    "BertForSequenceClassification": {"reranker"},
    "BertForTokenClassification": set(),
    "XLMRobertaModel": {"encoder"},
    "XLMRobertaForSequenceClassification": {"reranker"},
    "DistilBertModel": {"encoder"},
    "T5ForConditionalGeneration": {"encoder-decoder"},
    "BartForConditionalGeneration": {"encoder-decoder"},
    "BartForSequenceClassification": {"reranker"},
}


@pytest.mark.parametrize("name", CLASSES)
def test_types_that_a_class_fits(tmp_path, name):
    """Types that a class of transformers fits.

    Configs as transformers writes them; a bare decoder may be anything but what it isn't.
    """
    made = getattr(transformers, name)
    config = made.config_class(**SIZES)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    types = ("decoder", "encoder", "reranker", "encoder-decoder")
    fitting = {each for each in types if contradiction(content, each) is None}
    assert fitting == CLASSES[name]


@pytest.mark.parametrize("model_type", ["decoder", "encoder", "reranker", "encoder-decoder"])
@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": "own"}, {"architectures": ["Own"]}, {"architectures": 1}, {"a": []}],
)
def test_empty_config_contradicts_nothing(config, model_type):
    """A config that tells nothing contradicts nothing."""
    assert contradiction(config, model_type) is None


def test_type_without_text_contradicts_none():
    """A type that is no text contradicts nothing."""
    assert contradiction({"model_type": []}, "decoder") is None


def test_language_model_with_modules_embeds():
    """A language model with modules embeds texts.

    As E5-Mistral, GTE-Qwen2 and Qwen3-Embedding do.
    """
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert contradiction(config, "encoder", has_modules=True) is None
    assert "Qwen3ForCausalLM" in contradiction(config, "encoder")


def two(tmp_path, architecture, **files):
    config = {"architectures": [architecture], "model_type": "llama"}
    models = {}
    for seed, name in enumerate("ab"):
        models[save_model(tmp_path / name, random_model(seed), config=config)] = 0.5
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    return models


def test_a_contradicted_type_is_refused(tmp_path):
    models = two(tmp_path, "LlamaForCausalLM")
    finding = (
        r"model type 'encoder': the config of a says architectures \['LlamaForCausalLM'\]; leave "
        "--model-type out, or name what it is: decoder"
    )
    with pytest.raises(RecipeError, match=finding):
        shardmix.merge(models, tmp_path / "out", model_type="encoder")
    assert not (tmp_path / "out").exists()
    shardmix.merge(models, tmp_path / "out", model_type="decoder")


def test_config_source_counts(tmp_path):
    """The config source's config is the one that counts."""
    models = two(tmp_path, "LlamaForCausalLM")
    base = save_model(tmp_path / "base", {}, config={"architectures": ["LlamaModel"]})
    plan = shardmix.plan_merge(models, config_from=base, model_type="encoder")
    assert plan.recipe.model_type == "encoder"
