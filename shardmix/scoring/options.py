"""The settings of scoring besides its models and examples: checked, and without torch."""

import operator
from dataclasses import dataclass, replace
from typing import TypedDict

from shardmix.conventions.model_types import (
    CONTINUATION,
    MODEL_TYPES,
    ModelType,
    check_model_type,
)
from shardmix.conventions.sentence_modules import check_pooling
from shardmix.dtypes import OUT_DTYPES
from shardmix.errors import RecipeError
from shardmix.scoring.weights import check_temperature
from shardmix.system.units import parse_size

DTYPES = ("auto", *OUT_DTYPES)
_MOST = 1 << 31


class ScoreOptions(TypedDict, total=False):
    """The keyword arguments of `score` and `compute_losses`, all optional."""

    temperature: float
    """Temperature of the softmax over losses (default 5.0)."""
    batch_size: int
    """Examples whose token losses are averaged together, and which are one another's negatives."""
    max_input_length: int
    """Longest text in tokens; the rest is cut off (default 2048)."""
    neg_number: int
    """Negatives drawn for each query (default 7); if there are fewer, all are used."""
    seed: int
    """Seed for drawing negatives."""
    device: str
    """auto (default), cpu, cuda or cuda:N."""
    dtype: str
    """Dtype that a model computes in: auto (default, its own), float32, bfloat16 or float16."""
    max_memory: int | str | None
    """Bound on the whole process's peak resident memory ("2GiB"); default: only what speed
    needs."""
    max_vram: int | str | None
    """Bound on GPU memory."""
    pooling: str | None
    """Pooling of an encoder's text into one vector: cls, mean, max, mean_sqrt_len, weightedmean or
    lasttoken; default: that of the model's sentence-transformers modules, else cls."""
    chat_template: bool
    """Put a decoder's examples into the tokenizer's chat template."""
    trust_remote_code: bool
    """Run code that comes in a model's folder (default: no)."""


@dataclass(frozen=True, slots=True)
class ScoreSettings:
    """`ScoreOptions`, complete and checked."""

    model_type: str
    """decoder, encoder, reranker or encoder-decoder."""
    temperature: float = 5.0
    batch_size: int = 2
    max_input_length: int = 2048
    neg_number: int = 7
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    max_memory_nbytes: int | None = None
    max_vram_nbytes: int | None = None
    pooling: str | None = None
    chat_template: bool = False
    trust_remote_code: bool = False

    @property
    def type(self) -> ModelType:
        """The row of its model type."""
        return MODEL_TYPES[self.model_type]


def check_options(model_type: str, options: ScoreOptions) -> ScoreSettings:
    """Return the options as settings; raise `RecipeError` for values that make no sense."""
    unknown = set(options) - set(ScoreOptions.__annotations__)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    check_model_type(model_type)
    given = dict(options)
    max_memory, max_vram = given.pop("max_memory", None), given.pop("max_vram", None)
    settings = ScoreSettings(
        model_type=model_type,
        max_memory_nbytes=None if max_memory is None else parse_size(max_memory),  # type: ignore[arg-type]
        max_vram_nbytes=None if max_vram is None else parse_size(max_vram),  # type: ignore[arg-type]
        **given,  # type: ignore[arg-type]
    )
    if settings.pooling is not None:
        check_pooling(settings.pooling)
    _one_of("dtype", settings.dtype, DTYPES)
    settings = replace(
        settings,
        batch_size=_whole_number("batch size", settings.batch_size, least=1),
        max_input_length=_whole_number("max input length", settings.max_input_length, least=2),
        neg_number=_whole_number("neg number", settings.neg_number, least=0),
        seed=_whole_number("seed", settings.seed, least=0),
    )
    check_temperature(settings.temperature)
    if settings.chat_template and settings.type.reads != CONTINUATION:
        raise RecipeError(
            f"a chat template is for decoders, not for a model of type {model_type}",
            remedy="leave it out",
        )
    return settings


def _one_of(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"must be one of {', '.join(choices)}", subject=f"{what} {value!r}")


def _whole_number(what: str, value: object, *, least: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if isinstance(value, bool) or not least <= number <= _MOST:
        raise RecipeError(f"must be a whole number, {least} or more", subject=f"{what} {value!r}")
    return number
