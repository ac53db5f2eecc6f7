"""`verify`: is an output still what the merge wrote, and is that what its sources give?

Reads everything once, in bounded memory; changes nothing.
"""

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shardmix import api, engine
from shardmix.comparison import ComparedShard, Differences
from shardmix.digests import check_algorithm, file_digest
from shardmix.errors import MergeCancelled, SourceError
from shardmix.filesystem import open_regular, refuse_link_outside
from shardmix.memory import default_workers, peak_resident_nbytes, resident_nbytes
from shardmix.merge_options import MergeOptions
from shardmix.plan import MergePlan
from shardmix.provenance import PROVENANCE_NAME, Provenance, SourceRecord, read_provenance
from shardmix.recipe import Recipe, WeightedSource
from shardmix.work import Work


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found. Sizes in bytes."""

    output: str
    """The folder that was verified."""
    is_verified: bool
    """Whether everything is as it should be."""
    problems: tuple[str, ...]
    """What is not, a line each."""
    num_files: int
    """Files with a digest."""
    bytes_read: int
    """What was read of them, and of the sources where it was recomputed."""
    digest: str
    """What they are hashed with: xxh3, blake3 or sha256."""
    recomputed: bool
    """Whether the weights were computed again from the sources, and compared byte for byte."""
    seconds: float
    """How long it took."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM)."""


