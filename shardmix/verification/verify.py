"""`verify`: checks that an output is still what the merge wrote, and what its sources give.

Reads everything once, in bounded memory; changes nothing.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shardmix.conventions.file_kinds import is_auxiliary_file
from shardmix.errors import MergeCancelled, RecipeError, SourceError
from shardmix.execute.progress import OnProgress, ProgressEvent, Teller
from shardmix.output.provenance import (
    EDITED,
    NOT_DIGESTED,
    PROVENANCE_NAME,
    Digests,
    Provenance,
    read_provenance,
)
from shardmix.plan.memory_budget import default_workers
from shardmix.system.digests import check_algorithm, file_digest
from shardmix.system.files import open_regular, refuse_link_outside
from shardmix.system.memory import peak_resident_nbytes, resident_nbytes
from shardmix.system.page_cache import PassedRanges, plan_cache_use
from shardmix.system.threads import running
from shardmix.verification import recomputation
from shardmix.verification.recomputation import places_given

# Files that loaders of models read, besides files that go along with weights: weights of any
# format ...
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pt2", ".ptl", ".pte", ".torchscript"),
    *(".gguf", ".ggml", ".llamafile", ".h5", ".hdf5", ".keras", ".msgpack", ".pb", ".tflite"),
    *(".npz", ".npy", ".pkl", ".pickle", ".joblib", ".dill", ".distcp", ".nemo", ".params"),
    *(".onnx", ".onnx_data", ".onnx.data", ".ort", ".xml", ".engine", ".plan", ".trt", ".mlmodel"),
    *(".pdparams", ".pdiparams", ".pdmodel", ".mnn", ".rknn", ".mar", ".jit"),
)
# ... code, and the configs by which they find modules and weights in subfolders.
_CODE = (".py", ".pyc", ".pyd", ".so", ".dylib", ".dll", ".wasm")
_CONFIG = re.compile(
    r".*\.index\.json|(\w+_)?config\.json|modules\.json|tokenizer\w*\.json|vocab\.(json|txt)|"
    r"merges\.txt|special_tokens_map\.json|added_tokens\.json"
)
_PROOF = (
    "{algorithm} finds damage, but whoever edits files can make new digests, too: compare the "
    "SHA-256 of shardmix.json with one that was noted elsewhere: {sha256}"
)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of a verification. Sizes in bytes."""

    output: str
    """The folder that was verified."""
    is_verified: bool
    """True if everything is as the merge wrote it."""
    problems: tuple[str, ...]
    """Problems, a line each."""
    num_files: int
    """Files with a digest."""
    bytes_read: int
    """Bytes read of them, and of the sources if it was recomputed."""
    digest: str
    """Digest of the files: xxh3, blake3 or sha256."""
    provenance_sha256: str
    """SHA-256 (hex) of shardmix.json, as `sha256sum` shows it."""
    proof: str
    """A sentence on what the digests can prove."""
    recomputed: bool
    """True if the weights were computed again from the sources, and compared byte for byte."""
    seconds: float
    """Time that it took."""
    peak_rss_bytes: int
    """Largest resident set of the process so far (VmHWM)."""


def verify(
    output: str | PathLike[str],
    *,
    recompute: bool = False,
    sources: Mapping[str, str | PathLike[str]] | None = None,
    max_memory: int | str | None = None,
    on_progress: OnProgress | None = None,
    cancel: threading.Event | None = None,
) -> VerifyReport:
    """Read all of an output again, and compare it with the digests in its shardmix.json.

    Args:
        output: a folder that a merge wrote.
        recompute: if the digests match, also read the sources again, merge them and compare every
            byte of weights.
        sources: paths of sources (number from 1, or name in shardmix.json → path) that are neither
            on the Hub, nor beside the output, nor recorded with their path.
        max_memory: bound on the process's peak resident memory while recomputing.
        on_progress: called about ten times a second with a `ProgressEvent`, on this thread.
        cancel: an event; once set, `MergeCancelled` is raised.

    Raises:
        ShardmixError: if it cannot be verified at all; problems are in the report.

    Example:
        >>> shardmix.verify("merged").is_verified
        True
    """
    started = time.perf_counter()
    if not recompute and (sources or max_memory is not None):
        option = "--source" if sources else "--max-memory"
        raise RecipeError(
            f"{option} is for recomputing", remedy="give --recompute (recompute=True), too"
        )
    folder = Path(output).expanduser()
    provenance, seal = read_provenance(folder)
    check_algorithm(provenance.digests.algorithm, is_choice=False)
    given = places_given(provenance, sources or {})
    teller = Teller(on_progress) if on_progress is not None else None
    problems, num_bytes = _check_digests(folder, provenance, teller, cancel)
    problems += _added_files(folder, provenance)
    is_recomputed = recompute and not problems
    if is_recomputed:
        problems, num_bytes_recomputed = recomputation.recompute(
            folder, provenance, given, max_memory, teller, cancel
        )
        num_bytes += num_bytes_recomputed
    elif recompute:
        problems.append(f"{folder}: was not recomputed, since its files are not what they were")
    if not seal.holds:
        problems.insert(0, f"{folder / PROVENANCE_NAME}: {EDITED}")
    if teller is not None:
        teller.end()
    return VerifyReport(
        output=str(folder),
        is_verified=not problems,
        problems=tuple(problems),
        num_files=len(provenance.digests.files),
        bytes_read=num_bytes,
        digest=provenance.digests.algorithm,
        provenance_sha256=seal.sha256,
        proof=_PROOF.format(algorithm=provenance.digests.algorithm, sha256=seal.sha256),
        recomputed=is_recomputed,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_resident_nbytes(),
    )


