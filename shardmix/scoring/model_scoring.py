"""One model, all examples: arranged to fit, streamed, and its losses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device

from shardmix.errors import BudgetError, ShardmixError, SourceError, listed, one_line
from shardmix.scoring import fit
from shardmix.scoring.batches import shape_batches
from shardmix.scoring.empty_model import build_empty_model, compute_dtype
from shardmix.scoring.fit import Arrangement, ModelSizes, NothingFits, arrange
from shardmix.scoring.model_weights import CHUNK_NBYTES, ModelWeights
from shardmix.scoring.objectives import Losses, Objective
from shardmix.scoring.options import ScoreSettings
from shardmix.scoring.streamed_model import StreamedModel
from shardmix.scoring.units import Grain, cut
from shardmix.sources.base import Source
from shardmix.system.memory import available_nbytes, resident_nbytes
from shardmix.system.units import MIB, format_mib

# The most of the available memory, and of a GPU's, that is taken without a bound.
_MEMORY_SHARE = 0.8
_VRAM_SHARE = 0.9
# With a GPU, the host holds besides its libraries: the chunk being read, and the examples.
_HOST_NBYTES = CHUNK_NBYTES + 128 * MIB

OnFraction = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class ModelScore:
    """The result and cost of scoring one model. Sizes in bytes."""

    losses: Losses
    """Its losses."""
    dtype: str
    """Dtype that it computed in."""
    bytes_read: int
    """Weight bytes read."""
    num_passes: int
    """Number of times that its weights were read."""
    reserved_nbytes: int
    """Memory of the process before the first model's weights."""
    projected_nbytes: int
    """Upper bound of the process's peak resident memory."""
    projected_vram_nbytes: int
    """Upper bound of peak GPU memory; 0 on the CPU."""
    notes: tuple[str, ...]
    """Notes for the user."""


def score_model(
    source: Source,
    objective: Objective,
    settings: ScoreSettings,
    device: torch.device,
    *,
    reserved: int | None,
    on_fraction: OnFraction,
) -> ModelScore:
    """Return a model's losses on the objective's examples.

    `reserved` is the memory of the process before the first model, None for the first model itself.
    A model that uses weights of a part without calling it cannot be cut; it is loaded whole if
    there is room. Raises `SourceError` if the model cannot be run, `BudgetError` if it does not
    fit.
    """
    score = partial(_score_cut, source, objective, settings, device, reserved, on_fraction)
    try:
        return score(None)
    except _NotRunError as streamed:
        try:
            whole = score((Grain.MODEL,))
        except BudgetError:
            raise _not_run(source, objective, streamed.cause) from None
        except _NotRunError as error:
            raise _not_run(source, objective, error.cause) from None
        note = (
            f"{source.text}: held in memory as a whole, since its layers cannot be run one "
            f"at a time ({one_line(streamed.cause, limit=300)})"
        )
        return replace(whole, notes=(note, *whole.notes))


class _CarriedError(Exception):
    """Carries an error out of a model's forward pass, with its origin."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause
        """The original error."""


class _NotRunError(_CarriedError):
    """An error of a model's own code."""


class _ProgressError(_CarriedError):
    """An error of the caller's progress function: no fault of the model."""


def _score_cut(
    source: Source,
    objective: Objective,
    settings: ScoreSettings,
    device: torch.device,
    reserved: int | None,
    on_fraction: OnFraction,
    grains: tuple[Grain, ...] | None,
) -> ModelScore:
    """Score a model cut in one of these ways; raise `_NotRunError` if it fails."""
    dtype = compute_dtype(source, settings.dtype)
    model = build_empty_model(
        source, objective.auto_class, dtype, trust_remote_code=settings.trust_remote_code
    )
    weights = None
    try:
        objective.prepare(model)
        weights = ModelWeights(source, model)
        _check_complete(source, weights, settings)
        # Memory that an earlier model left on the heap is used again.
        held = resident_nbytes() if reserved is None else reserved + objective.nbytes
        arrangement, projected, projected_vram = _arrange(
            model, weights, objective, settings, device, held, grains
        )
        results = _run(model, weights, arrangement, objective, device, on_fraction)
        return ModelScore(
            losses=objective.losses(results),
            dtype=str(dtype).removeprefix("torch."),
            bytes_read=weights.bytes_read,
            num_passes=len(arrangement.waves),
            reserved_nbytes=held,
            projected_nbytes=projected,
            projected_vram_nbytes=projected_vram,
            notes=_notes(source, weights, settings, num_readings=len(arrangement.waves)),
        )
    except ShardmixError:
        raise
    except _ProgressError as error:
        raise error.cause from None
    except torch.OutOfMemoryError as error:
        raise BudgetError(
            f"out of GPU memory ({one_line(error, limit=300)})",
            subject=source.text,
            remedy="set --max-vram to what is free, or use --device cpu",
        ) from None
    except Exception as error:  # a model is a stranger's program
        # Without its traceback, whose frames hold the passes' results.
        raise _NotRunError(error.with_traceback(None)) from None
    finally:
        if weights is not None:
            weights.close()
        # Modules and hooks refer to one another, so they live on for a while: without weights.
        for name, _ in model.named_parameters():
            set_module_tensor_to_device(model, name, "meta")


