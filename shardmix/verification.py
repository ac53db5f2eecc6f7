"""`verify`: is an output still what the merge wrote, and is that what its sources give?

Reads everything once, in bounded memory; changes nothing.
"""

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shardmix import engine, recomputation
from shardmix.digests import check_algorithm, file_digest
from shardmix.errors import MergeCancelled, RecipeError, SourceError
from shardmix.filesystem import open_regular, refuse_link_outside
from shardmix.memory import default_workers, peak_resident_nbytes, resident_nbytes
from shardmix.naming import is_companion_file
from shardmix.page_cache import PassedRanges, plan_cache_use
from shardmix.provenance import NOT_DIGESTED, Provenance, read_provenance
from shardmix.recomputation import places_given

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
_LOADED_TOO = (".py", ".index.json", "adapter_config.json")


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
        recompute: where the digests hold, read the sources again, too, merge them anew and compare
            every byte of weights.
        sources: where sources lie (number from 1, or name in shardmix.json → path), as far as they
            are neither on the Hub, nor beside the output, nor recorded with their path.
        max_memory: bound on the process's peak resident memory while recomputing.
        on_progress: called about ten times a second with a `ProgressEvent`, on this thread.
        cancel: an event; once set, `MergeCancelled` is raised.

    Raises:
        ShardmixError: where it cannot be verified at all; what is found is in the report.

    Example:
        >>> shardmix.verify("merged").is_verified
        True
    """
    started = time.perf_counter()
    if not recompute and (sources or max_memory is not None):
        option = "--source" if sources else "--max-memory"
        raise RecipeError(f"{option} is for recomputing: give --recompute (recompute=True), too")
    folder = Path(output).expanduser()
    provenance = read_provenance(folder)
    check_algorithm(provenance.digests.algorithm, is_choice=False)
    given = places_given(provenance, sources or {})
    problems, num_bytes = _check_digests(folder, provenance, on_progress, cancel)
    problems += _added_files(folder, provenance)
    is_recomputed = recompute and not problems
    if is_recomputed:
        problems, num_bytes_recomputed = recomputation.recompute(
            folder, provenance, given, max_memory, on_progress, cancel
        )
        num_bytes += num_bytes_recomputed
    elif recompute:
        problems.append(f"{folder}: was not recomputed, since its files are not what they were")
    return VerifyReport(
        output=str(folder),
        is_verified=not problems,
        problems=tuple(problems),
        num_files=len(provenance.digests.files),
        bytes_read=num_bytes,
        digest=provenance.digests.algorithm,
        recomputed=is_recomputed,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_resident_nbytes(),
    )


class _Progress:
    """What workers have read so far; and the word that they are to stop."""

    def __init__(self, num_bytes_total: int, num_files_total: int) -> None:
        self._started = time.perf_counter()
        self._totals = num_bytes_total, num_files_total
        self._lock = threading.Lock()
        self._is_stopped = False
        self.num_bytes = self._num_files = 0

    def count(self, num_bytes: int) -> None:
        """Count bytes read; raise `_Stopped` once that was asked for."""
        if self._is_stopped:
            raise _Stopped
        with self._lock:
            self.num_bytes += num_bytes

    def file_done(self) -> None:
        """Count a file read to its end."""
        with self._lock:
            self._num_files += 1

    def stop(self) -> None:
        """Let each worker stop when it next counts."""
        self._is_stopped = True

    def event(self) -> engine.ProgressEvent:
        """Return how far it is."""
        num_bytes_total, num_files_total = self._totals
        return engine.ProgressEvent(
            num_bytes_done=self.num_bytes,
            num_bytes_kept=0,
            num_bytes_total=num_bytes_total,
            num_shards_done=self._num_files,
            num_shards_total=num_files_total,
            seconds=time.perf_counter() - self._started,
            resident_nbytes=resident_nbytes(),
        )


class _Stopped(Exception):  # noqa: N818 - nobody is to see it
    """Ends a worker whose result nobody wants any more."""


def _check_digests(
    folder: Path,
    provenance: Provenance,
    on_progress: engine.OnProgress | None,
    cancel: threading.Event | None,
) -> tuple[list[str], int]:
    """Return what is wrong with the files of an output, and how many bytes were read."""
    files = provenance.digests.files
    num_bytes = sum(record.bytes for record in files.values())
    is_kept = plan_cache_use(read_nbytes=num_bytes, write_nbytes=0, fsync=True).keeps_sources
    progress = _Progress(num_bytes, len(files))
    futures: list[Future[str | None]] = []
    pool = ThreadPoolExecutor(default_workers())
    try:
        for name in sorted(files):
            futures.append(
                pool.submit(_check_file, folder, name, provenance, progress, keep_cached=is_kept)
            )
        pending = set(futures)
        while pending:
            if cancel is not None and cancel.is_set():
                raise MergeCancelled("the verification was cancelled")
            done, pending = wait(pending, engine.PROGRESS_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what a worker has not foreseen
            if on_progress is not None:
                on_progress(progress.event())
    finally:
        # Also on KeyboardInterrupt, or an error of the callback: no worker outlives the call.
        progress.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        _wait_for(futures)
    found = [problem for future in futures if (problem := future.result()) is not None]
    return found, progress.num_bytes


def _wait_for(futures: list[Future[str | None]]) -> None:
    """Wait whatever comes: a second interrupt changes nothing, the first has told all to stop.

    Not by joining threads: interrupted by a signal, that may take one that runs for ended.
    """
    while unfinished := [future for future in futures if not future.done()]:
        with suppress(KeyboardInterrupt):
            wait(unfinished)


def _check_file(
    folder: Path, name: str, provenance: Provenance, progress: _Progress, *, keep_cached: bool
) -> str | None:
    """Return what is wrong with one file, or None."""
    record, path = provenance.digests.files[name], folder / name
    passed = PassedRanges([path])
    position = 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal position
        progress.count(num_bytes)
        if not keep_cached:
            passed.add(0, position, position + num_bytes)
            position += num_bytes

    try:
        refuse_link_outside(folder, path)
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes != record.bytes:
                return f"{path}: has {nbytes} bytes, not {record.bytes}"
            digest = file_digest(file.fileno(), provenance.digests.algorithm, on_bytes=on_bytes)
    except SourceError as error:
        return str(error)
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error})"
    if not keep_cached:
        passed.end()
    progress.file_done()
    same = digest == record.digest
    return None if same else f"{path}: its bytes are not those that the merge wrote"


def _added_files(folder: Path, provenance: Provenance) -> list[str]:
    """Return what the merge did not write and a loader of models would read all the same."""
    known = {*provenance.digests.files, *NOT_DIGESTED}
    added: list[str] = []

    def note_unreadable(error: OSError) -> None:
        added.append(f"{error.filename}: cannot be read ({error.strerror})")

    for where, folders, names in os.walk(folder, onerror=note_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for path in (Path(where) / name for name in sorted(names)):
            name = path.relative_to(folder).as_posix()
            if name not in known and not path.name.startswith(".") and _would_be_loaded(name):
                added.append(f"{path}: is a file that the merge did not write, and may be loaded")
        added += [f"{Path(where) / name}: is a link that the merge did not make" for name in links]
    return added


def _would_be_loaded(name: str) -> bool:
    return name.endswith((*_WEIGHTS, *_LOADED_TOO)) or is_companion_file(name)
