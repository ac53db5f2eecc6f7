"""The seam between what is done with files and where it is done.

A pass says what: write a merge's files, compare them, digest them. An executor says where: on
threads of this process, or on other machines. Each is one file, and neither knows the others.

    caller ── Job, tasks ──▶ Executor ── Task ──▶ Worker (of an opened Pass)
       ◀────── results ─────────┘ ◀─ TaskResult ─────┘

The caller adds results up, tells progress and cancels.
"""

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

IsStopped = Callable[[], bool]
"""Tells a worker that nobody wants its result any more."""


@dataclass(frozen=True, slots=True)
class Task:
    """A range of whole leaves of one file, for one worker."""

    file: int
    """Number of the file. What it counts is the pass's: mostly `MergePlan.shards`."""
    first_leaf: int
    """First leaf."""
    stop_leaf: int
    """One past the last leaf."""


@dataclass(frozen=True, slots=True)
class TaskResult(Generic[T_co]):
    """What came of one task, once all of it is done."""

    task: Task
    """The task."""
    num_bytes: int
    """Bytes to count as done, in the unit in which the pass's progress is told."""
    value: T_co
    """What the pass has to tell of it. Must pickle."""
    num_bytes_kept: int = 0
    """Of these bytes, those that an earlier run had done."""
    is_file_end: bool = False
    """Whether all of the file's tasks are done with it."""


class Worker(Protocol[T_co]):
    """One thread's part of a pass, with buffers of its own."""

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[T_co] | None:
        """Do a task; return None if it was stopped before its end."""


class OpenedPass(Protocol[T_co]):
    """A pass at work in one process: what its workers share there."""

    def worker(self) -> AbstractContextManager[Worker[T_co]]:
        """Make a worker. Entered and left on the worker's own thread."""


class Pass(Protocol[T_co]):
    """What is done with tasks. Pickles; a copy in another process does the same there."""

    def opened(self) -> AbstractContextManager[OpenedPass[T_co]]:
        """Open in this process what the workers share, and close it at the block's end."""


@dataclass(frozen=True, slots=True)
class Job(Generic[T_co]):
    """All that a worker anywhere needs. Pickles."""

    work: Pass[T_co]
    """What is done with each task; it holds the plan."""
    num_workers: int
    """Workers in each process."""
    is_in_order: bool = False
    """Whether one worker must do all tasks of a file, in their order: for digests that can only be
    computed from end to end."""


class Executor(Protocol):
    """Runs tasks somewhere."""

    def run(
        self, job: Job[T], tasks: Sequence[Task], cancel: threading.Event
    ) -> Generator[TaskResult[T] | None, None, None]:
        """Do every task once; yield each result, and None about ten times a second.

        None means that all that has ended by now was yielded. The first one comes when the workers
        have started. Once `cancel` is set, the results end early. Closing the generator stops the
        workers. They have ended, and their files are closed, when it has ended.

        Args:
            job: the pass and its workers.
            tasks: in the order of their files. All tasks of a file are done in one process, since
                its workers share what they know of it. May be long, so it is not copied.
            cancel: set by the caller, from any thread.

        Raises:
            Exception: the first error of any worker, which stops the others. What had ended before
                is yielded first.
        """
