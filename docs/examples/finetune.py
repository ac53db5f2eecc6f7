"""Fine-tune a sentence-transformers folder on pairs, and save the result as another folder.

A plain training loop: each query must pick its own passage among those of its batch, and each
passage its own query. Knows nothing of evaluation or merging.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from torch.nn import functional

from docs.examples.retrieval import Pair


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What a fine-tuning run depends on, besides its base model and its pairs."""

    learning_rate: float = 3e-4
    """Peak rate; reached after a tenth of the steps, then falling linearly to nearly zero."""
    num_epochs: int = 4
    """Passes over the pairs."""
    batch_size: int = 32
    """Pairs a step; the others in the batch are each pair's negatives."""
    scale: float = 20.0
    """What cosines are multiplied by before the softmax (the inverse of its temperature)."""
    seed: int = 0
    """Seeds dropout and the order of the pairs."""


def finetune(
    config_source_folder: Path,
    pairs: list[Pair],
    output_folder: Path,
    settings: TrainingSettings,
) -> float:
    """Train a copy of the base on `pairs`, save it, and return the seconds of training."""
    random_order = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    model = SentenceTransformer(str(config_source_folder), device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    num_steps = settings.num_epochs * -(-len(pairs) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=settings.learning_rate,
        total_steps=num_steps,
        pct_start=0.1,
        anneal_strategy="linear",
        # AdamW keeps its own momentum; only the rate is to change.
        cycle_momentum=False,
    )

    started = time.perf_counter()
    model.train()
    for _ in range(settings.num_epochs):
        shuffled = random_order.sample(pairs, k=len(pairs))
        for start in range(0, len(shuffled), settings.batch_size):
            batch = shuffled[start : start + settings.batch_size]
            loss = contrastive_loss(model, batch, scale=settings.scale)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - started

    model.save(str(output_folder), create_model_card=False)
    return seconds


def contrastive_loss(model: SentenceTransformer, batch: list[Pair], scale: float) -> torch.Tensor:
    """Return the symmetric in-batch loss (InfoNCE; van den Oord et al. 2018, eq. 4)."""
    queries = _embed(model, [pair.query for pair in batch])
    passages = _embed(model, [pair.passage for pair in batch])
    similarities = scale * queries @ passages.T
    own = torch.arange(len(batch))
    by_query = functional.cross_entropy(similarities, own)
    by_passage = functional.cross_entropy(similarities.T, own)
    return (by_query + by_passage) / 2


def _embed(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    # `encode` records no gradients; calling the model does.
    tokens = model.tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=model.max_seq_length,
        return_tensors="pt",
    )
    embeddings = model(dict(tokens))["sentence_embedding"]
    return functional.normalize(embeddings, dim=-1)