def verify(
    output: str | PathLike[str],
    *,
    recompute: bool = False,
    sources: Mapping[str, str | PathLike[str]] | None = None,
    max_memory: int | str | None = None,
    on_progress: engine.OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> VerifyReport:
    """Read an output again, all of it, and compare it with the digests in its shardmix.json.

    Args:
        output: a folder that a merge wrote.
        recompute: read the sources again, too, merge them anew and compare every byte of weights.
        sources: where sources lie (name in shardmix.json, or number from 1 → path), as far as they
            are neither on the Hub, nor beside the output, nor recorded with their path.
        max_memory: bound on the process's peak resident memory while recomputing.
        on_progress: called about ten times a second with a `ProgressEvent`.
        cancel: an event; once set, `MergeCancelled` is raised.

    Raises:
        ShardmixError: where it cannot be verified at all; what is found is in the report.

    Example:
        >>> shardmix.verify("merged").is_verified
        True
    """
    started = time.perf_counter()
    folder = Path(output).expanduser()
    provenance = read_provenance(folder)
    check_algorithm(provenance.digests.algorithm)
    problems, num_bytes = _check_digests(folder, provenance, on_progress, cancel)
    if recompute:
        found, num_bytes_recomputed = _recompute(
            folder, provenance, sources or {}, max_memory, on_progress, cancel
        )
        problems += found
        num_bytes += num_bytes_recomputed
    return VerifyReport(
        output=str(folder),
        is_verified=not problems,
        problems=tuple(problems),
        num_files=len(provenance.digests.files),
        bytes_read=num_bytes,
        digest=provenance.digests.algorithm,
        recomputed=recompute,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_resident_nbytes(),
    )


class _Progress:
    """Counts what is read, and reports it now and then."""

    def __init__(
        self,
        total: int,
        num_files: int,
        on_progress: engine.OnProgress | None,
        cancel: threading.Event | None,
    ) -> None:
        self._started = self._reported = time.perf_counter()
        self._total, self._num_files = total, num_files
        self._on_progress, self._cancel = on_progress, cancel
        self._lock = threading.Lock()
        self.num_bytes = self.num_files_done = 0

    def count(self, num_bytes: int) -> None:
        """Count bytes read; raise `MergeCancelled` once that was asked for."""
        if self._cancel is not None and self._cancel.is_set():
            raise MergeCancelled("the verification was cancelled")
        with self._lock:
            self.num_bytes += num_bytes
            now = time.perf_counter()
            if self._on_progress is None or now < self._reported + engine.PROGRESS_SECONDS:
                return
            self._reported = now
            self._on_progress(
                engine.ProgressEvent(
                    num_bytes_done=self.num_bytes,
                    num_bytes_kept=0,
                    num_bytes_total=self._total,
                    num_shards_done=self.num_files_done,
                    num_shards_total=self._num_files,
                    seconds=now - self._started,
                    resident_nbytes=resident_nbytes(),
                )
            )


def _check_digests(
    folder: Path,
    provenance: Provenance,
    on_progress: engine.OnProgress | None,
    cancel: threading.Event | None,
) -> tuple[list[str], int]:
    """Return what is wrong with the files of an output, and how many bytes were read."""
    files = provenance.digests.files
    progress = _Progress(
        sum(record.bytes for record in files.values()), len(files), on_progress, cancel
    )

    def check(name: str) -> str | None:
        record, path = files[name], folder / name
        try:
            refuse_link_outside(folder, path)
            with open_regular(path) as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes != record.bytes:
                    return f"{path}: has {nbytes} bytes, not {record.bytes}"
                digest = file_digest(
                    file.fileno(), provenance.digests.algorithm, on_bytes=progress.count
                )
        except SourceError as error:
            return str(error)
        except FileNotFoundError:
            return f"{path}: is missing"
        except OSError as error:
            return f"{path}: cannot be read ({error.strerror or error})"
        progress.num_files_done += 1
        same = digest == record.digest
        return None if same else f"{path}: its bytes are not those that the merge wrote"

    with ThreadPoolExecutor(default_workers(on_cuda=False)) as pool:
        found = [problem for problem in pool.map(check, sorted(files)) if problem is not None]
    known = {*files, PROVENANCE_NAME}
    found += [
        f"{path}: is a weight file that the merge did not write"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in known
    ]
    return found, progress.num_bytes


def _recompute(
    folder: Path,
    provenance: Provenance,
    sources: Mapping[str, str | PathLike[str]],
    max_memory: int | str | None,
    on_progress: engine.OnProgress | None,
    cancel: threading.Event | None,
) -> tuple[list[str], int]:
    """Merge the sources again, against the output; return what differs, and the bytes read."""
    places = [
        _place(folder, number, source, sources)
        for number, source in enumerate(provenance.sources, start=1)
    ]
    recipe = Recipe(
        models=tuple(
            WeightedSource(place, source.weight)
            for source, place in zip(provenance.sources, places, strict=True)
        ),
        dtype=provenance.dtype,
        base=str(folder),  # whose config says how the weights are tied
        max_shard_size=provenance.max_shard_size,
        allow_weight_sum=True,
        model_type=provenance.model_type,
    )
    options: MergeOptions = {"max_memory": max_memory}
    plan = api.plan_merge(recipe, **options)
    for model, source in enumerate(provenance.sources):
        _check_identity(plan, model, source)
    plan, backend, _ = api.ready(plan, options, lambda chosen: api.plan_merge(recipe, **chosen))
    differences = Differences()
    work = Work(plan, lambda number: ComparedShard(plan.shards[number], folder, differences))
    engine.run_blocks(plan, backend, work, on_progress, cancel)
    found = [
        f"{folder / file}: {num_bytes} bytes of {part} are not what the sources give"
        for (file, part), num_bytes in sorted(differences.num_bytes.items())
    ]
    planned = {shard.filename for shard in plan.shards}
    found += [
        f"{folder / name}: is not what a merge of the sources would write"
        for name in sorted(provenance.digests.files)
        if name.endswith(".safetensors") and "/" not in name and name not in planned
    ]
    return found, plan.read_nbytes + plan.write_nbytes


def _place(
    folder: Path,
    number: int,
    source: SourceRecord,
    sources: Mapping[str, str | PathLike[str]],
) -> str:
    """Return where a source can be read."""
    for key in (source.name, str(number)):
        if key in sources:
            return str(sources[key])
    if source.hub_id is not None:
        return f"{source.hub_id}@{source.commit}"
    recorded = [Path(source.path)] if source.path else []
    is_plain = Path(source.name).name == source.name  # what a stranger wrote may be `../..`
    beside = [folder.resolve().parent / source.name] if is_plain else []
    for place in (*recorded, *beside):
        if place.exists():
            return str(place)
    raise SourceError(
        f"{source.name}: this source of {folder} cannot be found, since {PROVENANCE_NAME} names no "
        f"paths; say where it is: --source {source.name}=PATH, or --source {number}=PATH"
    )


def _check_identity(plan: MergePlan, model: int, source: SourceRecord) -> None:
    """Raise `SourceError` where a source is not the model that was merged."""
    files = {Path(file.path).name: file for file in plan.files if file.model == model}
    for record in source.files:
        file = files.get(record.name)
        if file is None or (file.nbytes, file.header_sha256) != (
            record.bytes,
            record.header_sha256,
        ):
            raise SourceError(
                f"{plan.sources[model]}: is not the {source.name} that was merged ({record.name} "
                "differs in size or header); say where that is with --source"
            )
    if len(files) != len(source.files):
        raise SourceError(f"{plan.sources[model]}: has more files than the {source.name} merged")
