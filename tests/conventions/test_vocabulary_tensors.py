"""The table of parameters with a row for each token is what the installed transformers builds."""

import json
from importlib.resources import files

import pytest

from shardmix.conventions.vocabulary_tensors import stated_size, vocabulary_tensors

transformers = pytest.importorskip("transformers")

from tests.generators import vocabulary_tensors as generator  # noqa: E402
from tests.support.sampling import sample  # noqa: E402

PECULIAR = ("BertForMaskedLM", "BartForConditionalGeneration", "Qwen2VLForConditionalGeneration")


def table():
    return json.loads(files("shardmix.conventions").joinpath("vocabulary_tensors.json").read_text())


def test_table_is_transformers_own():
    """Classes chosen by chance, and peculiar ones, grow with their vocabularies as it says."""
    content = table()
    if content["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {content['transformers']}")
    classes = content["classes"]
    public = [name for name in sorted(classes) if hasattr(transformers, name)]
    for name in {*PECULIAR, *sample("classes with vocabularies", public, 5)}:
        found = generator.declared(name, getattr(transformers, name))
        assert found == content["kinds"][classes[name]], name


@pytest.mark.parametrize(
    ("name", "expected", "unrelated"),
    [
        ("LlamaForCausalLM", {"model.embed_tokens.weight", "lm_head.weight"}, set()),
        (
            "BertForMaskedLM",
            {
                "bert.embeddings.word_embeddings.weight",
                "cls.predictions.bias",
                "cls.predictions.decoder.weight",
                "cls.predictions.decoder.bias",
            },
            {"bert.embeddings.token_type_embeddings.weight"},
        ),
        (
            "InstructBlipForConditionalGeneration",
            {"language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"},
            {"qformer.embeddings.word_embeddings.weight"},
        ),
    ],
)
def test_a_class_has_rows_for_its_tokens(name, expected, unrelated):
    """Not for kinds of segments, nor for the tokens of another tokenizer."""
    found = vocabulary_tensors({"architectures": [name]}, [])
    assert found.is_known
    assert (found.names, found.unrelated, found.others) == (expected, unrelated, set())


def test_what_no_map_follows_is_told():
    """Codebooks in one embedding grow by more than a row for each token."""
    found = vocabulary_tensors({"architectures": ["CsmForConditionalGeneration"]}, [])
    assert "backbone_model.embed_tokens.embed_audio_tokens.weight" not in found.names
    speech = vocabulary_tensors({"architectures": ["FSMTForConditionalGeneration"]}, [])
    assert {"model.encoder.embed_tokens.weight"} <= speech.others


def test_unknown_classes_go_by_names():
    """Of embeddings, heads and their biases."""
    names = ["x.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "x.norm.weight"]
    config = {"architectures": ["OwnModel"], "text_config": {"vocab_size": 7}}
    found = vocabulary_tensors(config, names)
    assert found.names == set(names[:3])
    assert found.keys == ("text_config.vocab_size",)
    assert not found.is_known


def test_a_size_may_be_the_classes_default():
    assert stated_size({"model_type": "llama"}, "vocab_size") == 32000
    assert stated_size({"text_config": {"vocab_size": 9}}, "text_config.vocab_size") == 9
    assert stated_size({"vocab_size": "many"}, "vocab_size") is None
