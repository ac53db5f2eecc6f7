"""The scorer's functions: examples and models in, losses and weights out.

One model in memory at a time, or as much of it as the budget allows. Knows nothing of merging.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike

import msgspec
import torch

from shardmix._typing import Unpack
from shardmix.conventions.sentence_modules import CLS
from shardmix.errors import RecipeError, SourceError
from shardmix.scoring.embedding import Embedding, embedding_of
from shardmix.scoring.empty_model import import_model_code
from shardmix.scoring.encoding import EncodedExamples
from shardmix.scoring.examples import Example, ExamplesArgument, load_examples
from shardmix.scoring.model_scoring import ModelScore, score_model
from shardmix.scoring.objectives import objective_for
from shardmix.scoring.options import ScoreOptions, ScoreSettings, check_options
from shardmix.scoring.reading import read_examples
from shardmix.scoring.report import OnScoreProgress, ScoreLog, ScoreProgress, ScoreReport
from shardmix.scoring.weights import compute_weights
from shardmix.sources.base import Source
from shardmix.sources.resolve import open_sources, resolve_all
from shardmix.system.gpus import resolve_device
from shardmix.system.memory import give_back_large_blocks, peak_resident_nbytes, resident_nbytes


def score(
    sources: Sequence[str | PathLike[str]],
    model_type: str,
    examples: ExamplesArgument,
    *,
    on_progress: OnScoreProgress | None = None,
    log: ScoreLog | None = None,
    **options: Unpack[ScoreOptions],
) -> ScoreReport:
    """Compute each model's loss on a few examples, and the merging weights that follow.

    w_i = softmax_i(-L_i / temperature), L_i being the mean, over batches of `batch_size` examples,
    of the batch's mean loss. Source: LM-Cocktail (arXiv 2311.13534), section 3.

    Args:
        sources: model folders, `.safetensors` files within one, or Hub ids. Each reads the examples
            by its own tokenizer, and embeds by its own sentence-transformers modules.
        model_type: decoder, encoder, reranker or encoder-decoder.
        examples: mappings, or the path of a JSON or JSON lines file: `{"input", "output"}` for
            decoders and encoder-decoders, `{"query", "pos": [...], "neg": [...]}` for encoders and
            rerankers.
        on_progress: called with a `ScoreProgress` now and then.
        log: stores scores; a model with a stored score is not run.
        options: see `ScoreOptions`.

    Raises:
        ShardmixError: the kind tells what to mend; about options and examples before any model is
            opened.

    Example:
        >>> report = score(["./base", "./tuned"], "decoder", [{"input": "2 + 2 =", "output": "4"}])
        >>> sum(report.weights)
        1.0
    """
    settings = check_options(model_type, options)
    if isinstance(sources, str | PathLike) or not sources:
        raise RecipeError("no list of models given", remedy="name the models to score, one or more")
    names = [str(source) for source in sources]
    loaded = load_examples(examples, settings)
    give_back_large_blocks()
    resolved = resolve_all(names)
    models = (resolved[name] for name in names)
    opened = list(open_sources(models, max_memory=settings.max_memory_nbytes))
    return score_opened(opened, model_type, loaded, on_progress=on_progress, log=log, **options)


def score_opened(
    sources: Sequence[Source],
    model_type: str,
    examples: ExamplesArgument,
    *,
    on_progress: OnScoreProgress | None = None,
    log: ScoreLog | None = None,
    **options: Unpack[ScoreOptions],
) -> ScoreReport:
    """Score models that are open, as `score` does."""
    settings = check_options(model_type, options)
    names = [source.text for source in sources]
    loaded = load_examples(examples, settings)
    give_back_large_blocks()  # also for who opened the models elsewhere
    device = torch.device(resolve_device(settings.device))
    _open_device(device)
    readings, notes = read_examples(loaded, sources, settings)
    embeddings = _embeddings(sources, settings)
    import_model_code(sources[0], settings.type.auto_class)
    started = time.perf_counter()
    scores: list[ModelScore] = []
    reserved: int | None = None
    for number, source in enumerate(sources, start=1):
        embedding = embeddings[number - 1] if embeddings else None
        objective = objective_for(readings[number - 1], settings, embedding)

        def tell(fraction: float, number: int = number, text: str = source.text) -> None:
            if on_progress is not None:
                seconds = time.perf_counter() - started
                on_progress(
                    ScoreProgress(text, number, len(names), fraction, seconds, resident_nbytes())
                )

        stored = None if log is None else _stored_score(log, number, num_examples=len(loaded))
        if stored is not None:
            scores.append(stored)
            tell(1.0)
            continue
        one = score_model(source, objective, settings, device, reserved=reserved, on_fraction=tell)
        reserved = one.reserved_nbytes if reserved is None else reserved
        tell(1.0)
        _check_finite(source, one, loaded)
        scores.append(one)
        if log is not None:
            log.put(number, msgspec.json.encode(replace(one, bytes_read=0)))
    losses = [one.losses.mean for one in scores]
    return ScoreReport(
        sources=tuple(names),
        weights=tuple(compute_weights(losses, settings.temperature)),
        losses=tuple(losses),
        per_example=tuple(one.losses.per_example for one in scores),
        model_type=model_type,
        num_examples=len(loaded),
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        device=str(device),
        dtypes=tuple(one.dtype for one in scores),
        bytes_read=sum(one.bytes_read for one in scores),
        bytes_stored=sum(int(source.tensors.nbytes.sum()) for source in sources),
        num_passes=tuple(one.num_passes for one in scores),
        seconds=time.perf_counter() - started,
        projected_peak_bytes=max(one.projected_nbytes for one in scores),
        peak_rss_bytes=peak_resident_nbytes(),
        projected_vram_bytes=max(one.projected_vram_nbytes for one in scores),
        peak_vram_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
        poolings=tuple(embedding.name for embedding in embeddings),
        warnings=(
            *notes,
            *_pooling_notes(embeddings, sources),
            *_cut_notes(readings, sources, settings),
            *(note for one in scores for note in one.notes),
        ),
    )


def compute_losses(
    sources: Sequence[str | PathLike[str]],
    model_type: str,
    examples: ExamplesArgument,
    *,
    on_progress: OnScoreProgress | None = None,
    **options: Unpack[ScoreOptions],
) -> list[float]:
    """Return each model's loss on the examples, in source order; as `score`, without weights.

    Example:
        >>> compute_weights(compute_losses(["./base", "./tuned"], "decoder", examples), 5.0)
        [0.41, 0.59]
    """
    report = score(sources, model_type, examples, on_progress=on_progress, **options)
    return list(report.losses)


def _embeddings(sources: Sequence[Source], settings: ScoreSettings) -> list[Embedding]:
    """Return each encoder's embedding; empty for other types of models."""
    if not settings.type.embeds:
        return []
    return [embedding_of(source, settings.pooling) for source in sources]


