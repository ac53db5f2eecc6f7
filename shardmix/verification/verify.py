"""`verify`: checks that an output is still what the merge wrote, and what its sources give.

Reads everything once, in bounded memory; changes nothing.
"""

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from shardmix.conventions.file_kinds import is_auxiliary_file
from shardmix.errors import RecipeError
from shardmix.execute.digest_pass import Digested, digest_job
from shardmix.execute.executor import TaskResult
from shardmix.execute.jobs import run_job
from shardmix.execute.progress import OnProgress, Teller
from shardmix.output.provenance import (
    EDITED,
    NOT_DIGESTED,
    PROVENANCE_NAME,
    Provenance,
    read_provenance,
)
from shardmix.system.hashing import check_algorithm
from shardmix.system.memory import peak_resident_nbytes
from shardmix.verification import recomputation
from shardmix.verification.recomputation import locations_given

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
    """Algorithm of the files' digests: one of `hashing.ALGORITHMS`."""
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
    given = locations_given(provenance, sources or {})
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


def _check_digests(
    folder: Path,
    provenance: Provenance,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> tuple[list[str], int]:
    """Return what is wrong with the files of an output, and how many bytes were read."""
    records = provenance.digests.files
    names = sorted(records)
    problems: list[tuple[str, str]] = []
    num_bytes_read = 0

    def take(result: TaskResult[Digested]) -> None:
        nonlocal num_bytes_read
        num_bytes_read += result.value.num_bytes_read
        if not result.is_file_end:
            return
        name = names[result.task.file]
        problem = result.value.problem
        if not problem and result.value.file_digest != records[name].digest:
            problem = f"{folder / name}: its bytes are not those that the merge wrote"
        if problem:
            problems.append((name, problem))

    file_nbytes = {name: record.bytes for name, record in records.items()}
    job, tasks = digest_job(folder, file_nbytes, provenance.digests.algorithm)
    run_job(
        job,
        tasks,
        take,
        num_bytes=sum(file_nbytes.values()),
        num_files=len(names),
        on_progress=on_progress,
        cancel=cancel,
        what="the verification",
    )
    return [problem for _, problem in sorted(problems)], num_bytes_read


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
