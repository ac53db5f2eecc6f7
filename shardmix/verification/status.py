"""`status`: the state of an output path, and of an unfinished merge to it. Reads little."""

from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from shardmix.errors import OutputError, SourceError
from shardmix.output.destination import resolve_output
from shardmix.output.hidden_folder import staging_path
from shardmix.output.journal import summarise
from shardmix.output.provenance import EDITED, PROVENANCE_NAME, read_provenance, recorded_recipe
from shardmix.output.score_log import num_models_scored
from shardmix.output.staging import Staging, existing_staging
from shardmix.plan.identity import MergeDescription
from shardmix.recipe.parameters import source_weights
from shardmix.recipe.yaml_file import recipe_to_dict
from shardmix.system.locks import lock_owner


@dataclass(frozen=True, slots=True)
class CompleteReport:
    """A merged model, complete since it appears in one step; `verify` says if it still is."""

    shardmix: str
    """Version of shardmix that wrote it."""
    sources: tuple[str, ...]
    """The models, by public name."""
    weights: tuple[float | None, ...]
    """Their weights."""
    recipe: dict[str, Any]
    """Recipe, in the recipe language."""
    num_files: int
    """Files with a digest."""
    bytes: int
    """Their size."""
    digest: str
    """Algorithm of their digests."""
    provenance_sha256: str
    """SHA-256 (hex) of shardmix.json, the source of all these fields."""
    is_edited: bool
    """True if shardmix.json was edited since the merge, so that none of this may be true."""


@dataclass(frozen=True, slots=True)
class MergeInWork:
    """The request of an unfinished merge."""

    models: tuple[str, ...]
    """The models, by public name."""
    weights: tuple[float | None, ...]
    """Their weights, as in `CompleteReport`."""
    recipe: dict[str, Any]
    """The recipe, in its language."""
    config_from: str
    """Name of the model that gives config, tokenizer and the other auxiliary files."""
    digest: str
    """Algorithm of the digests of the output's files."""


@dataclass(frozen=True, slots=True)
class UnfinishedReport:
    """A merge that has begun: in progress, or cut off."""

    staging: str
    """Path of the hidden folder in which it grows."""
    process: int | None
    """Id of the process at work on it (0 if unknown), or None if the same merge would go on."""
    merge: "MergeInWork | None"
    """Description of the merge, or None if it had not begun to write."""
    bytes_done: int
    """Bytes of weight files that are written."""
    bytes_total: int
    """Bytes of all its weight files."""
    num_shards_done: int
    """Weight files that are complete."""
    num_shards: int
    """All its weight files."""
    num_models_scored: int
    """Models with stored losses on examples, from which the weights follow."""
    is_left_over: bool
    """True if the output is complete, and nothing here is to go on from."""
    note: str
    """Note on a merge that was killed during the rename."""


@dataclass(frozen=True, slots=True)
class StatusReport:
    """The state of an output path, and of its hidden folder."""

    output: str
    """The path."""
    exists: bool
    """True if the path exists."""
    complete: CompleteReport | None
    """The merged model at the path, if shardmix wrote it."""
    note: str
    """Note on the path's content."""
    unfinished: UnfinishedReport | None
    """The unfinished merge to it, in progress or cut off."""


def status(output: str | PathLike[str]) -> StatusReport:
    """Return the state of an output path, and of an unfinished merge to it.

    Raises `OutputError` if they cannot be read.

    Example:
        >>> shardmix.status("merged").unfinished is None
        True
    """
    path = resolve_output(output)
    try:
        exists = path.exists()
        complete, note = None, ""
        if (path / PROVENANCE_NAME).exists():
            try:
                complete = _complete(path)
                note = f"{PROVENANCE_NAME} {EDITED}" if complete.is_edited else ""
            except SourceError as error:
                note = str(error)
        elif exists:
            note = f"has no {PROVENANCE_NAME}: it is no merge by shardmix"
        return StatusReport(str(path), exists, complete, note, _unfinished(path))
    except OSError as error:
        raise OutputError(
            f"cannot be read ({error.strerror})",
            subject=path,
            remedy="check its permissions and its disk",
        ) from None


def _complete(path: Path) -> CompleteReport:
    provenance, seal = read_provenance(path)
    files = provenance.digests.files
    return CompleteReport(
        shardmix=provenance.shardmix,
        sources=tuple(source.name for source in provenance.sources),
        weights=source_weights(recorded_recipe(provenance, path / PROVENANCE_NAME)),
        recipe=provenance.recipe,
        num_files=len(files),
        bytes=sum(record.bytes for record in files.values()),
        digest=provenance.digests.algorithm,
        provenance_sha256=seal.sha256,
        is_edited=not seal.holds,
    )


def _unfinished(output: Path) -> UnfinishedReport | None:
    with ExitStack() as stack:
        try:
            staging = stack.enter_context(existing_staging(output))
        except OutputError as error:  # another user's: its content may be anybody's
            path = str(staging_path(output))
            return UnfinishedReport(path, None, None, 0, 0, 0, 0, 0, False, str(error))
        return None if staging is None else _report(staging)


def _report(staging: Staging) -> UnfinishedReport:
    summary = summarise(staging.hidden)
    return UnfinishedReport(
        staging=str(staging.path),
        process=lock_owner(staging.hidden),
        merge=_in_work(summary.merge) if summary else None,
        bytes_done=summary.num_bytes_done if summary else 0,
        bytes_total=summary.num_bytes if summary else 0,
        num_shards_done=summary.num_shards_done if summary else 0,
        num_shards=summary.num_shards if summary else 0,
        num_models_scored=num_models_scored(staging.hidden),
        is_left_over=staging.is_placed,
        note=_note(staging),
    )


def _in_work(merge: MergeDescription) -> MergeInWork:
    recipe = merge.recipe
    return MergeInWork(
        models=recipe.sources,
        weights=source_weights(recipe),
        recipe=recipe_to_dict(recipe),
        config_from=merge.config_from,
        digest=merge.digest,
    )


def _note(staging: Staging) -> str:
    if staging.is_placed:
        return "left over from putting it in place: the next merge to it tidies up"
    if staging.old_model is not None:
        return (
            f"the old model lies in {staging.old_model}, since a merge was stopped while it put "
            "the new one in place: the next merge to it moves it back first"
        )
    return ""
