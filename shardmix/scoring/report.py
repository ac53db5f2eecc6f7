"""What is told of a scoring run: flat, typed, ready for JSON. The field names are the JSON's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """What the examples say of the models. Sizes in bytes."""

    sources: tuple[str, ...]
    """As named by the user."""
    weights: tuple[float, ...]
    """softmax(-loss / temperature), in source order; they sum to 1."""
    losses: tuple[float, ...]
    """Loss of each model: the mean over batches, in source order."""
    per_example: tuple[tuple[float | None, ...], ...]
    """Loss of each model (outer) on each example (inner), in the order given; None where nothing of
    the example's output is left after cutting."""
    model_type: str
    """decoder, encoder, reranker or encoder-decoder."""
    num_examples: int
    """How many examples were scored."""
    temperature: float
    """Of the softmax."""
    batch_size: int
    """Examples a batch."""
    device: str
    """cpu, cuda or cuda:N."""
    dtypes: tuple[str, ...]
    """What each model computed in."""
    poolings: tuple[str, ...]
    """How each encoder's states became one vector, as `mean` or `mean, Dense`; empty for others."""
    bytes_read: int
    """Weights read, over all models."""
    bytes_stored: int
    """Size of all weights of all models, as stored."""
    num_passes: tuple[int, ...]
    """In how many rounds each model was run, its weights read in each; more than one only for a
    tight budget."""
    seconds: float
    """Time spent on the models, weights read and losses computed; libraries were loaded before."""
    projected_peak_bytes: int
    """What the peak was promised to stay within."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM)."""
    projected_vram_bytes: int
    """GPU memory at its peak, at most; 0 on the CPU."""
    peak_vram_bytes: int
    """GPU memory that torch had reserved at most; 0 on the CPU."""
    warnings: tuple[str, ...]
    """What to know about the figures, such as texts that were cut off."""


@dataclass(frozen=True, slots=True)
class ScoreProgress:
    """Where a scoring run is."""

    source: str
    """The model being scored."""
    model: int
    """Its number, from 1."""
    num_models: int
    """How many there are."""
    fraction: float
    """Share of this model's work that is done, from 0 to 1."""
    seconds: float
    """Since the run began."""
    resident_nbytes: int
    """Resident memory of the process now."""

    @property
    def is_end(self) -> bool:
        """All models are scored."""
        return self.model == self.num_models and self.fraction >= 1


OnScoreProgress = Callable[[ScoreProgress], None]


class ScoreLog(Protocol):
    """Keeps models' scores, so that a run that was cut off need not find them again."""

    def get(self, model: int, /) -> bytes | None:
        """Return what was kept of a model (by number, from 1), or None."""

    def put(self, model: int, score: bytes, /) -> None:
        """Keep what is to be known of a model: JSON, on one line."""
