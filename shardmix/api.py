"""The library's functions: `merge`, `plan_merge`, `inspect`. They print nothing.

Composes the packages. A function imports what planning does not need, since `plan` must start
quickly; torch is imported only to merge.
"""

import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from shardmix._typing import Unpack
from shardmix.errors import (
    MergeCancelled,
    NonfiniteError,
    OutputError,
    RecipeError,
    ShardmixError,
    SourceChangedError,
)
from shardmix.methods import passthrough
from shardmix.options import MergeOptions, RunSettings, digest_algorithm, run_settings
from shardmix.output.destination import check_disk, check_output, resolve_output
from shardmix.output.disk_need import disk_needed_nbytes
from shardmix.plan import planner
from shardmix.plan.merge_plan import MergePlan
from shardmix.plan.opening import OpenedModels, disk_errors_named, open_models
from shardmix.recipe.build import ModelsArgument, build_recipe
from shardmix.recipe.recipe import Recipe
from shardmix.sources.resolve import ResolvedSource, open_source, resolve_all
from shardmix.system.files import free_nbytes
from shardmix.system.hashing import LEAF_NBYTES
from shardmix.system.units import format_size, parse_size

if TYPE_CHECKING:
    from shardmix.execute.progress import OnProgress
    from shardmix.output.journal import Journal
    from shardmix.output.staging import Staging
    from shardmix.plan.factor_results import FactorResults
    from shardmix.reports.merge_report import MergeReport
    from shardmix.reports.model_report import ModelReport
    from shardmix.reports.plan_report import PlanReport


