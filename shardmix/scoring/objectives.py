"""The task of each type of model, and the loss of its answers.

An objective runs a loaded model on one batch and returns one result a sequence. Results become
losses by the reference's arithmetic: a mean over batches of `batch_size` examples, each the mean
over the batch's tokens (decoders) or queries (encoders, rerankers).
Source: LM-Cocktail (arXiv 2311.13534), section 3, and its implementation.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch.nn import functional

from shardmix.conventions.model_types import (
    CONTINUATION,
    DECODER,
    ENCODER,
    ENCODER_DECODER,
    PAIRS,
    RERANKER,
    TEXTS,
    TWO_SIDES,
    ModelType,
    Reading,
)
from shardmix.conventions.sentence_modules import CLS
from shardmix.errors import RecipeError
from shardmix.scoring.batches import BatchShape, padded, padded_inputs
from shardmix.scoring.embedding import Embedding
from shardmix.scoring.encoding import EncodedExamples, TokenSequence
from shardmix.scoring.options import ScoreSettings

CONTRASTIVE_TEMPERATURE = 0.05
"""Divisor of cosines before the softmax over passages."""

LOGIT_ROWS = 64
"""Rows of logits that are widened to float32 at a time."""

_LABEL_ROWS: ContextVar[torch.Tensor | None] = ContextVar("_LABEL_ROWS", default=None)


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of one model."""

    mean: float
    """Mean over batches."""
    per_example: tuple[float | None, ...]
    """Loss of each example by itself; for an encoder, among its batch. None if nothing of its
    output is left."""


class Objective(ABC):
    """The behaviour that all types of models share."""

    reads: ClassVar[Reading]
    """The reading that its losses are for; that of its model type's row."""
    embeds: ClassVar[bool] = False
    """True if it takes an embedding; as its model type's row."""

    def __init__(
        self,
        encoded: EncodedExamples,
        settings: ScoreSettings,
        embedding: Embedding | None = None,
    ) -> None:
        self.encoded = encoded
        self.auto_class = settings.type.auto_class
        self._settings = settings
        self._filler = encoded.pad_token_id
        self.nbytes = 0
        """Bytes of weights that it holds besides the model's."""

    def prepare(self, model: Any) -> None:
        """Prepare for a model, whose weights need not be loaded yet.

        Some models look for the padding by their config's `pad_token_id`. So batches are padded
        with it, or, if there is none, the config gets ours.
        """
        config = model.config.get_text_config()
        filler = getattr(config, "pad_token_id", None)
        if filler is None:
            filler = self.encoded.pad_token_id
        num_tokens = model.get_input_embeddings().weight.shape[0]
        self._filler = filler if 0 <= filler < num_tokens else 0
        for each in (config, model.config):
            each.pad_token_id = self._filler

    @abstractmethod
    def run(self, model: Any, shape: BatchShape, device: torch.device) -> list[Any]:
        """Return one result for each sequence of the batch, on the CPU."""

    @abstractmethod
    def losses(self, results: Sequence[Any]) -> Losses:
        """Return the losses, from the results of all sequences in order."""

    def _sequences(self, shape: BatchShape) -> list[TokenSequence]:
        return [self.encoded.sequences[number] for number in shape.members]

    def _batches(self, num_examples: int) -> Iterator[range]:
        size = self._settings.batch_size
        for start in range(0, num_examples, size):
            yield range(start, min(start + size, num_examples))


