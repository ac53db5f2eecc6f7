"""The report of a scoring: flat, typed, ready for JSON. The field names are the JSON's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """The losses and weights of the models. Sizes in bytes."""

    sources: tuple[str, ...]
    """The user's names of the models."""
    weights: tuple[float, ...]
    """softmax(-loss / temperature), in source order; they sum to 1."""
    losses: tuple[float, ...]
    """Loss of each model: the mean over batches, in source order."""
    per_example: tuple[tuple[float | None, ...], ...]
    """Loss of each model (outer) on each example (inner), in the order given; None if nothing of
    the example's output is left after cutting."""
    model_type: str
    """decoder, encoder, reranker or encoder-decoder."""
    num_examples: int
    """Number of examples scored."""
    temperature: float
    """Temperature of the softmax."""
    batch_size: int
    """Examples a batch."""
    device: str
    """cpu, cuda or cuda:N."""
    dtypes: tuple[str, ...]
    """Dtype that each model computed in."""
    poolings: tuple[str, ...]
    """Steps from each encoder's states to one vector, as `mean` or `mean, Dense`; empty for
    others."""
    bytes_read: int
    """Weight bytes read, over all models."""
    bytes_stored: int
    """Size of all weights of all models, as stored."""
    num_passes: tuple[int, ...]
    """Number of rounds of each model, each with one reading of its weights; more than one only for
    a tight budget."""
    seconds: float
    """Time spent on the models, weights read and losses computed; libraries were loaded before."""
    projected_peak_bytes: int
    """Upper bound of the process's peak resident memory."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM)."""
    projected_vram_bytes: int
    """Upper bound of peak GPU memory; 0 on the CPU."""
    peak_vram_bytes: int
    """Peak GPU memory that torch had reserved; 0 on the CPU."""
    warnings: tuple[str, ...]
    """Warnings about the figures, such as texts that were cut off."""


@dataclass(frozen=True, slots=True)
class ScoreProgress:
    """The progress of a scoring."""

    source: str
    """The model being scored."""
    model: int
    """Its number, from 1."""
    num_models: int
    """Number of models."""
    fraction: float
    """Fraction of this model that is done, from 0 to 1."""
    seconds: float
    """Seconds since the scoring began."""
    resident_nbytes: int
    """Resident memory of the process now."""

    @property
    def is_end(self) -> bool:
        """True if all models are scored."""
        return self.model == self.num_models and self.fraction >= 1


OnScoreProgress = Callable[[ScoreProgress], None]


class ScoreLog(Protocol):
    """Stores models' scores, so that a scoring that was cut off need not repeat them."""

    def get(self, model: int, /) -> bytes | None:
        """Return the stored score of a model (by number, from 1), or None."""

    def put(self, model: int, score: bytes, /) -> None:
        """Store a model's score: JSON, on one line."""