def merge(
    models: ModelsArgument,
    output: str | PathLike[str],
    *,
    model_type: str | None = None,
    on_progress: "OnProgress | None" = None,
    cancel: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> "MergeReport":
    """Merge models into one: out = Σ weightᵢ · modelᵢ, streamed, in bounded memory.

    Args:
        models: a mapping source → weight, pairs (source, weight), the path of a YAML recipe, or a
            `Recipe`. A source is a model folder, a `.safetensors` file or a Hub id
            `org/name[@revision]`. All models have the same tensors; the first gives names,
            dtypes, shard layout, config and tokenizer.
        output: the folder to make. It appears, complete, as the last step.
        model_type: decoder, encoder, reranker or encoder-decoder, if known; an encoder's output
            also loads in sentence-transformers, with CLS pooling and normalisation if no model has
            modules of its own.
        on_progress: called about ten times a second with a `ProgressEvent`.
        cancel: an event; once set, the merge stops and raises `MergeCancelled`.
        options: see `MergeOptions`.

    Raises:
        ShardmixError: the kind tells what to mend. All errors that headers reveal come before any
            weight is read. Nothing new is at `output` then, nor after KeyboardInterrupt; finished
            work is saved beside it, and the same call goes on from there.

    Example:
        >>> report = shardmix.merge({"org/base": 0.6, "./tuned": 0.4}, "merged", max_memory="2GiB")
        >>> report.peak_rss_bytes < 2 * 2**30
        True
    """
    if cancel is not None and cancel.is_set():
        raise MergeCancelled("the merge was cancelled before it began")
    return merge_resolved(
        models, output, model_type, options, resolved={}, on_progress=on_progress, cancel=cancel
    )


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    on_progress: "OnProgress | None" = None,
    cancel: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> "MergeReport":
    """Store one model anew in safetensors: bit for bit, or rounded once to another `dtype`.

    `source` is anything that `merge` reads; names lose what wrappers such as torch.compile added.
    Other arguments and errors are those of `merge`.

    Example:
        >>> shardmix.convert("pytorch_model.bin", "converted", max_memory="1GiB").num_models
        1
    """
    if "method" in options:
        raise TypeError("convert has a method of its own")
    options["method"] = passthrough.NAME
    return merge([str(source)], output, on_progress=on_progress, cancel=cancel, **options)


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    output: str | PathLike[str],
    *,
    on_progress: "OnProgress | None" = None,
    cancel: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> "MergeReport":
    """Write what a model changed in its base as a LoRA adapter of at most a rank, for PEFT.

    Both models are anything that `merge` reads. `rank` must be given; with `energy` each matrix has
    the least rank that keeps this share of its squared norm. The report's `low_rank` has the error
    of each matrix. What is no weight of a linear layer is kept whole, or left with `skip_others`.
    Other arguments and errors are those of `merge`.

    Example:
        >>> shardmix.extract("org/base", "./tuned", "adapter", rank=16).low_rank.relative_error
        0.031
    """
    for name in ("method", "base_model", "as_adapter"):
        if name in options:
            raise TypeError(f"extract decides {name} itself")
    if options.get("rank") is None:
        raise RecipeError("must be given", subject="rank", remedy="give one such as 16")
    options |= {"base_model": str(base), "as_adapter": True}
    if str(base) == str(tuned):
        raise RecipeError(
            "is base and tuned model alike", subject=str(base), remedy="name two models"
        )
    return merge([(str(tuned), 1.0)], output, on_progress=on_progress, cancel=cancel, **options)


def merge_resolved(
    models: ModelsArgument,
    output: str | PathLike[str],
    model_type: str | None,
    options: MergeOptions,
    *,
    resolved: Mapping[str, ResolvedSource],
    on_progress: "OnProgress | None" = None,
    cancel: threading.Event | None = None,
) -> "MergeReport":
    """Merge models as `merge` does, of which some texts are resolved already."""
    from shardmix.output.staging import settle

    target = resolve_output(output)
    settle(target)
    recipe = checked_recipe(models, model_type, options)
    opened = open_merge(recipe, output, options, resolved=resolved)
    opened.check_path(target)
    return merge_opened(opened, output, options, on_progress=on_progress, cancel=cancel)


@dataclass(frozen=True, slots=True)
class OpenedMerge:
    """A merge that is asked for, with its models opened: planned and planned anew from these."""

    recipe: Recipe
    """The request to merge."""
    models: OpenedModels
    """The recipe's models."""
    target: Path | None
    """The folder to make; None if that is left open."""
    factors: "FactorResults | None" = None
    """Factors of an adapter of a given rank, once they are computed."""

    def check_path(self, target: Path) -> None:
        """Raise `OutputError` if the output's path led elsewhere when the models were opened."""
        if self.target != target:
            raise OutputError(
                f"its path leads to {self.target} by now", subject=target, remedy="start again"
            )

    def plan(self, options: MergeOptions) -> MergePlan:
        """Plan the merge with these options. Raises `ShardmixError`."""
        settings = run_settings(options)
        with disk_errors_named():
            if self.target is not None:
                check_output(self.target, overwrite=settings.overwrite, inputs=self.models.paths)
            _check_profile(settings, self.target, self.models.paths)
            plan = planner.plan_merge(
                self.recipe,
                self.models,
                settings,
                self.factors,
                output=self.target,
                digest_algorithm=digest_algorithm(options),
                record_paths=options.get("record_paths", False),
            )
            return plan.with_disk_needed(disk_needed_nbytes(plan))


def open_merge(
    recipe: Recipe,
    output: str | PathLike[str] | None,
    options: MergeOptions,
    *,
    resolved: Mapping[str, ResolvedSource],
) -> OpenedMerge:
    """Open the models of a checked recipe, which may mean hours of download.

    `resolved` has models whose texts are resolved already; others are resolved here, once.
    """
    settings = run_settings(options)
    target = None if output is None else resolve_output(output)
    with disk_errors_named():
        if target is not None:
            check_output(target, overwrite=settings.overwrite, inputs=())
        _check_profile(settings, target, inputs=())
        named = () if recipe.config_from is None else (recipe.config_from,)
        others = [text for text in (*recipe.sources, *named) if text not in resolved]
        known = {**resolved, **resolve_all(others)}
        models = open_models(recipe, known, max_memory=settings.max_memory_nbytes)
    return OpenedMerge(recipe, models, target)


def merge_opened(
    opened: OpenedMerge,
    output: str | PathLike[str],
    options: MergeOptions,
    *,
    on_progress: "OnProgress | None" = None,
    cancel: threading.Event | None = None,
) -> "MergeReport":
    """Merge models that are open. Arguments and errors are those of `merge`."""
    # Imported here: a plan needs none of it.
    from shardmix.execute.merge import execute_plan
    from shardmix.execute.prepare import ready
    from shardmix.execute.read_ahead import reading_ahead
    from shardmix.output.journal import open_journal
    from shardmix.output.staging import open_staging, settle
    from shardmix.profiling.recording import recording
    from shardmix.reports.merge_report import describe_merge

    target = resolve_output(output)
    settle(target)
    opened.check_path(target)
    plan = opened.plan(options)
    with open_staging(Path(plan.output), restart=plan.settings.restart) as staging:
        # Again: another process may have made it just before this one had the lock.
        check_output(staging.output, overwrite=plan.settings.overwrite, inputs=())
        notes = _limit_readers(staging, plan)
        if plan.factoring is not None:
            opened = _with_factors(opened, plan, staging, on_progress, cancel)
            plan = opened.plan(options)
        with closing(open_journal(staging.hidden, plan)) as journal:
            try:
                check_disk(staging.output, plan.disk_needed_nbytes, staged_nbytes=staging.nbytes)
                with recording(plan.settings.profile) as recorded:
                    # The finished work of an earlier merge is not read again.
                    is_begun = journal.num_leaves_done > 0
                    with nullcontext() if is_begun else reading_ahead(plan):
                        plan, backend, warnings = ready(
                            plan,
                            options,
                            opened.plan,
                        )
                    # The journal knows the files as they were opened.
                    opened.models.check_untouched()
                    recorded.begin_merge(plan, backend)
                    result = execute_plan(
                        plan,
                        backend,
                        staging,
                        journal,
                        on_progress=on_progress,
                        cancel=cancel,
                        clock=recorded.clock,
                    )
            except BaseException as error:
                is_begun = journal.num_leaves_done > 0 or staging.may_have_scores
                is_begun = is_begun or plan.low_rank is not None  # factors took the longest
                staging.is_worth_keeping = is_begun and not staging.is_placed
                kept = _kept(staging, journal, plan, error)
                if isinstance(error, KeyboardInterrupt):
                    error.args = (kept,)
                elif isinstance(error, ShardmixError) and kept:
                    error.add_hint(kept)
                raise
        return describe_merge(plan, result, warnings=warnings, notes=notes)


def _with_factors(
    opened: OpenedMerge,
    plan: MergePlan,
    staging: "Staging",
    on_progress: "OnProgress | None",
    cancel: threading.Event | None,
) -> OpenedMerge:
    """Compute the factors of an adapter that are not stored yet; return the merge with all."""
    from shardmix.execute.factor_pass import Factor, factor, library
    from shardmix.output.factor_store import FactorStore
    from shardmix.plan.factor_results import FactorResults

    factoring = plan.factoring
    if factoring is None:
        raise AssertionError("nothing is to be factored")
    check_disk(staging.output, plan.disk_needed_nbytes, staged_nbytes=staging.nbytes)
    stacked = plan.sources[-1].decoders[-1] if factoring.products else None
    with closing(FactorStore(staging.hidden, plan, computed_by=library())) as store:
        try:
            factor(Factor(factoring, opened.models.sources, stacked), store, on_progress, cancel)
            opened.models.check_untouched()
        except BaseException as error:
            num_stored = len(store.records)
            staging.is_worth_keeping = num_stored > 0 and not isinstance(error, SourceChangedError)
            if num_stored and isinstance(error, ShardmixError | KeyboardInterrupt):
                kept = (
                    f"{num_stored} of {factoring.num_tasks} parameters are done and kept in "
                    f"{staging.path}: the same call goes on from there"
                )
                if isinstance(error, ShardmixError):
                    error.add_hint(kept)
                else:
                    error.args = (kept,)
            raise
        staging.is_worth_keeping = True
        found = FactorResults(
            dict(store.records), store.finished(), tuple(store.computed_by), factoring.peak_nbytes
        )
    return replace(opened, factors=found)


def plan_merge(
    models: ModelsArgument,
    output: str | PathLike[str] | None = None,
    *,
    model_type: str | None = None,
    **options: Unpack[MergeOptions],
) -> MergePlan:
    """Decide everything about a merge from headers only; write nothing, import no torch.

    Arguments and errors are those of `merge`; without `output`, its path is not checked. (Weights
    of a Hub id are downloaded first, as for a merge.)

    Example:
        >>> plan = shardmix.plan_merge({"a": 0.5, "b": 0.5}, max_memory="1GiB")
        >>> plan.memory.projected_peak_nbytes <= 2**30
        True
    """
    recipe = checked_recipe(models, model_type, options)
    return open_merge(recipe, output, options, resolved={}).plan(options)


def checked_recipe(models: ModelsArgument, model_type: str | None, options: MergeOptions) -> Recipe:
    """Return the recipe that arguments of `merge` ask for. Raises `RecipeError`."""
    unknown = set(options) - set(MergeOptions.__annotations__)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    run_settings(options), digest_algorithm(options)  # wrong ones are found before any other work
    config_from = options.get("config_from")
    max_shard_size = options.get("max_shard_size")
    return build_recipe(
        models,
        method=options.get("method"),
        base_model=options.get("base_model"),
        parameters=options.get("parameters"),
        dtype=options.get("dtype"),
        quantize=options.get("quantize"),
        config_from=None if config_from is None else str(config_from),
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        normalize=options.get("normalize"),
        allow_weight_sum=options.get("allow_weight_sum"),
        allow_differences=options.get("allow_differences"),
        pooling=options.get("pooling"),
        as_adapter=options.get("as_adapter"),
        rank=options.get("rank"),
        energy=options.get("energy"),
        tokenizer_source=options.get("tokenizer_source"),
        pad_to_multiple_of=options.get("pad_to_multiple_of"),
        skip_others=options.get("skip_others"),
        model_type=model_type,
    )


def report_plan(plan: MergePlan) -> "PlanReport":
    """Return the report of a plan, with the free space for its output."""
    from shardmix.reports.plan_report import describe_plan

    if not plan.output:
        return describe_plan(plan, disk_free=None)
    from shardmix.output.staging import staged_nbytes

    target = Path(plan.output)
    # The disk space of an earlier merge's work is not needed once more.
    return describe_plan(plan, disk_free=free_nbytes(target) + staged_nbytes(target))


def inspect(source: str | PathLike[str]) -> "ModelReport":
    """Return the report of a model folder, `.safetensors` file or Hub id, from headers only.

    Raises `SourceError` if it cannot be read. A model that cannot be merged can still be inspected.

    Example:
        >>> shardmix.inspect("org/name").num_parameters
        22713216
    """
    from shardmix.reports.model_report import describe_model

    with disk_errors_named():
        return describe_model(open_source(str(source)))


def _check_profile(settings: RunSettings, target: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse a profile that could not be written, or would destroy something."""
    if settings.profile is None:
        return
    from shardmix.profiling.profile_file import check_profile_path

    check_profile_path(settings.profile, target, inputs)


def _limit_readers(staging: "Staging", plan: MergePlan) -> tuple[str, ...]:
    """Limit an output's readers to those of every source, unless asked not to; return a note of
    it."""
    if plan.settings.share:
        return ()
    from shardmix.output.permissions import readers_of

    with disk_errors_named():
        readers = readers_of(plan, group=staging.hidden.status().st_gid)
    note = readers.note(staging.output, staging.folder.mode)
    staging.folder.limit_permissions(readers.mode)
    return note


def _kept(staging: "Staging", journal: "Journal", plan: MergePlan, error: BaseException) -> str:
    """Return a hint on the saved work of an unfinished merge, and how to go on; "" if there is
    none."""
    if staging.is_placed:
        return f"{staging.output} is the new model all the same, and whole"
    if journal.num_leaves_done == 0 or staging.is_moved:
        return ""
    done = min(journal.num_leaves_done * LEAF_NBYTES, plan.write_nbytes)
    if isinstance(error, SourceChangedError):
        return (
            f"the sources changed, so the saved work in {staging.path} cannot be used: start over "
            "with --restart"
        )
    if isinstance(error, NonfiniteError):
        way = "with --on-nonfinite warn it goes on from there"
    elif plan.settings.restart:
        way = "the same merge without --restart goes on from there"
    else:
        way = "the same merge goes on from there"
    return (
        f"{format_size(done)} of {format_size(plan.write_nbytes)} are done and kept in "
        f"{staging.path}: {way}"
    )
