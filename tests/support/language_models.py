"""Small real models with a tokenizer, and the reference's losses computed plainly, one by one."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = "the a cat dog sat ran on under mat tree why how does it rain fall because of cold yes no"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>")
VOCABULARY = (*SPECIALS, *WORDS.split())
SIZE = 40  # more rows than tokens: a vocabulary is often padded

TEXTS = [
    {"input": "why does the cat sat on the mat", "output": "because of the cold rain"},
    {"input": "how", "output": "yes"},
    {"input": "the dog ran under a tree why does it", "output": "no it does"},
    {"input": "does it rain on the mat", "output": "yes it does rain"},
    {"input": "a cat", "output": "sat under the tree because of the dog"},
]
QUERIES = [
    {"query": "why does it rain", "pos": ["because of the cold"], "neg": ["the cat", "yes", "no"]},
    {"query": "how does the cat sat", "pos": ["on the mat"], "neg": ["a tree ran", "no"]},
    {"query": "the dog ran", "pos": ["the dog does", "x"], "neg": ["a cat sat under", "it"]},
]

_BASE = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "initializer_range": 0.3,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.3,
    "decoder_start_token_id": 5,
    "forced_eos_token_id": None,
}
_GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
_OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3}
_GEMMA2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}
_DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MARIAN = {**_BART, "decoder_start_token_id": 0, "max_position_embeddings": 64}
_MAMBA = {"state_size": 4, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}
_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
}
_ONE_LABEL = {"num_labels": 1}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("decoder", "LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama-tied": ("decoder", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "gpt2": ("decoder", "GPT2LMHeadModel", _GPT2),
    "opt": ("decoder", "OPTForCausalLM", _OPT),
    "gemma2": ("decoder", "Gemma2ForCausalLM", _GEMMA2),
    "mixtral": ("decoder", "MixtralForCausalLM", _EXPERTS),
    "deepseek": ("decoder", "DeepseekV3ForCausalLM", _DEEPSEEK),
    "mamba": ("decoder", "MambaForCausalLM", _MAMBA),
    "bert": ("encoder", "BertModel", {}),
    "deberta": ("encoder", "DebertaV2Model", _DEBERTA),
    "roberta": ("encoder", "RobertaModel", {}),
    "bert-masked": ("encoder", "BertForMaskedLM", {}),
    "bert-reranker": ("reranker", "BertForSequenceClassification", _ONE_LABEL),
    "roberta-reranker": ("reranker", "XLMRobertaForSequenceClassification", _ONE_LABEL),
    "bert-two-labels": ("reranker", "BertForSequenceClassification", {"num_labels": 2}),
    "llama-reranker": ("reranker", "LlamaForSequenceClassification", _ONE_LABEL),
    "t5": ("encoder-decoder", "T5ForConditionalGeneration", _T5),
    "marian": ("encoder-decoder", "MarianMTModel", _MARIAN),
    "bart": ("encoder-decoder", "BartForConditionalGeneration", _BART),
}
"""Name → type of model, class, and what its config has of its own."""


def save_language_model(
    kind: str, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Save a small random model of this kind, in shards, with its tokenizer."""
    _, class_name, own = KINDS[kind]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    # Weights large enough that models differ clearly, and padding would show.
    model = model_class(model_class.config_class(**{**_BASE, **own, **config})).to(dtype)
    model.save_pretrained(folder, max_shard_size="30KB")
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, **options: Any) -> None:
    """Save a tokenizer of whole words, which adds [CLS] and [SEP]; `None` takes a token away."""
    tokens = Tokenizer(WordLevel({word: n for n, word in enumerate(VOCABULARY)}, "[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokens.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [SEP] $B:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, **{**special, **options}
    )
    wrapped.save_pretrained(folder)


def examples_for(kind: str) -> list[dict[str, Any]]:
    """Return examples that suit a kind of model."""
    return TEXTS if KINDS[kind][0] in ("decoder", "encoder-decoder") else QUERIES


def plain_loss(
    kind: str, folder: Path, examples: Sequence[Mapping[str, Any]], *, batch_size: int = 2
) -> float:
    """Return the reference's loss: each text by itself, without padding, all logits."""
    import transformers as hf

    model_type = KINDS[kind][0]
    auto = {
        "decoder": hf.AutoModelForCausalLM,
        "encoder": hf.AutoModel,
        "reranker": hf.AutoModelForSequenceClassification,
        "encoder-decoder": hf.AutoModelForSeq2SeqLM,
    }[model_type]
    model = auto.from_pretrained(folder, dtype="auto").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    compute = {
        "decoder": _decoder_batch,
        "encoder": _encoder_batch,
        "reranker": _reranker_batch,
        "encoder-decoder": _seq2seq_batch,
    }[model_type]
    with torch.no_grad():
        losses = [float(compute(model, tokenizer, batch)) for batch in batches]
    return sum(losses) / len(losses)


def _decoder_batch(model: Any, tokenizer: Any, batch: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    losses = []
    for example in batch:
        ids = tokenizer.encode(f"{example['input']} {example['output']}")
        ids.append(tokenizer.eos_token_id)
        start = len(tokenizer.encode(example["input"]))
        logits = model(torch.tensor([ids])).logits[0].float()
        targets = torch.tensor(ids[start:])
        losses.append(
            torch.nn.functional.cross_entropy(logits[start - 1 : -1], targets, reduction="none")
        )
    return torch.cat(losses).mean()


def _seq2seq_batch(model: Any, tokenizer: Any, batch: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    losses = []
    for example in batch:
        source = torch.tensor([tokenizer.encode(example["input"])])
        labels = torch.tensor([tokenizer(text_target=example["output"])["input_ids"]])
        logits = model(input_ids=source, labels=labels).logits[0].float()
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0], reduction="none"))
    return torch.cat(losses).mean()


def _encoder_batch(model: Any, tokenizer: Any, batch: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    def embed(text: str) -> torch.Tensor:
        state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0].float()
        return state / state.norm()

    queries = torch.stack([embed(example["query"]) for example in batch])
    passages, own = [], []
    for example in batch:
        own.append(len(passages))
        passages += [embed(text) for text in (example["pos"][0], *example["neg"])]
    scores = queries @ torch.stack(passages).T / 0.05
    return torch.nn.functional.cross_entropy(scores, torch.tensor(own))


def _reranker_batch(model: Any, tokenizer: Any, batch: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    losses = []
    for example in batch:
        scores = []
        for text in (example["pos"][0], *example["neg"]):
            logits = model(**tokenizer(example["query"], text, return_tensors="pt")).logits[0]
            scores.append(logits[0] if len(logits) == 1 else logits[1] - logits[0])
        losses.append(-torch.log_softmax(torch.stack(scores).float(), dim=0)[0])
    return torch.stack(losses).mean()


def write_examples(path: Path, examples: Sequence[Mapping[str, Any]]) -> Path:
    """Write examples as JSON lines."""
    path.write_text("".join(json.dumps(example) + os.linesep for example in examples))
    return path
