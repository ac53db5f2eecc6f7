"""Sequences to padded batches, each as long as its longest sequence.

Batches do not change the result if a model respects its attention mask (FNet and ConvBERT don't):
losses are combined afterwards, per example and per batch of the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardmix.scoring.encoding import EncodedExamples, TokenSequence

# A batch of this many tokens keeps a processor busy; in a larger one, this share must be real
# tokens.
_ENOUGH_TOKENS = 256
_LEAST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The sizes of one forward pass, which decide its memory."""

    members: tuple[int, ...]
    """Numbers of its sequences."""
    length: int
    """Tokens of the longest sequence; all are padded to it."""
    target_length: int
    """Labels of the longest sequence: the input of an encoder-decoder's decoder."""
    num_labels: int
    """Labels of all sequences: rows of logits."""

    @property
    def num_tokens(self) -> int:
        """Positions that a layer computes, padding included."""
        return len(self.members) * max(self.length, self.target_length)

    @property
    def num_cells(self) -> int:
        """Cells of the attention matrices of one head."""
        return len(self.members) * max(self.length, self.target_length) ** 2


def shape_batches(
    encoded: EncodedExamples, *, max_tokens: int, max_labels: int
) -> tuple[BatchShape, ...]:
    """Group sequences of similar length into batches of at most so many tokens and labels.

    A single sequence above a limit is a batch by itself.
    """
    lengths = [(seq.num_tokens, len(seq.labels)) for seq in encoded.sequences]
    shapes: list[BatchShape] = []
    members: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (max(lengths[n]), lengths[n], n)):
        grown = _shape([*members, number], lengths)
        is_full = grown.num_tokens > max_tokens or grown.num_labels > max_labels
        if members and (is_full or _is_wasteful(grown, lengths)):
            shapes.append(_shape(members, lengths))
            members = []
        members.append(number)
    return (*shapes, _shape(members, lengths))


def _is_wasteful(shape: BatchShape, lengths: Sequence[tuple[int, int]]) -> bool:
    """Return True if too much of a batch is padding, unless it is too small for that to matter."""
    num_real = sum(max(lengths[number]) for number in shape.members)
    return num_real >= _ENOUGH_TOKENS and num_real < shape.num_tokens * _LEAST_SHARE


def _shape(members: Sequence[int], lengths: Sequence[tuple[int, int]]) -> BatchShape:
    return BatchShape(
        members=tuple(members),
        length=max(lengths[number][0] for number in members),
        target_length=max(lengths[number][1] for number in members),
        num_labels=sum(lengths[number][1] for number in members),
    )


def padded_inputs(
    sequences: Sequence[TokenSequence], filler: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return int64 tensors [sequences, longest], padded on the right, with their attention mask."""
    inputs = {
        key: padded(
            [sequence.inputs[key] for sequence in sequences], filler if key == "input_ids" else 0
        )
        for key in sequences[0].inputs
    }
    inputs["attention_mask"] = padded([[1] * sequence.num_tokens for sequence in sequences], 0)
    return {key: tensor.to(device) for key, tensor in inputs.items()}


def padded(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """Return rows of integers as one int64 tensor [rows, longest], padded on the right."""
    length = max(map(len, rows))
    filled = [[*row, *[filler] * (length - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.long)
