"""Train and measure a small decoder: a Llama of three million parameters, made from nothing.

Its tokenizer is made from nothing as well. Knows nothing of tasks or of merging.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY_SIZE = 512
IGNORED = -100
"""The label of a token that counts for nothing in the loss."""

Example = dict[str, str]
"""`input` and `output`, as `shardmix score` reads them."""


@dataclass(frozen=True, slots=True)
class DecoderTraining:
    """What a training run depends on, besides its first model and its examples."""

    learning_rate: float
    """Peak rate; reached after a twentieth of the steps, then falling linearly to nearly zero."""
    batch_size: int = 32
    """Examples a step."""
    seed: int = 0
    """Seeds the order of the examples."""


def train_tokenizer(examples: list[Example]) -> PreTrainedTokenizerFast:
    """Train a byte-pair tokenizer whose pieces are whole words or parts of one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    # The space goes with the word that follows it, so that pieces join without a rule.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=["<unk>", "<s>", "</s>", "<pad>"]
    )
    texts = (f"{example['input']} {example['output']}" for example in examples)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def new_decoder(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def load_decoder(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load a model folder."""
    model = LlamaForCausalLM.from_pretrained(folder)
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def save_decoder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_decoder(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    settings: DecoderTraining,
) -> float:
    """Train the model in place, by one pass over the examples; return the seconds it took.

    Only tokens of the output, and its end, count in the loss.
    """
    order = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.01, fused=True
    )
    num_steps = -(-len(examples) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=settings.learning_rate,
        total_steps=num_steps,
        pct_start=0.05,
        anneal_strategy="linear",
        # AdamW keeps its own momentum; only the rate is to change.
        cycle_momentum=False,
    )
    encoded = [_encode(tokenizer, example) for example in examples]
    shuffled = order.sample(encoded, k=len(encoded))
    started = time.perf_counter()
    model.train()
    for start in range(0, len(shuffled), settings.batch_size):
        batch = _pad(shuffled[start : start + settings.batch_size], tokenizer.pad_token_id)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return time.perf_counter() - started


@torch.no_grad()
def exact_match(folder: Path, examples: list[Example], batch_size: int = 100) -> float:
    """Return the percentage of examples whose whole output greedy decoding would give.

    Greedy decoding gives the output exactly if every token of it, and its end, is the most
    probable after the ones before it; one pass with the right tokens given shows that.
    """
    model, tokenizer = load_decoder(folder)
    encoded = [_encode(tokenizer, example) for example in examples]
    num_right = 0
    for start in range(0, len(encoded), batch_size):
        batch = _pad(encoded[start : start + batch_size], tokenizer.pad_token_id)
        labels = batch["labels"][:, 1:]
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right = (logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORED)
        num_right += int(right.all(dim=1).sum())
    return 100 * num_right / len(examples)


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Return the tokens of input, output and end, and how many of them are the input's."""
    prompt = tokenizer(example["input"])["input_ids"]
    whole = tokenizer(f"{example['input']} {example['output']}")["input_ids"]
    return [*whole, tokenizer.eos_token_id], len(prompt)


def _pad(encoded: list[tuple[list[int], int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    length = max(len(tokens) for tokens, _ in encoded)
    input_ids = torch.full((len(encoded), length), pad_token_id)
    labels = torch.full((len(encoded), length), IGNORED)
    attention_mask = torch.zeros((len(encoded), length), dtype=torch.long)
    for row, (tokens, prompt_length) in enumerate(encoded):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt_length : len(tokens)] = torch.tensor(tokens[prompt_length:])
        attention_mask[row, : len(tokens)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