def _not_run(source: Source, objective: Objective, cause: Exception) -> SourceError:
    return SourceError(
        f"cannot be run as {objective.auto_class} on these examples ({one_line(cause, limit=300)})",
        subject=source.text,
        remedy="check --model-type and the examples",
    )


def _notes(
    source: Source, weights: ModelWeights, settings: ScoreSettings, *, num_readings: int
) -> tuple[str, ...]:
    """Return notes for the user on how the model was read."""
    notes = []
    unused = weights.unused()
    if unused and not settings.type.embeds:  # an encoder is often stored with some head
        notes.append(
            f"{source.text}: stores {listed(unused, 3)}, which its config does not use; "
            "scored without"
        )
    stored = int(source.tensors.nbytes.sum())
    if weights.bytes_read > 1.25 * stored:
        reason = "the budget" if num_readings > 1 else "parts of it that are used several times"
        notes.append(f"{source.text}: read {weights.bytes_read / stored:.1f} times, for {reason}")
    return tuple(notes)


def _run(
    model: Any,
    weights: ModelWeights,
    arrangement: Arrangement,
    objective: Objective,
    device: torch.device,
    on_fraction: OnFraction,
) -> list[Any]:
    """Return one result for each sequence, in order."""
    results: list[Any] = [None] * len(objective.encoded.sequences)
    with torch.inference_mode():
        streamed = StreamedModel(model, weights, arrangement.partition, device)
        for number, wave in enumerate(arrangement.waves):
            num_steps = streamed.num_stages or len(wave)

            def tell(step: int, wave: int = number, num_steps: int = num_steps) -> None:
                try:
                    on_fraction((wave + step / num_steps) / len(arrangement.waves))
                except Exception as error:
                    raise _ProgressError(error) from None

            passes = [partial(objective.run, model, shape, device) for shape in wave]
            outcomes = streamed.run(passes, on_step=tell)
            for shape, outcome in zip(wave, outcomes, strict=True):
                for member, result in zip(shape.members, outcome, strict=True):
                    results[member] = result
    return results


def _arrange(
    model: Any,
    weights: ModelWeights,
    objective: Objective,
    settings: ScoreSettings,
    device: torch.device,
    held: int,
    grains: tuple[Grain, ...] | None,
) -> tuple[Arrangement, int, int]:
    """Return the way to score the model, and the projected peaks of memory and of GPU memory."""
    encoded = objective.encoded
    num_labels = sum(len(sequence.labels) for sequence in encoded.sequences)
    cuts = {grain: cut(model, weights, grain, num_labels=num_labels) for grain in Grain}
    on_cuda = device.type == "cuda"
    budget = settings.max_memory_nbytes or held + int(available_nbytes() * _MEMORY_SHARE)
    room = _room(budget, held)
    if on_cuda:
        if room < _HOST_NBYTES:
            raise _too_small("--max-memory", budget, held + _HOST_NBYTES)
        room = settings.max_vram_nbytes or int(torch.cuda.mem_get_info(device)[0] * _VRAM_SHARE)
    try:
        arrangement = arrange(
            cuts,
            lambda tokens, labels: shape_batches(encoded, max_tokens=tokens, max_labels=labels),
            _sizes(model, objective),
            available=room,
            best_tokens=fit.BEST_TOKENS[device.type],
            grains=grains,
        )
    except NothingFits as error:
        least = error.least_nbytes
        if on_cuda:
            raise _too_small("--max-vram", room, least) from None
        raise _too_small("--max-memory", budget, held + least) from None
    if on_cuda:
        return arrangement, held + _HOST_NBYTES, arrangement.projected_nbytes
    return arrangement, held + arrangement.projected_nbytes, 0


def _room(budget: int, held: int) -> int:
    return budget - held


def _too_small(option: str, given: int, least: int) -> BudgetError:
    return BudgetError(
        f"too small to score with; the least that works here is {format_mib(least)}",
        subject=f"{option} {format_mib(given)}",
        remedy="raise the budget, or shorten the examples",
    )


def _sizes(model: Any, objective: Objective) -> ModelSizes:
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    width = model.get_input_embeddings().weight.shape[1]
    labelled = bool(objective.encoded.sequences[0].labels)
    return ModelSizes(
        hidden_size=max(width, getattr(config, "hidden_size", 0) or 0),
        num_heads=getattr(config, "num_attention_heads", None) or 1,
        holds_attention=getattr(config, "_attn_implementation", "eager") == "eager",
        holds_position_bias=hasattr(config, "relative_attention_num_buckets"),
        element_nbytes=model.dtype.itemsize,
        vocabulary=head.weight.shape[0] if labelled and head is not None else 0,
    )


def _check_complete(source: Source, weights: ModelWeights, settings: ScoreSettings) -> None:
    """Refuse a model with parts that would be random; an encoder's pooler is not used."""
    missing = weights.missing()
    if settings.type.embeds:
        missing = [name for name in missing if "pooler." not in name]
    if missing:
        raise SourceError(
            f"stores nothing for {listed(missing, 3)}; it is not a whole model of type "
            f"{settings.model_type}",
            subject=source.text,
            remedy="check --model-type",
        )
