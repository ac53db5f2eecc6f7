"""A merge whose weights come from examples: the models scored, then merged.

Puts `scorer` and `api` together, and holds no more than the order in which things are checked.
"""

import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from shardmix import api, engine
from shardmix.errors import RecipeError, ShardmixError
from shardmix.merge_options import MergeOptions
from shardmix.output_path import check_disk
from shardmix.report import MergeReport
from shardmix.scorer.examples import ExamplesArgument, load_examples
from shardmix.scorer.options import ScoreOptions, check_options
from shardmix.scorer.report import OnScoreProgress
from shardmix.staging import staged_nbytes

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack


def merge_by_examples(
    models: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    examples: ExamplesArgument,
    model_type: str,
    *,
    scoring: ScoreOptions,
    on_score: OnScoreProgress | None = None,
    on_progress: engine.OnProgress | None = None,
    cancel: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> MergeReport:
    """Score models on examples and merge them by the weights that follow.

    Whatever headers, examples and the output's place can tell is checked before the first model is
    run. `max_memory`, `max_vram` and `device` hold for scoring as well. The report's `scores` holds
    losses and weights. Raises `ShardmixError`.

    Example:
        >>> report = merge_by_examples(["a", "b"], "out", "examples.jsonl", "decoder", scoring={})
        >>> report.weights == report.scores.weights
        True
    """
    shared: ScoreOptions = {
        "max_memory": options.get("max_memory"),
        "max_vram": options.get("max_vram"),
        "device": options.get("device", "auto"),
        "pooling": options.get("pooling"),
    }
    for name in shared:
        if name in scoring:
            raise RecipeError(f"{name} holds for scoring and merging alike: not in `scoring`")
    scoring = {**scoring, **shared}
    loaded = load_examples(examples, check_options(model_type, scoring))
    names = [str(model) for model in models]
    # First, since it stays in memory: what is left for the merge must be known before it is scored.
    from shardmix.scorer import score

    equal = [(name, 1 / len(names)) for name in names]
    plan = api.plan_merge(equal, output, model_type=model_type, **options)
    target = Path(plan.output)
    check_disk(target, plan.disk_needed_nbytes, staged_nbytes=staged_nbytes(target))
    scores = score(names, model_type, loaded, on_progress=on_score, **scoring)
    try:
        report = api.merge(
            list(zip(names, scores.weights, strict=True)),
            output,
            model_type=model_type,
            on_progress=on_progress,
            cancel=cancel,
            **options,
        )
    except ShardmixError as error:
        words = " ".join(map(repr, scores.weights))
        raise type(error)(
            f"{error}; the examples gave the weights {words}: with these no model has to be scored "
            "again"
        ) from None
    return replace(report, scores=scores, warnings=scores.warnings + report.warnings)
