"""The library's functions: `merge`, `plan_merge`, `inspect`. They print nothing.

Puts the layers together. Imports torch only to merge.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path

from shardmix import engine, planner
from shardmix.checkpoint import (
    Checkpoint,
    main_place,
    open_checkpoint,
    open_checkpoints,
    read_config,
    weight_names,
)
from shardmix.digests import LEAF_NBYTES
from shardmix.disk_need import disk_needed_nbytes
from shardmix.errors import (
    BudgetError,
    MergeCancelled,
    NonfiniteError,
    OutputError,
    RecipeError,
    ShardmixError,
    SourceChangedError,
    SourceError,
)
from shardmix.filesystem import free_nbytes
from shardmix.hub import locate
from shardmix.journal import Journal, open_journal
from shardmix.matching import check_mergeable
from shardmix.merge_options import MergeOptions, digest_algorithm, run_settings
from shardmix.model_report import ModelReport, describe_model
from shardmix.model_types import contradiction, fitting_types
from shardmix.module_tree import read_modules
from shardmix.output_path import check_disk, check_output, resolve_output
from shardmix.plan import MergePlan
from shardmix.read_ahead import reading_ahead
from shardmix.readers import readers_of
from shardmix.readiness import ready
from shardmix.recipe import ModelsArgument, build_recipe
from shardmix.recording import check_profile_place, recording
from shardmix.report import MergeReport, PlanReport, describe_merge, describe_plan
from shardmix.sentence_modules import MODULES_NAME
from shardmix.source_files import has_changed
from shardmix.staging import Staging, open_staging, settle, staged_nbytes
from shardmix.units import format_size, parse_size

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack


def merge(
    models: ModelsArgument,
    output: str | PathLike[str],
    *,
    model_type: str | None = None,
    on_progress: engine.OnProgress | None = None,
    cancel: threading.Event | None = None,
    **options: Unpack[MergeOptions],
) -> MergeReport:
    """Merge models into one: out = Σ weightᵢ · modelᵢ, streamed, in bounded memory.

    Args:
        models: a mapping source → weight, pairs (source, weight), the path of a YAML recipe, or a
            `Recipe`. A source is a model folder, a `.safetensors` file or a Hub id
            `org/name[@revision]`. All models have the same tensors; the first gives names,
            dtypes, shard layout, config and tokenizer.
        output: the folder to make. It appears, whole, as the last step.
        model_type: decoder, encoder, reranker or encoder-decoder, where that is known; an encoder's
            output also loads in sentence-transformers, with CLS pooling and normalisation if no
            model has modules of its own.
        on_progress: called about ten times a second with a `ProgressEvent`.
        cancel: an event; once set, the merge stops and raises `MergeCancelled`.
        options: see `MergeOptions`.

    Raises:
        ShardmixError: of the kind that says what to mend. All that can be known from headers is
            found before any weight is read. Nothing new is at `output` then, nor after
            KeyboardInterrupt; what is done is kept beside it, and the same call goes on from there.

    Example:
        >>> report = shardmix.merge({"org/base": 0.6, "./tuned": 0.4}, "merged", max_memory="2GiB")
        >>> report.peak_rss_bytes < 2 * 2**30
        True
    """
    if cancel is not None and cancel.is_set():
        raise MergeCancelled("the merge was cancelled before it began")
    target = resolve_output(output)
    settle(target)
    plan = plan_merge(models, output, model_type=model_type, **options)
    if Path(plan.output) != target:
        raise OutputError(f"{target}: its path leads to {plan.output} by now; start again")
    with open_staging(Path(plan.output), restart=plan.settings.restart) as staging:
        # Again: another process may have made it just before this one had the lock.
        check_output(staging.output, overwrite=plan.settings.overwrite, inputs=())
        notes = _limit_readers(staging, plan)
        with closing(open_journal(staging.hidden, plan)) as journal:
            try:
                check_disk(staging.output, plan.disk_needed_nbytes, staged_nbytes=staging.nbytes)
                with recording(plan.settings.profile) as recorded:
                    # What an earlier run has done is not read again.
                    planned, is_begun = plan, journal.num_leaves_done > 0
                    with nullcontext() if is_begun else reading_ahead(plan):
                        plan, backend, findings = ready(
                            plan,
                            options,
                            lambda chosen: plan_merge(
                                models, output, model_type=model_type, **chosen
                            ),
                        )
                    _check_planned_alike(planned, plan)
                    recorded.begin_merge(plan, backend)
                    result = engine.execute(
                        plan,
                        backend,
                        staging,
                        journal,
                        on_progress=on_progress,
                        cancel=cancel,
                        clock=recorded.clock,
                    )
            except BaseException as error:
                is_begun = journal.num_leaves_done > 0 or staging.has_scores
                staging.is_worth_keeping = is_begun and not staging.is_placed
                kept = _kept(staging, journal, plan, error)
                if isinstance(error, KeyboardInterrupt):
                    error.args = (kept,)
                elif isinstance(error, ShardmixError) and kept:
                    raise type(error)(f"{error}; {kept}") from None
                raise
        return describe_merge(plan, result, warnings=findings, notes=notes)


def plan_merge(
    models: ModelsArgument,
    output: str | PathLike[str] | None = None,
    *,
    model_type: str | None = None,
    **options: Unpack[MergeOptions],
) -> MergePlan:
    """Decide everything about a merge from headers alone; write nothing, import no torch.

    Arguments and errors are those of `merge`; without `output`, where it would go is not checked.
    (Weights of a Hub id are downloaded first, as for a merge.)

    Example:
        >>> plan = shardmix.plan_merge({"a": 0.5, "b": 0.5}, max_memory="1GiB")
        >>> plan.memory.projected_peak_nbytes <= 2**30
        True
    """
    unknown = set(options) - set(MergeOptions.__annotations__)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    settings, digest = run_settings(options), digest_algorithm(options)
    base = options.get("base")
    max_shard_size = options.get("max_shard_size")
    recipe = build_recipe(
        models,
        dtype=options.get("dtype"),
        base=None if base is None else str(base),
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        normalize=options.get("normalize"),
        allow_weight_sum=options.get("allow_weight_sum"),
        allow_differences=options.get("allow_differences"),
        pooling=options.get("pooling"),
        model_type=model_type,
    )
    target = None if output is None else resolve_output(output)
    with _disk_errors_named():
        if target is not None:
            # Before sources are opened: that may mean hours of download.
            check_output(target, overwrite=settings.overwrite, inputs=())
        check_profile_place(settings.profile, target, inputs=())
        checkpoints = []
        for checkpoint in open_checkpoints(recipe.sources, max_memory=settings.max_memory_nbytes):
            for part in checkpoint.parts:
                check_mergeable(part, recipe.allow_differences)
            checkpoints.append(checkpoint)
        donor = _donor(recipe.base, checkpoints[0])
        _check_model_type(model_type=recipe.model_type, donor=donor)
        inputs = [path for checkpoint in checkpoints for path in _extent(checkpoint)]
        inputs += [donor.folder] if recipe.base is not None else []
        if target is not None:
            check_output(target, overwrite=settings.overwrite, inputs=inputs)
        check_profile_place(settings.profile, target, inputs)
        outcome: planner.Outcome = {
            "output": target,
            "digest_algorithm": digest,
            "record_paths": options.get("record_paths", False),
        }
        try:
            plan = planner.plan_merge(recipe, checkpoints, donor, settings, **outcome)
        except BudgetError as error:
            if settings.device != "auto":
                raise
            on_cpu = replace(settings, device="cpu")
            plan = planner.plan_merge(recipe, checkpoints, donor, on_cpu, **outcome)
            plan = replace(plan, warnings=(*plan.warnings, f"on the CPU, since on a GPU {error}"))
        return plan.with_disk_needed(disk_needed_nbytes(plan))


def report_plan(plan: MergePlan) -> PlanReport:
    """Return what a plan means to people, with the room that is free for its output."""
    if not plan.output:
        return describe_plan(plan, disk_free=None)
    target = Path(plan.output)
    # What an earlier run has done is not needed once more.
    return describe_plan(plan, disk_free=free_nbytes(target) + staged_nbytes(target))


def inspect(source: str | PathLike[str]) -> ModelReport:
    """Return what a model folder, `.safetensors` file or Hub id holds, from headers alone.

    Raises `SourceError` where it cannot be read. What cannot be merged can still be looked at.

    Example:
        >>> shardmix.inspect("org/name").num_parameters
        22713216
    """
    with _disk_errors_named():
        return describe_model(open_checkpoint(str(source)))


@contextmanager
def _disk_errors_named() -> Iterator[None]:
    """Turn what no check foresaw, such as a folder without permission, into a clear error."""
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{error.filename or 'a file'}: cannot be read ({error.strerror or error}); check its "
            "permissions and its disk"
        ) from None


def _limit_readers(staging: Staging, plan: MergePlan) -> tuple[str, ...]:
    """Shut out of the output who may not read every source, unless asked; say so."""
    if plan.settings.share:
        return ()
    with _disk_errors_named():
        readers = readers_of(plan, group=staging.hidden.status().st_gid)
    note = readers.note(staging.output, staging.folder.mode)
    staging.folder.limit_permissions(readers.mode)
    return note


def _extent(checkpoint: Checkpoint) -> list[Path]:
    """Return what of the disk is the checkpoint's: its folder, and files that may be links."""
    files = [shard.path for part in checkpoint.parts for shard in part.shards]
    return files if checkpoint.is_single_file else [checkpoint.root, *files]


