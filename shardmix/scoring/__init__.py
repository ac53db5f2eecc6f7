"""Merging weights from a few examples, for models that don't fit into memory.

    from shardmix.scoring import compute_losses, compute_weights, score

    report = score(["./base", "./tuned"], "decoder", "examples.jsonl", max_memory="2GiB")
    report.weights, report.losses, report.per_example

A package by itself: it reads checkpoints and knows nothing of merging. Its parts, in the order of
their use:

    options, examples      the request, checked before any model is opened
    reading, encoding      texts to tokens, by each model's tokenizer
    batches                tokens to padded batches
    embedding              an encoder's states to one vector, by its modules
    empty_model            a model without its weights
    model_weights          parameters from stored tensors, read on demand
    units, fit             the model cut to fit into memory
    lockstep               forward passes side by side
    streamed_model         weights to units to passes
    objectives             the task of each type of model, and its loss
    model_scoring, scoring  one model, all models
    weights, report        the result

Names are loaded on first use; torch and transformers come with `score`.
"""

import importlib
from typing import TYPE_CHECKING

from shardmix.errors import RecipeError
from shardmix.sources.hub import check_endpoint

if TYPE_CHECKING:
    from shardmix.scoring.options import ScoreOptions as ScoreOptions
    from shardmix.scoring.report import ScoreProgress as ScoreProgress
    from shardmix.scoring.report import ScoreReport as ScoreReport
    from shardmix.scoring.scoring import compute_losses as compute_losses
    from shardmix.scoring.scoring import score as score
    from shardmix.scoring.weights import compute_weights as compute_weights

_HOME = {
    "compute_losses": "scoring",
    "compute_weights": "weights",
    "score": "scoring",
    "ScoreOptions": "options",
    "ScoreProgress": "report",
    "ScoreReport": "report",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'shardmix.scoring' has no attribute {name!r}")
    check_endpoint()  # transformers imports huggingface_hub
    try:
        module = importlib.import_module(f"shardmix.scoring.{_HOME[name]}")
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"scoring needs {error.name}, which is not installed; pip install 'shardmix[models]'"
        ) from None
    return getattr(module, name)
