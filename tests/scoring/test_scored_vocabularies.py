"""Models with different vocabularies: scored as they are, merged by token."""

import json

import pytest
import torch
from safetensors.torch import save_file

from shardmix.score_and_merge import merge_by_examples
from tests.support.language_models import SIZE, TEXTS, VOCABULARY, save_language_model
from tests.support.models import load_model


def permuted(folder, out):
    """Save the same model with its tokens in the reverse order."""
    out.mkdir()
    order = list(reversed(range(len(VOCABULARY))))
    rows = [*order, *range(len(VOCABULARY), SIZE)]
    tensors = load_model(folder)
    changed = {
        name: tensor[rows].clone() if tensor.shape[0] == SIZE and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    assert any(changed[name] is not tensors[name] for name in tensors)
    save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    place = {old: new for new, old in enumerate(order)}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        config[key] = place[config[key]]
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: place[number] for token, number in vocab.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = place[token["id"]]
    processor = tokenizer.get("post_processor") or {}
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [place[number] for number in token["ids"]]
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text())
            content.pop("added_tokens_decoder", None)
            (out / name).write_text(json.dumps(content))
    return out


def test_losses_are_each_models_own(tmp_path):
    """Of a model with permuted tokens they are the plain one's, and so is the merge."""
    one = save_language_model("llama", tmp_path / "one", seed=1)
    two = save_language_model("llama", tmp_path / "two", seed=2)
    other = permuted(two, tmp_path / "other")
    plain = merge_by_examples([one, two], tmp_path / "plain", TEXTS, "decoder", scoring={})
    mapped = merge_by_examples(
        [one, other], tmp_path / "out", TEXTS, "decoder", scoring={}, tokenizer_source="base"
    )
    assert mapped.scores.losses == pytest.approx(plain.scores.losses, rel=1e-5)
    first, again = load_model(tmp_path / "plain"), load_model(tmp_path / "out")
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-5)
