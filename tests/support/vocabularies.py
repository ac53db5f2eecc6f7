"""Small models with vocabularies of their own, and an oracle of their rows by dictionaries."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.support.models import random_tensor, save_model

Rows = dict[str, torch.Tensor]
WIDTH = 6
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH}


def added_token(content: str, number: int, **flags: bool) -> dict[str, object]:
    """Return an entry of `added_tokens`."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "id": number,
        "content": content,
        **usual,
        "normalized": False,
        "special": True,
        **flags,
    }


def tokenizer_json(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, object]] = (), kind: str = "WordLevel"
) -> str:
    """Return a tokenizer.json of words that stand alone."""
    model: dict[str, object] = {"type": kind, "vocab": dict(vocab), "unk_token": next(iter(vocab))}
    pre_tokenizer: dict[str, object] = {"type": "WhitespaceSplit"}
    if kind == "BPE":
        model |= {"merges": [], "unk_token": None}
        bytes_only = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        pre_tokenizer = {"type": "ByteLevel", **bytes_only}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": list(added),
            "pre_tokenizer": pre_tokenizer,
            "model": model,
        }
    )


def model_of(
    folder: Path,
    vocab: Mapping[str, int],
    added: Sequence[str] = (),
    *,
    rows: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    kind: str = "BPE",
    width: int = WIDTH,
    **config: object,
) -> Rows:
    """Save a model with a row for each token, and return its tensors."""
    first = max(vocab.values()) + 1
    tokens = [added_token(text, number) for number, text in enumerate(added, start=first)]
    count = first + len(added) if rows is None else rows
    tensors = {
        EMBEDDING: random_tensor((count, width), dtype, seed=seed),
        HEAD: random_tensor((count, width), dtype, seed=seed + 100),
        NORM: random_tensor((width,), dtype, seed=seed + 200),
    }
    if tied:
        del tensors[HEAD]
    content = {
        **LLAMA,
        "hidden_size": width,
        "vocab_size": count,
        "tie_word_embeddings": tied,
        **config,
    }
    save_model(folder, tensors, config=content)
    (folder / "tokenizer.json").write_text(tokenizer_json(vocab, tokens, kind))
    return tensors


def numbered(tokens: Sequence[str]) -> dict[str, int]:
    """Return token → its place."""
    return {token: number for number, token in enumerate(tokens)}


def ids_of(folder: Path) -> dict[str, int]:
    """Return token → id, as the tokenizers library has them."""
    from tokenizers import Tokenizer

    return dict(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab())


def filled(
    token: str,
    model: int,
    vocabularies: Sequence[Mapping[str, int]],
    tensors: Sequence[torch.Tensor],
    base: int | None = None,
) -> torch.Tensor:
    """Return a token's row in a model: its own, or what the rules give it; in float32."""
    rows = {
        number: tensor[vocabulary[token]].float()
        for number, (vocabulary, tensor) in enumerate(zip(vocabularies, tensors, strict=True))
        if token in vocabulary
    }
    if model in rows:
        return rows[model]
    if len(rows) == 1 or base not in rows:
        total = torch.zeros(WIDTH)
        for number in sorted(rows):
            total = total + rows[number]
        return total / len(rows)
    return rows[base]
