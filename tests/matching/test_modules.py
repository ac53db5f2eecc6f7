"""Sentence-transformers models whose modules differ: refused, told of, or no matter at all."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

import shardmix
from shardmix.errors import MismatchError
from tests.support.models import random_model, save_model

KINDS = "sentence_transformers.models"
CHAIN = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_N", "Normalize"))
MEAN = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}
DENSE = {"in_features": 8, "out_features": 4, "bias": True, "activation_function": "a.b.Tanh"}


def modules(*chain: tuple[str, str]) -> list[dict]:
    return [
        {"idx": number, "name": str(number), "path": place, "type": f"{KINDS}.{kind}"}
        for number, (place, kind) in enumerate(chain)
    ]


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def models(tmp_path):
    """Return two models of one chain, alike but for their weights."""
    folders = []
    for seed, name in enumerate("ab"):
        folder = save_model(tmp_path / name, random_model(seed))
        write(folder / "modules.json", modules(*CHAIN))
        write(folder / "1_Pooling/config.json", MEAN)
        write(folder / "2_Dense/config.json", DENSE)
        write(folder / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
        write(folder / "config_sentence_transformers.json", {"prompts": {}})
        tensors = {"linear.weight": random_model(seed)["lm_head.weight"][:4].contiguous()}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
        folders.append(folder)
    return folders


def plan(folders, **options):
    return shardmix.plan_merge([(folder, 0.5) for folder in folders], **options)


def told(folders, words: str) -> None:
    """Assert that a difference is a warning, and names what the output takes."""
    [warning] = plan(folders).warnings
    assert words in warning
    assert f"the output takes {folders[0]}'s" in warning


def refused(folders, words: str, key: str) -> None:
    """Assert that a difference is an error, names both models, and its remedy works."""
    with pytest.raises(MismatchError) as caught:
        plan(folders)
    message = str(caught.value)
    assert words in message
    assert all(str(folder) in message for folder in folders)
    assert f"--allow-differences {key} " in message
    assert any(words in warning for warning in plan(folders, allow_differences=key).warnings)


def test_models_that_agree_give_no_warning(models):
    assert plan(models).warnings == ()


def test_one_pooling_is_written_in_many_ways(models):
    """One pooling may be written in many ways.

    Old configs have four switches, newer ones more, the newest a name.
    """
    ways = (
        {"pooling_mode": "mean"},
        {"pooling_mode": ["mean"], "include_prompt": True},
        {**MEAN, "pooling_mode_cls_token": False, "pooling_mode_lasttoken": False},
        {"pooling_mode_weightedmean_tokens": False},
        {},
    )
    for way in ways:
        write(models[1] / "1_Pooling/config.json", way)
        assert plan(models).warnings == ()


@pytest.mark.parametrize(
    ("way", "shown"),
    [
        ({"pooling_mode": "cls"}, '"mean"'),
        ({**MEAN, "pooling_mode_max_tokens": True}, '"max, mean"'),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, '"lasttoken"'),
        ({**MEAN, "include_prompt": False}, "include_prompt is true"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_another_pooling_is_refused(models, way, shown, order):
    write(models[1] / "1_Pooling/config.json", way)
    refused(models[::order], shown if order == 1 else "1_Pooling", "1_Pooling/config.json")


def test_pooling_named_by_users_may_differ(models):
    """Pooling that the user names may differ."""
    write(models[1] / "1_Pooling/config.json", {"pooling_mode": "cls"})
    assert plan(models, pooling="mean").warnings == ()


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "torch.nn.modules.linear.Identity"},
        {"use_residual": True},
        {"module_input_name": "token_embeddings"},
        {"bias": False},
    ],
)
def test_another_projection_is_refused(models, change):
    write(models[1] / "2_Dense/config.json", DENSE | change)
    refused(models, f"2_Dense/config.json: {next(iter(change))} is", "2_Dense/config.json")


def test_absent_projection_keys_are_defaults(models):
    """What a projection leaves out is its default."""
    absent = {"in_features": 8, "out_features": 4}
    spelled = {"activation_function": "torch.nn.Tanh", "module_input_name": "sentence_embedding"}
    write(models[1] / "2_Dense/config.json", absent | spelled)
    assert plan(models).warnings == ()


@pytest.mark.parametrize(
    "chain",
    [
        (CHAIN[0], ("1_CNN", "CNN"), *CHAIN[1:]),
        (CHAIN[0], CHAIN[2], CHAIN[1], CHAIN[3]),
        (*CHAIN[:2], ("3_N", "Normalize"), CHAIN[2]),
    ],
)
def test_another_chain_of_modules_is_refused(models, chain):
    write(models[1] / "modules.json", modules(*chain))
    refused(models, "Transformer, Pooling, Dense, Normalize in", "modules.json")


@pytest.mark.parametrize("order", [1, -1])
def test_final_normalisation_is_told(models, order):
    """A normalisation at the end is told of.

    It changes lengths, and no angles: an average makes sense.
    """
    write(models[1] / "modules.json", modules(*CHAIN[:3]))
    told(models[::order], "modules.json: Transformer, Pooling, Dense")


def test_classes_of_other_versions_are_equal(models):
    """Classes of other versions are the same."""
    listed = modules(*CHAIN)
    listed[0]["type"] = "sentence_transformers.base.modules.transformer.Transformer"
    listed[2]["type"] = "pylate.models.Dense.Dense"
    write(models[1] / "modules.json", listed)
    assert plan(models).warnings == ()


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("sentence_bert_config.json", {"max_seq_length": 16}, "max_seq_length is 32"),
        ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is false"),
        ("config_sentence_transformers.json", {"prompts": {"query": "q: "}}, "is {} in"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "dot"}, 'is "cosine" in'),
    ],
)
def test_what_can_be_meant_is_told_of(models, file, content, words):
    write(models[1] / file, content)
    told(models, words)


def test_what_means_the_same_is_not_told_of(models):
    versions = {
        "__version__": {"sentence_transformers": "6.2.0"},
        "model_type": "SentenceTransformer",
    }
    empty = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    write(models[1] / "config_sentence_transformers.json", versions | empty)
    write(models[1] / "sentence_bert_config.json", {"max_seq_length": 32})
    write(models[1] / "3_N/config.json", {"module_input_name": "sentence_embedding"})
    assert plan(models).warnings == ()


def test_the_base_is_held_against_the_models(models, tmp_path):
    base = Path(shutil.copytree(models[0], tmp_path / "base"))
    write(base / "1_Pooling/config.json", {"pooling_mode": "cls"})
    with pytest.raises(
        MismatchError, match=r'1_Pooling/config.json: pooling_mode is "cls" in .*base'
    ):
        plan(models, config_from=base)


def test_weights_of_the_config_are_refused(tmp_path, models):
    """Weights of only the config source are refused. Copied, they would be nobody's mean."""
    bare = [save_model(tmp_path / f"bare{seed}", random_model(seed)) for seed in range(2)]
    with pytest.raises(MismatchError, match=r"2_Dense/: has weights in .*/a, and .*bare0 has no"):
        plan(bare, config_from=models[0])
    with pytest.raises(MismatchError, match=r"2_Dense/: has weights in .*name its folder"):
        plan([folder / "model.safetensors" for folder in models])