def _pooling_notes(embeddings: Sequence[Embedding], sources: Sequence[Source]) -> Iterator[str]:
    """Yield a note for each model whose modules, or user against them, chose the pooling."""
    yield from (embedding.note for embedding in embeddings if embedding.note)
    bare = [each.text for each in sources if not each.modules]
    if bare and len({embedding.name for embedding in embeddings}) > 1:
        yield (
            f"{', '.join(bare)}: pooled by {CLS}, since no modules say otherwise; others here pool "
            "in another way: name one for all with --pooling"
        )


def _stored_score(log: ScoreLog, number: int, *, num_examples: int) -> ModelScore | None:
    """Return an earlier call's score of a model, or None if there is no valid one."""
    try:
        stored = msgspec.json.decode(log.get(number) or b"", type=ModelScore)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    return stored if len(stored.losses.per_example) == num_examples else None


def _open_device(device: torch.device) -> None:
    """Initialise the GPU, so that its memory is taken before memory is planned."""
    if device.type != "cuda":
        return
    if (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            "torch finds no such GPU", subject=f"device {device}", remedy="use --device cpu"
        )
    torch.empty(1, device=device)
    torch.cuda.reset_peak_memory_stats(device)


def _check_finite(source: Source, one: ModelScore, examples: tuple[Example, ...]) -> None:
    for example, loss in zip(examples, one.losses.per_example, strict=True):
        if loss is not None and not math.isfinite(loss):
            raise SourceError(
                f"its loss on {example.name} is {loss}; its weights may hold NaN or Inf, or it "
                f"overflows in {one.dtype}",
                subject=source.text,
                remedy="try --dtype float32, or leave the model out",
            )


def _cut_notes(
    readings: Sequence[EncodedExamples],
    sources: Sequence[Source],
    settings: ScoreSettings,
) -> Iterator[str]:
    """Yield notes on texts that were cut off, for each way of reading the examples."""
    distinct = {id(encoded): encoded for encoded in readings}
    for key, encoded in distinct.items():
        names = [
            source.text for source, own in zip(sources, readings, strict=True) if id(own) == key
        ]
        prefix = f"{', '.join(names)}: " if len(distinct) > 1 else ""
        if encoded.num_cut:
            limit = f"{encoded.max_length} tokens"
            if encoded.is_clamped:
                limit += f" (the model takes no more; {settings.max_input_length} were asked for)"
            count = f"{encoded.num_cut} of {len(encoded.sequences)}"
            yield f"{prefix}{count} texts were cut off at {limit}"
        for name in encoded.silent:
            yield f"{prefix}{name}: `output` is cut off entirely; it counts for nothing"
