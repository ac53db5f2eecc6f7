"""Batches of examples as LM-Cocktail makes them for a decoder."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that counts for nothing in the loss."""
Example = dict[str, str]
"""`input` and `output`, as `shardmix score` reads them."""


def batch_of(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, longest: int | None = None
) -> dict[str, torch.Tensor]:
    """Return the tokens of input, output and end, padded; labels are those of output and end."""
    input_ids, labels = [], []
    for example in examples:
        prompt = tokenizer.encode(example["input"])
        tokens = tokenizer.encode(f"{example['input']} {example['output']}")
        input_ids.append(torch.tensor([*tokens, tokenizer.eos_token_id][:longest]))
        labels.append(input_ids[-1].clone())
        labels[-1][: len(prompt)] = IGNORED
    return {
        "input_ids": pad_sequence(input_ids, True, tokenizer.pad_token_id),
        "labels": pad_sequence(labels, True, IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in input_ids], True),
    }
