"""The seam between the work on files and the place where it is done.

A pass is the work: writing a merge's files, comparing them, digesting them. An executor is the
place: threads of this process, or other machines. Each is one file, and neither knows the others.

    caller ── Job, tasks ──▶ Executor ── Task ──▶ Worker (of an opened Pass)
       ◀────── results ─────────┘ ◀─ TaskResult ─────┘

The caller adds results up, reports progress and cancels. All tasks of a file stay in one process,
so that no two machines write one file. A `Job` pickles; its copy does the same in another process.

Workers in the caller's process write each leaf's claim into the journal themselves. If claims
waited in results, `kill -9` would cost more work, and the caller would wake for every 4 MiB. From
other processes claims travel in the results, and the caller writes them. A worker that finds NaN
under `--on-nonfinite error` ends the merge at once; the caller would see it a tenth of a second
later.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

IsStopped = Callable[[], bool]
"""Returns True once nobody wants a worker's result any more."""


@dataclass(frozen=True, slots=True)
class Task:
    """A range of whole leaves of one file, for one worker."""

    file: int
    """Number of the file, by the pass's count: mostly `MergePlan.shards`."""
    first_leaf: int
    """First leaf."""
    stop_leaf: int
    """One past the last leaf."""


@dataclass(frozen=True, slots=True)
class TaskResult(Generic[T_co]):
    """The result of one task, once all of it is done."""

    task: Task
    """The task."""
    num_bytes: int
    """Bytes to count as done, in the unit of the pass's progress."""
    value: T_co
    """The pass's own result. Must pickle."""
    num_bytes_kept: int = 0
    """Part of these bytes that an earlier merge had done."""
    num_bytes_read: int = 0
    """Bytes that were read from sources' files for it."""
    is_file_end: bool = False
    """True if this completes the last task of the file."""


class Worker(Protocol[T_co]):
    """One thread's part of a pass, with buffers of its own."""

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[T_co] | None:
        """Do a task; return None if it was stopped before its end."""


class OpenedPass(Protocol[T_co]):
    """A pass in one process, with the files that its workers share there."""

    def worker(self) -> AbstractContextManager[Worker[T_co]]:
        """Return a worker; the worker's own thread enters and leaves it."""


class Pass(Protocol[T_co]):
    """The work on each task. Pickles; a copy in another process does the same there."""

    def opened(self) -> AbstractContextManager[OpenedPass[T_co]]:
        """Open in this process the files that the workers share; close them at the block's end."""


@dataclass(frozen=True, slots=True)
class Job(Generic[T_co]):
    """All that a worker anywhere needs. Pickles."""

    work: Pass[T_co]
    """The work on each task; it holds the plan."""
    num_workers: int
    """Workers in each process."""
    is_in_order: bool = False
    """True if one worker must do all tasks of a file, in their order: for digests that need the
    file from end to end."""


class Executor(Protocol):
    """Runs tasks somewhere."""

    def run(
        self, job: Job[T], tasks: Sequence[Task], cancel: threading.Event
    ) -> Generator[TaskResult[T] | None, None, None]:
        """Do every task once; yield each result, and None about ten times a second.

        None means that all results so far were yielded. The first one comes when the workers have
        started. Once `cancel` is set, the results end early. Closing the generator stops the
        workers. When it has ended, they have ended too, and their files are closed.

        Args:
            job: the pass and its workers.
            tasks: in the order of their files. All tasks of a file are done in one process, since
                its workers share the open file. May be long, so it is not copied.
            cancel: set by the caller, from any thread.

        Raises:
            Exception: the first error of any worker, which stops the others. Results up to then are
                yielded first.
        """
