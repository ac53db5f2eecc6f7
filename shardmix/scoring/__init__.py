"""Merging weights from a few examples, for models that don't fit into memory.

    from shardmix.scoring import compute_losses, compute_weights, score

    report = score(["./base", "./tuned"], "decoder", "examples.jsonl", max_memory="2GiB")
    report.weights, report.losses, report.per_example

A package by itself: it reads sources and knows nothing of merging. Its parts, in the order of
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
    objectives             the task and the loss of each type of model
    model_scoring, scoring  one model, all models
    weights, report        the result

Names are loaded on first use; torch and transformers come with `score`.

Weights are read once. accelerate's disk offload puts a hook on every module that reads its
weights for every forward pass, so that 23 batches read a model 23 times. Here the forward passes of
all batches run side by side (`lockstep`). Each pass runs the model's own `forward` and waits at a
unit without weights; when all wait, the unit is read from its shards, directly into the parameters,
all passes go through it, and its memory is given back. The cost: between units a pass holds its
hidden states (tokens × width, about four times), and a greenlet. Threads would do the same, but
each would have its own pool of OpenMP workers.

A unit is as large as it must be: a block, the layer that transformers never splits; an embedding,
of which only the rows that some pass looks up are read; a large linear layer, such as the head, in
slices of 64 MiB; the whole model, if all passes' states do not fit beside a block but the model
does; or single layers, if not even a block fits. Some models (Mamba) use a layer's weights without
calling it; they are run again as a whole, if there is room, with a warning.

`fit` projects the peak, with 15 % for what matrix libraries and the allocator add. If not all
passes fit at once they go in waves, and the weights are read once a wave; the report says so
(`num_passes`). Without a budget, four fifths of the available memory is one.

The numbers are the reference's. Models compute in their own dtype, also on the CPU: in bfloat16 the
losses differ from those in float32 by up to 2e-3. Parameters that transformers leaves in float32 (a
router's bias) stay so. Only padding is masked; the reference masks every token that equals it, also
within a text. Token losses are float32, their sums float64. Encoders are scored by their CLS state
as in the reference, unless their sentence-transformers modules pool otherwise. Rerankers, which the
reference cannot score, have the cross-entropy of the positive among its own candidates. Losses
differ in the last digits by how examples were put into batches, so by budget, threads and device;
therefore `merge --weights-from` stores them beside its journal.
"""

from typing import TYPE_CHECKING

from shardmix import _lazy
from shardmix.errors import RecipeError

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


_load = _lazy.loader(__name__, _HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        # Only now: a merge by weights that are given asks for none of these.
        from shardmix.sources.hub import check_endpoint

        check_endpoint()  # transformers imports huggingface_hub
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"scoring needs {error.name}, which is not installed",
            remedy="pip install 'shardmix[models]'",
        ) from None