def test_other_embedding_words_are_refused(tmp_path):
    """Other words of embeddings are refused."""
    folders = []
    for seed, name in enumerate("ab"):
        folder = save_model(tmp_path / name, random_model(seed))
        write(folder / "modules.json", modules(("", "WordEmbeddings"), ("1_Pooling", "Pooling")))
        write(folder / "1_Pooling/config.json", MEAN)
        write(folder / "wordembedding_config.json", {"tokenizer_class": "x.WhitespaceTokenizer"})
        write(folder / "whitespacetokenizer_config.json", {"vocab": ["yes", "no"]})
        folders.append(folder)
    assert not [warning for warning in plan(folders).warnings if "vocab" in warning]
    write(folders[1] / "whitespacetokenizer_config.json", {"vocab": ["no", "yes"]})
    with pytest.raises(MismatchError, match=r"whitespacetokenizer_config\.json: is another in"):
        plan(folders)


@pytest.mark.parametrize("length", [32, 16])
def test_lengths_are_told_wherever_they_are(models, length):
    """Newer versions leave the length to the tokenizer."""
    write(models[1] / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
    write(models[1] / "tokenizer_config.json", {"model_max_length": length})
    if length == 32:
        assert plan(models).warnings == ()
    else:
        told(models, "max_seq_length is 32")


def test_unbounded_tokenizer_says_no_length(models):
    """A tokenizer without bound says no length."""
    write(models[1] / "sentence_bert_config.json", {})
    write(models[1] / "tokenizer_config.json", {"model_max_length": 10**30})
    assert plan(models).warnings == ()


@pytest.mark.parametrize("order", [1, -1])
def test_weights_pickled_in_one_are_named(models, order):
    """The way on makes the one that has them only so like the other."""
    (models[1] / "2_Dense" / "model.safetensors").rename(models[1] / "2_Dense" / "model.pkl")
    with pytest.raises(MismatchError) as caught:
        plan(models[::order])
    message = str(caught.value)
    assert f"and in {models[1]} only a pickle (2_Dense/model.pkl)" in message
    assert message.count("model.pkl") == 1
    assert "load that model in sentence-transformers and save it" in message
