"""The table of what transformers declares is what the installed transformers declares."""

import json
from importlib.resources import files

import pytest

from shardmix.conventions.declarations import (
    Tie,
    class_name,
    config_part,
    declaration_of,
    scales_output,
)

transformers = pytest.importorskip("transformers")

from tests.generators import transformers_declarations as generator  # noqa: E402
from tests.support.sampling import SAMPLING, sample  # noqa: E402

# Their ties are declared in ways of their own.
PECULIAR = (
    *("BarkFineModel", "BartForConditionalGeneration", "BertForMaskedLM"),
    "CsmForConditionalGeneration",
    *("DFineForObjectDetection", "Gemma3ForConditionalGeneration", "Lfm2ForCausalLM"),
    *("MixtralForCausalLM", "Qwen2VLForConditionalGeneration", "T5ForConditionalGeneration"),
)


def table():
    path = files("shardmix.conventions").joinpath("transformers_declarations.json")
    return json.loads(path.read_text())["transformers"], generator.read_table(path)


def test_every_class_of_the_table_is_read():
    """With whatever its renamings do to values."""
    path = files("shardmix.conventions").joinpath("transformers_declarations.json")
    classes = json.loads(path.read_text())["classes"]
    assert len(classes) > 1_000
    for name, entry in classes.items():
        found = declaration_of({"architectures": [name], "model_type": entry["type"]})
        assert found.is_known != entry.get("asked", False)
        assert len(found.renames) >= len(entry.get("renames", ()))


def test_table_is_transformers_own():
    """Classes chosen by chance, and the peculiar ones, declare what the table says of them."""
    version, classes = table()
    if version != transformers.__version__:
        pytest.skip(f"the table is of transformers {version}, not {transformers.__version__}")
    tied = sorted(name for name, entry in classes.items() if "ties" in entry)
    public = set(dir(transformers))
    sampled = sample("declarations of tied classes", (name for name in tied if name in public), 10)
    if SAMPLING.is_whole:  # to import every module takes a while
        found = generator.model_classes()
        assert sorted(found) == sorted(classes)
    else:
        found = {name: getattr(transformers, name) for name in (*PECULIAR, *sampled)}
    for name in {*PECULIAR, *sampled}:
        assert json.loads(json.dumps(generator.declared(name, found[name]))) == classes[name], name


@pytest.mark.parametrize(
    ("top", "nested", "expected"),
    [(None, None, False), (True, None, True), (False, True, True), (False, None, False)],
)
def test_a_nested_key_may_bring_a_tie(top, nested, expected):
    """In Llava's kin a tie that only the text part states holds, whatever the top says."""
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {}}
    config |= {} if top is None else {"tie_word_embeddings": top}
    if nested is not None:
        config["text_config"]["tie_word_embeddings"] = nested
    [tie] = [tie for tie in declaration_of(config).ties if tie.at == ""]
    assert tie.is_in_force(config) is expected


def test_another_key_goes_first():
    config = {"architectures": ["Lfm2ForCausalLM"], "tie_word_embeddings": True}
    [tie] = declaration_of(config).ties
    assert tie.is_in_force(config)
    assert not tie.is_in_force({**config, "tie_embedding": False})


def test_t5_scales_by_the_key_of_the_tie():
    """T5's config reads the tie's key as whether its head's input is scaled; it always ties."""
    config = {"architectures": ["T5ForConditionalGeneration"]}
    declaration = declaration_of(config)
    assert scales_output(declaration.scale, config)
    untied = {**config, "tie_word_embeddings": False}
    assert not scales_output(declaration.scale, untied)
    assert all(tie.is_in_force(untied) for tie in declaration.ties)
    resaved = {**config, "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert not scales_output(declaration.scale, resaved)


def test_models_in_models_by_their_type():
    """A kind of language model that a composite's default config does not have."""
    config = {
        "architectures": ["Blip2ForConditionalGeneration"],
        "model_type": "blip-2",
        "text_config": {"model_type": "llama", "tie_word_embeddings": True},
    }
    ties = declaration_of(config).ties
    pair = ("lm_head.weight", "model.embed_tokens.weight")
    [llama] = [tie for tie in ties if pair in tie.pairs]
    assert (llama.of, llama.is_in_force(config)) == ("text_config", True)
    assert not llama.is_in_force({**config, "text_config": {"model_type": "llama"}})


def test_a_class_that_nobody_knows():
    config = {"architectures": ["FooForCausalLM"]}
    assert not declaration_of(config).is_known
    assert class_name({"architectures": "x"}) is None
    assert config_part({"a": {"b": {"c": 1}}}, "a.b") == {"c": 1}
    assert config_part({"a": 1}, "a.b") == {}
    assert not Tie("", "", (), "FFFTTTFFF").is_in_force({"tie_word_embeddings": "yes"})
