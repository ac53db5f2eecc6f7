"""`status`: what is at an output path, and what a merge to it has left unfinished. Reads little."""

from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shardmix.errors import OutputError, SourceError
from shardmix.output.destination import resolve_output
from shardmix.output.journal import summarise
from shardmix.output.provenance import EDITED, PROVENANCE_NAME, read_provenance
from shardmix.output.score_log import num_models_scored
from shardmix.output.staging import Staging, existing_staging, staging_path
from shardmix.plan.identity import MergeDescription
from shardmix.system.locks import lock_owner


@dataclass(frozen=True, slots=True)
class CompleteReport:
    """A merged model that is whole, since it appears in one step; `verify` says if it still is."""

    shardmix: str
    """Version that wrote it."""
    sources: tuple[str, ...]
    """The models, by public name."""
    weights: tuple[float, ...]
    """Their weights."""
    num_files: int
    """Files with a digest."""
    bytes: int
    """Their size."""
    digest: str
    """What they are hashed with."""
    provenance_sha256: str
    """SHA-256 (hex) of shardmix.json, which tells all this."""
    is_edited: bool
    """Whether shardmix.json was edited since the merge, so that none of this may be true."""


@dataclass(frozen=True, slots=True)
class UnfinishedReport:
    """A merge that has begun: at work, or cut off."""

    staging: str
    """The hidden folder where it grows."""
    process: int | None
    """Who is at work on it (0: somebody); None: nobody, and the same merge would go on from it."""
    merge: MergeDescription | None
    """What merge it is; None where it had not begun to write."""
    bytes_done: int
    """Bytes of weight files that are there."""
    bytes_total: int
    """Bytes of weight files to come to."""
    num_shards_done: int
    """Weight files that are complete."""
    num_shards: int
    """Weight files."""
    num_models_scored: int
    """Models whose losses on examples are kept, from which the weights follow."""
    is_left_over: bool
    """Whether the output is in place, and this the rest: nothing to go on from."""
    note: str
    """What it is instead, or besides, where it was killed while it put the output in place."""


@dataclass(frozen=True, slots=True)
class StatusReport:
    """What is at an output path, and beside it."""

    output: str
    """The path."""
    exists: bool
    """Whether anything is there."""
    complete: CompleteReport | None
    """The merged model that is there, if shardmix wrote it."""
    note: str
    """What else there is to say of what is there."""
    unfinished: UnfinishedReport | None
    """What a merge to it has left, or is at."""


def status(output: str | PathLike[str]) -> StatusReport:
    """Return what is at an output path, and what a merge to it has left unfinished.

    Raises `OutputError` where that cannot be read.

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
        weights=tuple(source.weight for source in provenance.sources),
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
        except OutputError as error:  # it is not this user's: what it holds is anybody's
            path = str(staging_path(output))
            return UnfinishedReport(path, None, None, 0, 0, 0, 0, 0, False, str(error))
        return None if staging is None else _report(staging)


def _report(staging: Staging) -> UnfinishedReport:
    summary = summarise(staging.hidden)
    return UnfinishedReport(
        staging=str(staging.path),
        process=lock_owner(staging.hidden),
        merge=summary.merge if summary else None,
        bytes_done=summary.num_bytes_done if summary else 0,
        bytes_total=summary.num_bytes if summary else 0,
        num_shards_done=summary.num_shards_done if summary else 0,
        num_shards=summary.num_shards if summary else 0,
        num_models_scored=num_models_scored(staging.hidden),
        is_left_over=staging.is_placed,
        note=_note(staging),
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
