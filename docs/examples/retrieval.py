"""Measure retrieval: how often a query finds its own passage among all passages of its set.

Reads pairs and scores a loaded model. Knows nothing of training or merging.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts which mean the same, or a question and its answer."""

    query: str
    """What is looked up, e.g. `pt c/o SOB x 3d`."""
    passage: str
    """What should be found, e.g. `The patient complains of shortness of breath ...`."""


def read_pairs(path: Path) -> list[Pair]:
    """Read a tab-separated file whose header is `query`, `passage`."""
    with path.open(encoding="utf-8", newline="") as file:
        # Quotation marks are text here, not quoting.
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Pair(row["query"], row["passage"]) for row in rows]


def accuracy_at_1(model: SentenceTransformer, pairs: list[Pair]) -> float:
    """Return the percentage of queries whose nearest passage (by cosine) is their own.

    Every passage of `pairs` is a candidate for every query, so the distractors come from the
    same domain as the answer.
    """
    queries = _embed(model, [pair.query for pair in pairs])
    passages = _embed(model, [pair.passage for pair in pairs])
    nearest = (queries @ passages.T).argmax(dim=1)
    num_found = int((nearest == torch.arange(len(pairs))).sum())
    return 100 * num_found / len(pairs)


def _embed(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    embeddings = model.encode(
        texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    )
    return embeddings.cpu()