def _check_planned_alike(then: MergePlan, now: MergePlan) -> None:
    """Raise `SourceError` if a source has changed between two plans; a journal knows the first."""
    for before, after in zip(then.files, now.files, strict=False):
        if before != after:
            raise has_changed(after.path)


def _kept(staging: Staging, journal: Journal, plan: MergePlan, error: BaseException) -> str:
    """Say what is kept of an unfinished merge, and how to go on; "" where nothing is."""
    if staging.is_placed:
        return f"{staging.output} is the new model all the same, and whole"
    if journal.num_leaves_done == 0 or staging.is_moved:
        return ""
    done = min(journal.num_leaves_done * LEAF_NBYTES, plan.write_nbytes)
    if isinstance(error, SourceChangedError):
        way = "that is of no use to other sources: begin anew with --restart"
    elif isinstance(error, NonfiniteError):
        way = "with --on-nonfinite warn it goes on from there"
    elif plan.settings.restart:
        way = "the same without --restart goes on from there"
    else:
        way = "the same again goes on from there"
    return (
        f"{format_size(done)} of {format_size(plan.write_nbytes)} are done and kept in "
        f"{staging.path}: {way}"
    )


def _check_model_type(*, model_type: str | None, donor: planner.Donor) -> None:
    """Raise `RecipeError` if what the output's config says contradicts the type that was named."""
    if model_type is None:
        return
    has_modules = os.path.lexists(donor.folder / MODULES_NAME)
    finding = contradiction(donor.config, model_type, has_modules=has_modules)
    if finding is not None:
        fitting = " or ".join(fitting_types(donor.config))
        raise RecipeError(
            f"model type {model_type!r}: the config of {donor.name} says {finding}; "
            f"leave --model-type out{f', or name what it is: {fitting}' if fitting else ''}"
        )


def _donor(base: str | None, first: Checkpoint) -> planner.Donor:
    if base is None:
        name = planner.public_name(first)
        return planner.Donor(
            name,
            first.root,
            first.config,
            first.commit,
            weights=first.weight_names,
            is_single_file=first.is_single_file,
            left_out=first.left_out,
            # Of a file alone nothing is merged but itself; that is told of where it is not enough.
            modules=read_modules(first.root) if first.is_single_file else first.modules,
            main_place=first.place,
        )
    located = locate(base, with_weights=False)
    is_single_file = not located.path.is_dir()
    folder = located.path.parent if is_single_file else located.path
    name = base if located.hub_id is not None else folder.resolve().name
    modules = () if is_single_file else read_modules(folder)
    place = main_place(folder, modules)
    return planner.Donor(
        name,
        folder,
        read_config(folder / place),
        located.commit,
        weights=(located.path.name,) if is_single_file else weight_names(folder),
        is_single_file=is_single_file,
        left_out=located.left_out,
        modules=modules,
        main_place=place,
    )