class _TokenObjective(Objective):
    """Loss of tokens: a result is the sum of a sequence's losses, and their number."""

    def prepare(self, model: Any) -> None:
        """Prepare as above, and make the output head compute only logits at labels."""
        super().prepare(model)
        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(_keep_label_rows)

    def losses(self, results: Sequence[tuple[float, int]]) -> Losses:
        """Average over tokens within a batch, then over batches."""
        batches = []
        for members in self._batches(len(results)):
            total = sum(results[number][0] for number in members)
            batches.append(total / sum(results[number][1] for number in members))
        per_example = tuple(total / count if count else None for total, count in results)
        return Losses(fmean(batches), per_example)

    def _token_losses(
        self, logits: torch.Tensor, rows: torch.Tensor, sequences: Sequence[TokenSequence]
    ) -> list[tuple[float, int]]:
        """Return sum and number of the losses of each sequence's labels.

        `logits` is [1, labels, vocabulary], or [sequences, length, vocabulary] if the head could
        not be limited to labels.
        """
        flat = logits.reshape(-1, logits.shape[-1])
        if len(flat) != len(rows):
            flat = flat[rows]
        targets = torch.tensor(
            [label for sequence in sequences for label in sequence.labels],
            dtype=torch.long,
            device=flat.device,
        )
        if not len(targets):
            return [(0.0, 0)] * len(sequences)
        if int(targets.max()) >= flat.shape[-1]:
            raise ValueError(
                f"token {int(targets.max())} is beyond its vocabulary of {flat.shape[-1]}; "
                "its tokenizer is not the one that it was trained with"
            )
        losses = torch.cat(
            [
                functional.cross_entropy(part.float(), target, reduction="none")
                for part, target in zip(
                    torch.split(flat, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True
                )
            ]
        ).double()
        counts = [len(sequence.labels) for sequence in sequences]
        return [
            (float(part.sum()), count)
            for part, count in zip(torch.split(losses.cpu(), counts), counts, strict=True)
        ]


class DecoderObjective(_TokenObjective):
    """Mean loss of the output's tokens, each predicted by the token before it."""

    reads = CONTINUATION

    def run(self, model: Any, shape: BatchShape, device: torch.device) -> list[Any]:
        """Return (sum of losses, number of labels) for each sequence."""
        sequences = self._sequences(shape)
        inputs = padded_inputs(sequences, self._filler, device)
        rows = _label_rows(sequences, inputs["input_ids"].shape[1], shift=1).to(device)
        with _labels_at(rows):
            logits = model(**inputs, use_cache=False).logits
        return self._token_losses(logits, rows, sequences)


class EncoderDecoderObjective(_TokenObjective):
    """Mean loss of the target's tokens, given the source and the tokens before."""

    reads = TWO_SIDES

    def run(self, model: Any, shape: BatchShape, device: torch.device) -> list[Any]:
        """Return (sum of losses, number of labels) for each sequence."""
        sequences = self._sequences(shape)
        inputs = padded_inputs(sequences, self._filler, device)
        read = [_shifted(model, sequence.labels) for sequence in sequences]
        decoder_ids = padded(read, self._filler).to(device)
        rows = _label_rows(sequences, decoder_ids.shape[1], shift=0).to(device)
        with _labels_at(rows):
            logits = model(**inputs, decoder_input_ids=decoder_ids, use_cache=False).logits
        return self._token_losses(logits, rows, sequences)


class EncoderObjective(Objective):
    """Contrastive loss of a query's passage among all passages of its batch."""

    reads = TEXTS
    embeds = True

    def __init__(
        self,
        encoded: EncodedExamples,
        settings: ScoreSettings,
        embedding: Embedding | None = None,
    ) -> None:
        super().__init__(encoded, settings)
        self._embedding = embedding or Embedding((CLS,))
        self.nbytes = self._embedding.nbytes

    def run(self, model: Any, shape: BatchShape, device: torch.device) -> list[Any]:
        """Return one normalised float32 vector for each sequence."""
        inputs = padded_inputs(self._sequences(shape), self._filler, device)
        states = model(**inputs).last_hidden_state.float()
        vectors = self._embedding.vectors(states, inputs["attention_mask"])
        return list(functional.normalize(vectors, dim=-1))

    def losses(self, results: Sequence[torch.Tensor]) -> Losses:
        """Compare each query with the passages of its batch."""
        members = list(_by_example(results, self.encoded.counts))
        means, per_example = [], []
        for batch in self._batches(len(members)):
            queries = torch.stack([members[number][0] for number in batch])
            passages = torch.cat([torch.stack(members[number][1:]) for number in batch])
            # Queries may have different numbers of negatives: count up to each positive.
            sizes = torch.tensor([len(members[number]) - 1 for number in batch])
            own = torch.cumsum(sizes, 0) - sizes
            scores = queries @ passages.T / CONTRASTIVE_TEMPERATURE
            losses = functional.cross_entropy(scores, own, reduction="none").tolist()
            means.append(fmean(losses))
            per_example += losses
        return Losses(fmean(means), tuple(per_example))


class RerankerObjective(Objective):
    """Cross-entropy of the positive among its own candidates, over relevance scores."""

    reads = PAIRS

    def run(self, model: Any, shape: BatchShape, device: torch.device) -> list[Any]:
        """Return one relevance score for each pair.

        A model with one label gives its logit. With two, the score is how much likelier the second,
        "relevant", is.
        """
        inputs = padded_inputs(self._sequences(shape), self._filler, device)
        logits = model(**inputs).logits.float()
        if logits.shape[-1] > 2:
            raise ValueError(
                f"gives {logits.shape[-1]} scores a pair; a reranker gives one, or two of which "
                "the second means relevant"
            )
        scores = logits[:, -1] - (logits[:, 0] if logits.shape[-1] == 2 else 0.0)
        return list(scores.cpu())

    def losses(self, results: Sequence[torch.Tensor]) -> Losses:
        """Compare each query's first candidate, the positive, with the others."""
        scores = [torch.stack(group) for group in _by_example(results, self.encoded.counts)]
        per_example = [float(-functional.log_softmax(group, dim=0)[0]) for group in scores]
        means = [
            fmean(per_example[number] for number in batch)
            for batch in self._batches(len(per_example))
        ]
        return Losses(fmean(means), tuple(per_example))


OBJECTIVES: dict[str, type[Objective]] = {
    DECODER: DecoderObjective,
    ENCODER: EncoderObjective,
    RERANKER: RerankerObjective,
    ENCODER_DECODER: EncoderDecoderObjective,
}
"""Model type → its objective."""


def objective_for(
    encoded: EncodedExamples, settings: ScoreSettings, embedding: Embedding | None = None
) -> Objective:
    """Return the objective of the settings' model type; an encoder's uses `embedding`.

    Raises `RecipeError` if there is none, or if it is for examples that are read in another way: of
    such it would give a loss of nothing.
    """
    row, objective = settings.type, OBJECTIVES.get(settings.model_type)
    if objective is None:
        raise _no_objective(row, "has no line in scoring.objectives.OBJECTIVES")
    if (objective.reads, objective.embeds) != (row.reads, row.embeds):
        raise _no_objective(
            row,
            f"its row says reads={row.reads.name!r}, embeds={row.embeds}; "
            f"{objective.__name__} is for reads={objective.reads.name!r}, "
            f"embeds={objective.embeds}",
        )
    return objective(encoded, settings, embedding)


def _no_objective(row: ModelType, finding: str) -> RecipeError:
    return RecipeError(
        finding,
        subject=f"model type {row.name!r}",
        remedy="mend its row of conventions.model_types, or its line of OBJECTIVES",
    )


@contextmanager
def _labels_at(rows: torch.Tensor) -> Iterator[None]:
    # A context variable: each of the passes that run side by side has its own.
    token = _LABEL_ROWS.set(rows)
    try:
        yield
    finally:
        _LABEL_ROWS.reset(token)


def _keep_label_rows(_head: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Pass only those hidden states to the output head that predict a label."""
    rows = _LABEL_ROWS.get()
    if rows is None:
        return arguments
    states, *others = arguments
    return (states.reshape(1, -1, states.shape[-1])[:, rows], *others)


def _label_rows(sequences: Sequence[TokenSequence], length: int, *, shift: int) -> torch.Tensor:
    """Return the rows of all labels' logits in a batch flattened to [sequences × length]."""
    rows: list[int] = []
    for number, sequence in enumerate(sequences):
        first = number * length + sequence.label_start - shift
        rows += range(first, first + len(sequence.labels))
    return torch.tensor(rows, dtype=torch.long)


def _shifted(model: Any, labels: Sequence[int]) -> list[int]:
    """Return the decoder's input: one sequence's labels, moved one to the right."""
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return [model.config.decoder_start_token_id, *labels[:-1]]
    # One by one: some models count the labels that are not padding.
    row = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([labels]))
    return row[0].tolist()  # type: ignore[no-any-return]


def _by_example(results: Sequence[Any], counts: Sequence[int]) -> Iterator[list[Any]]:
    start = 0
    for count in counts:
        yield list(results[start : start + count])
        start += count
