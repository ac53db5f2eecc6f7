"""The pass that digests files of a folder as they are now."""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shardmix.errors import SourceError
from shardmix.execute.executor import IsStopped, Job, Task, TaskResult
from shardmix.execute.shared_files import SharedFiles
from shardmix.execute.tasks import Tasks
from shardmix.plan.memory_budget import default_workers
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.files import open_regular, refuse_link_outside
from shardmix.system.hashing import (
    LEAF_NBYTES,
    READ_NBYTES,
    FileDigest,
    is_sequential,
    num_leaves,
)
from shardmix.system.page_cache import PassedRanges, plan_cache_use

_LEAVES_PER_TASK = 4


@dataclass(frozen=True, slots=True)
class ExpectedFile:
    """A file to digest."""

    name: str
    """Path within the folder, with `/`."""
    nbytes: int
    """Size that it must have."""
    read_nbytes: int
    """Bytes to read: all of them, or none if it is missing or has another size."""


@dataclass(frozen=True, slots=True)
class Digested:
    """The result of one task."""

    num_bytes_read: int
    """Number of bytes read."""
    file_digest: str = ""
    """Digest (hex) of the file, if it is complete with this task and could be read."""
    problem: str = ""
    """Reason that the file cannot be digested; empty if it can."""


@dataclass(frozen=True, slots=True)
class Digest:
    """Digests files. The size comes first: a file of another size is not read."""

    folder: Path
    """Folder that they are in."""
    files: tuple[ExpectedFile, ...]
    """The files; tasks name them by index."""
    algorithm: str
    """One of `hashing.ALGORITHMS`."""
    keep_cached: bool
    """True if the files' pages may stay in the system's page cache."""

    @contextmanager
    def opened(self) -> Iterator["_Digesting"]:
        """Open the files that the workers of this process share."""
        with closing(_Digesting(self)) as digesting:
            yield digesting


def digest_job(
    folder: Path, file_nbytes: Mapping[str, int], algorithm: str
) -> tuple[Job[Digested], Tasks]:
    """Return the job that digests files, and its tasks. Files are numbered by name.

    Args:
        folder: the folder that they are in.
        file_nbytes: name of each file, with `/` → the size that it must have.
        algorithm: one of `hashing.ALGORITHMS`.
    """
    # A hostile record may name any size, so a missing file has no tasks.
    files = tuple(
        ExpectedFile(name, nbytes, nbytes if _has_size(folder / name, nbytes) else 0)
        for name, nbytes in sorted(file_nbytes.items())
    )
    read_nbytes = sum(file.read_nbytes for file in files)
    cache_use = plan_cache_use(read_nbytes=read_nbytes, write_nbytes=0, fsync=True)
    job = Job(
        Digest(folder, files, algorithm, keep_cached=cache_use.keeps_sources),
        num_workers=default_workers(),
        is_in_order=is_sequential(algorithm),
    )
    tasks = Tasks((file.read_nbytes for file in files), leaves_per_task=_LEAVES_PER_TASK)
    return job, tasks


def _has_size(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size == nbytes
    except (OSError, ValueError):
        return False


class _Digesting:
    """A digesting pass at work in one process."""

    def __init__(self, work: Digest) -> None:
        self._files = SharedFiles(
            lambda number: _File(work, number),
            lambda number: num_leaves(work.files[number].read_nbytes),
        )

    @contextmanager
    def worker(self) -> Iterator["_Digester"]:
        yield _Digester(self._files)

    def close(self) -> None:
        self._files.close()


class _Digester:
    """One worker."""

    def __init__(self, files: SharedFiles["_File"]) -> None:
        self._files = files
        self._buffer = buffer_for_reading(READ_NBYTES)

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[Digested] | None:
        """Read a task's leaves."""
        file = self._files[task.file]
        num_bytes_read = 0
        for num_bytes in file.read(task, self._buffer):
            num_bytes_read += num_bytes
            if is_stopped():
                return None
        is_file_end = self._files.task_done(task)
        digest = ""
        if is_file_end:
            digest = file.digest()
            self._files.forget(task.file)
        return TaskResult(
            task=task,
            # What a file lacks counts as done, since nothing is left to read.
            num_bytes=file.nbytes_of(task),
            value=Digested(num_bytes_read, digest, file.problem),
            is_file_end=is_file_end,
        )


class _File:
    """A file that workers are at."""

    def __init__(self, work: Digest, number: int) -> None:
        self._expected = expected = work.files[number]
        self._path = path = work.folder / expected.name
        self._passed = None if work.keep_cached else PassedRanges([path])
        self._file: BinaryIO | None = None
        self.problem = ""
        with self._problems_noted():
            refuse_link_outside(work.folder, path)
            self._file = open_regular(path)
            nbytes = os.fstat(self._file.fileno()).st_size
            if nbytes != expected.nbytes:
                self.problem = f"{path}: has {nbytes} bytes, not {expected.nbytes}"
            elif nbytes != expected.read_nbytes:
                self.problem = f"{path}: has changed while it was verified"
        self._digest = FileDigest(work.algorithm, expected.read_nbytes)

    def read(self, task: Task, buffer: memoryview) -> Iterator[int]:
        """Read a range of leaves; yield the number of bytes of each piece."""
        if self._file is None or self.problem:
            return
        position = start = task.first_leaf * LEAF_NBYTES
        with self._problems_noted():
            pieces = self._digest.read(self._file.fileno(), task.first_leaf, task.stop_leaf, buffer)
            for num_bytes in pieces:
                position += num_bytes
                yield num_bytes
        if self._passed is not None:
            self._passed.add(0, start, position)

    def nbytes_of(self, task: Task) -> int:
        """Return how many bytes of the file are done with a task."""
        if task.stop_leaf == 0:
            return self._expected.nbytes
        stop = min(task.stop_leaf * LEAF_NBYTES, self._expected.nbytes)
        return stop - task.first_leaf * LEAF_NBYTES

    def digest(self) -> str:
        """Return the digest (hex) of the file, all of which was read; empty if it could not be."""
        return "" if self.problem else self._digest.hex()

    def close(self) -> None:
        """Close it."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
            if self._passed is not None and not self.problem:
                self._passed.end()

    @contextmanager
    def _problems_noted(self) -> Iterator[None]:
        try:
            yield
        except SourceError as error:
            self.problem = str(error)
        except FileNotFoundError:
            self.problem = f"{self._path}: is missing"
        except OSError as error:
            self.problem = f"{self._path}: cannot be read ({error.strerror or error})"
