"""A merge whose weights come from examples: the models are scored, then merged.

Puts `scoring` and `api` together; its own part is the order of the checks.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType

import msgspec

from shardmix import api
from shardmix._typing import Unpack
from shardmix.conventions.file_kinds import is_auxiliary_file, is_module_folder
from shardmix.errors import RecipeError, ShardmixError
from shardmix.execute.progress import OnProgress
from shardmix.options import MergeOptions
from shardmix.output.destination import check_disk, resolve_output
from shardmix.output.score_log import ScoreLog, ScoringIdentity, weight_files
from shardmix.output.staging import Staging, open_staging, settle, staged_nbytes
from shardmix.plan.merge_plan import MergePlan
from shardmix.reports.merge_report import MergeReport
from shardmix.scoring.examples import Example, ExamplesArgument, load_examples
from shardmix.scoring.options import ScoreOptions, ScoreSettings, check_options
from shardmix.scoring.report import OnScoreProgress, ScoreReport
from shardmix.scoring.weights import compute_weights
from shardmix.sources.base import Source
from shardmix.sources.resolve import ResolvedSource
from shardmix.system.files import open_regular
from shardmix.system.hashing import XXH3, file_digest

_MATTERS_NOT = ("device", "max_memory_nbytes", "max_vram_nbytes")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")  # of modules; the plan knows those it reads


def merge_by_examples(
    models: Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    examples: ExamplesArgument,
    model_type: str,
    *,
    scoring: ScoreOptions,
    resolved: Mapping[str, ResolvedSource] = MappingProxyType({}),
    on_score: OnScoreProgress | None = None,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> MergeReport:
    """Score models on examples and merge them by the weights that follow.

    All errors that headers, examples and the output's path can reveal come before the first model
    runs. `max_memory`, `max_vram` and `device` hold for scoring as well. The report's `scores` has
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
            raise RecipeError(
                f"{name} holds for scoring and merging alike, so that it cannot be in `scoring`",
                remedy="give it as an option of the merge",
            )
    scoring = {**scoring, **shared}
    settings = check_options(model_type, scoring)
    loaded = load_examples(examples, settings)
    names = [str(model) for model in models]
    target = resolve_output(output)
    settle(target)
    equal = [(name, 1 / len(names)) for name in names]
    recipe = api.checked_recipe(equal, model_type, options)
    opened = api.open_merge(recipe, output, options, resolved=resolved)
    opened.check_path(target)

    def plan() -> MergePlan:
        return opened.plan(options)

    sources = opened.models.sources[-len(names) :]  # behind the base model, if there is one
    identity = _identity(plan(), sources, loaded, settings)
    with open_staging(target, restart=options.get("restart", False)) as staging:
        if options.get("restart", False):
            staging.forget_scores()
        with closing(ScoreLog(staging.hidden, identity)) as log:
            scores = _known(log, names)
            if scores is None:
                try:
                    scores = _score(sources, model_type, loaded, scoring, on_score, log, plan)
                except BaseException as error:
                    hint = _save_scores(staging, log, names)
                    if isinstance(error, KeyboardInterrupt):
                        error.args = (hint,)
                    elif isinstance(error, ShardmixError) and hint:
                        error.add_hint(hint)
                    raise
            staging.is_worth_keeping = True
            difference = log.difference
    # What was scored hours ago must be what is merged.
    opened.models.check_untouched()
    words = " ".join(map(repr, scores.weights))
    try:
        weighted = list(zip(names, scores.weights, strict=True))
        recipe = api.checked_recipe(weighted, model_type, options)
        report = api.merge_opened(
            replace(opened, recipe=recipe),
            output,
            options,
            on_progress=on_progress,
            cancel=cancel,
        )
    except ShardmixError as error:
        anew = f" (scored again, since {difference})" if difference else ""
        error.add_hint(
            f"the examples gave the weights {words}{anew}: with these no model has to be scored "
            "again"
        )
        raise
    except KeyboardInterrupt as error:
        if not str(error):
            error.args = (f"the examples gave the weights {words}: the same merge takes them",)
        raise
    return replace(report, scores=scores, warnings=scores.warnings + report.warnings)


def _identity(
    plan: MergePlan, sources: Sequence[Source], examples: Sequence[Example], settings: ScoreSettings
) -> ScoringIdentity:
    """Return all that decides the losses; neither the budget nor the device does."""
    content = [replace(example, name="") for example in examples]
    options = {field.name: getattr(settings, field.name) for field in fields(settings)}
    others = [
        file
        for source in sources
        if source.identity.commit is None
        for file in _files_beside(source.root)
    ]
    return ScoringIdentity(
        examples=hashlib.sha256(msgspec.json.encode(content)).hexdigest(),
        options={name: options[name] for name in options if name not in _MATTERS_NOT},
        models=tuple(source.name for source in plan.sources),
        weights=weight_files(plan),
        others=tuple(others),
    )


def _files_beside(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of config, tokenizer and the like of a local model."""
    entries = sorted(folder.iterdir())
    below = [path for entry in entries if is_module_folder(entry.name) for path in _files(entry)]
    for path in (*entries, *below):
        name = path.relative_to(folder).as_posix()
        if is_auxiliary_file(name) and not name.endswith(_WEIGHT_SUFFIXES) and path.is_file():
            with open_regular(path) as file:
                yield name, file_digest(file.fileno(), XXH3)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _known(log: ScoreLog, names: Sequence[str]) -> ScoreReport | None:
    """Return the complete scores of an earlier call with the same examples, or None."""
    if log.report is None:
        return None
    try:
        report = msgspec.json.decode(log.report, type=ScoreReport)
        weights = compute_weights(report.losses, report.temperature)
    except (ValueError, RecursionError, RecipeError):  # msgspec's errors are ValueErrors
        return None
    if len(weights) != len(names):
        return None
    note = "the weights are an earlier call's, from the same examples: no model was scored again"
    return replace(
        report,
        sources=tuple(names),
        weights=tuple(weights),
        bytes_read=0,
        seconds=0.0,
        warnings=(*report.warnings, note),
    )


def _score(
    sources: Sequence[Source],
    model_type: str,
    examples: tuple[Example, ...],
    scoring: ScoreOptions,
    on_score: OnScoreProgress | None,
    log: ScoreLog,
    plan: Callable[[], MergePlan],
) -> ScoreReport:
    """Score the models that the log has no score of."""
    # First, since it stays in memory: the merge's share must be known before the scoring.
    from shardmix.scoring.scoring import score_opened

    planned = plan()
    target = Path(planned.output)
    check_disk(target, planned.disk_needed_nbytes, staged_nbytes=staged_nbytes(target))
    num_known = log.num_models
    scores = score_opened(sources, model_type, examples, on_progress=on_score, log=log, **scoring)
    log.put_report(msgspec.json.encode(scores))
    if num_known:
        note = f"the losses of {num_known} models are an earlier call's"
        scores = replace(scores, warnings=(*scores.warnings, note))
    return scores


def _save_scores(staging: Staging, log: ScoreLog, names: Sequence[str]) -> str:
    """Save the scores of a scoring that was cut off, and return a hint that says so."""
    staging.is_worth_keeping = staging.has_journal or log.num_models > 0
    if log.num_models == 0:
        return ""
    return (
        f"the losses of {log.num_models} of {len(names)} models are kept in {staging.path}: the "
        "same merge goes on from there"
    )