class _Reading:
    """The files that workers read, and the results so far."""

    def __init__(self, provenance: Provenance) -> None:
        files = provenance.digests.files
        self._started = time.perf_counter()
        self._nbytes = {name: record.bytes for name, record in files.items()}
        self._waiting = iter(sorted(files))
        self._lock = threading.Lock()
        self._is_stopped = False
        self._error: BaseException | None = None
        self._num_files = self._num_bytes_gone = 0
        self._problems: dict[str, str] = {}
        self.num_bytes = 0
        """Bytes read."""

    def next_file(self) -> str | None:
        """Return a file that no worker has, or None at the end or after `stop`."""
        with self._lock:
            return None if self._is_stopped else next(self._waiting, None)

    def count(self, num_bytes: int) -> None:
        """Count bytes read; raise `_Stopped` after `stop`."""
        if self._is_stopped:
            raise _Stopped
        with self._lock:
            self.num_bytes += num_bytes

    def file_done(self, name: str, problem: str | None, num_bytes: int) -> None:
        """Add the result of a file, of which `num_bytes` bytes were read."""
        with self._lock:
            self._num_files += 1
            self._num_bytes_gone += self._nbytes[name] - num_bytes
            if problem is not None:
                self._problems[name] = problem

    def stop(self, error: BaseException | None = None) -> None:
        """Make each worker stop at its next count; the first error is the one to raise."""
        self._is_stopped = True
        self._error = self._error or error

    def problems(self) -> list[str]:
        """Return the problems, by file; raise a worker's unexpected error."""
        if self._error is not None:
            raise self._error
        return [self._problems[name] for name in sorted(self._problems)]

    def event(self) -> ProgressEvent:
        """Return the progress; bytes that a file lacks count as done."""
        return ProgressEvent(
            num_bytes_done=self.num_bytes + self._num_bytes_gone,
            num_bytes_kept=0,
            num_bytes_total=sum(self._nbytes.values()),
            num_shards_done=self._num_files,
            num_shards_total=len(self._nbytes),
            seconds=time.perf_counter() - self._started,
            resident_nbytes=resident_nbytes(),
        )


class _Stopped(Exception):  # noqa: N818 - never seen by callers
    """Ends a worker whose result nobody wants any more."""


def _check_digests(
    folder: Path,
    provenance: Provenance,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> tuple[list[str], int]:
    """Return the problems of an output's files, and the number of bytes read."""
    reading = _Reading(provenance)
    num_bytes = sum(record.bytes for record in provenance.digests.files.values())
    is_kept = plan_cache_use(read_nbytes=num_bytes, write_nbytes=0, fsync=True).keeps_sources

    def check_files() -> None:
        try:
            while (name := reading.next_file()) is not None:
                _check_file(folder, name, provenance, reading, keep_cached=is_kept)
        except _Stopped:
            pass
        except BaseException as error:
            reading.stop(error)

    def report() -> None:
        if cancel is not None and cancel.is_set():
            raise MergeCancelled("the verification was cancelled")
        if on_progress is not None:
            on_progress(reading.event())

    with running(check_files, default_workers(), stop=reading.stop) as ends:
        for end in ends:
            while not end.wait(0.1):
                report()
        report()
    return reading.problems(), reading.num_bytes


def _check_file(
    folder: Path, name: str, provenance: Provenance, reading: _Reading, *, keep_cached: bool
) -> None:
    """Compare one file with its record, and store the problem, if any."""
    passed = PassedRanges([folder / name])
    position = 0

    def on_bytes(num_bytes: int) -> None:
        nonlocal position
        reading.count(num_bytes)
        if not keep_cached:
            passed.add(0, position, position + num_bytes)
        position += num_bytes

    problem = _file_problem(folder, name, provenance.digests, on_bytes)
    if not keep_cached and problem is None:
        passed.end()
    reading.file_done(name, problem, position)


def _file_problem(
    folder: Path, name: str, digests: Digests, on_bytes: Callable[[int], None]
) -> str | None:
    """Return the problem of one file, or None."""
    record, path = digests.files[name], folder / name
    try:
        refuse_link_outside(folder, path)
        with open_regular(path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes != record.bytes:
                return f"{path}: has {nbytes} bytes, not {record.bytes}"
            digest = file_digest(file.fileno(), digests.algorithm, on_bytes=on_bytes)
    except SourceError as error:
        return str(error)
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror or error})"
    if digest != record.digest:
        return f"{path}: its bytes are not those that the merge wrote"
    return None


def _added_files(folder: Path, provenance: Provenance) -> list[str]:
    """Return the files that the merge did not write, but a loader of models would read."""
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
    """Return True if a loader of models reads a file of this name, anywhere in the folder."""
    base = name.rpartition("/")[2].lower()
    is_data = base.endswith((*_WEIGHTS, *_CODE)) or ".so." in base or ".data-0" in base
    return is_data or _CONFIG.fullmatch(base) is not None or is_auxiliary_file(name)
