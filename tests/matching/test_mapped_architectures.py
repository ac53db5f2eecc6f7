"""Models of many classes, whose rows by token are found by the table: outputs compute alike."""

import json

import pytest
import torch

import shardmix
from tests.support.sampling import sample

transformers = pytest.importorskip("transformers")
from tests.support.small_configs import VOCABULARY, small_config  # noqa: E402

CLASSES = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Qwen3MoeForCausalLM"),
    *("MambaForCausalLM", "BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM"),
    *("ElectraForMaskedLM", "AlbertForMaskedLM", "ModernBertForMaskedLM"),
    *("BertForSequenceClassification", "BartForConditionalGeneration", "MarianMTModel"),
    *("T5ForConditionalGeneration", "Gemma3ForConditionalGeneration"),
    *("PaliGemmaForConditionalGeneration", "LlavaForConditionalGeneration"),
    *(
        "OPTForCausalLM",
        "BloomForCausalLM",
        "XLMRobertaForMaskedLM",
        "MPNetForMaskedLM",
    ),
)
MORE = 4
FIXED = 6
"""The first ids, which configs name; they keep their tokens."""
ORDER = [
    *range(FIXED),
    *reversed(range(FIXED, VOCABULARY // 2)),
    *range(VOCABULARY // 2, VOCABULARY),
]


def save(folder, name, order, more, seed):
    """Save a random model whose token `w{order[i]}` has row i; others follow."""
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(small_config(cls)).eval()
    if more:
        model.resize_token_embeddings(VOCABULARY + more, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
        for buffer in model.buffers():
            if buffer.shape == (1, VOCABULARY + more):  # final_logits_bias
                buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    model = cls.from_pretrained(folder).eval()  # what it computes by itself is computed again
    words = [*(f"w{number}" for number in order), *(f"x{number}" for number in range(more))]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


def outputs(model, ids):
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", sample("classes of mapped rows", CLASSES, 6))
def test_logits_follow_the_tokens(tmp_path, name):
    """Of a model with permuted and further tokens, whose output has those of another model."""
    if not hasattr(transformers, name):
        pytest.skip("this transformers has no such class")
    plain = list(range(VOCABULARY))
    save(tmp_path / "a", name, plain, 0, seed=1)
    model = save(tmp_path / "b", name, ORDER, MORE, seed=2)
    weights = {str(tmp_path / "a"): 0.0, str(tmp_path / "b"): 1.0}
    out = tmp_path / "out"
    shardmix.merge(weights, out, tokenizer_source="base")
    loaded, told = type(model).from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    place = torch.tensor([ORDER.index(number) for number in plain])
    ids = torch.tensor([[7, 30, 11, 45, 8, 30]])
    wanted, found = outputs(model, place[ids]), outputs(loaded.eval(), ids)
    if wanted.shape[-1] > len(place):
        wanted = wanted[..., place]
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
