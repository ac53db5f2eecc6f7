"""The executor on threads of this process.

Workers stay with their file, since a file system lets one thread at a time write to a file. A
worker without a file of its own helps another with theirs. Results wait in a queue until the caller
looks, ten times a second. In between the executor yields None, so that the caller can report
progress while a slow disk keeps all workers waiting.
"""

import bisect
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence

from shardmix.execute.executor import Job, OpenedPass, T, Task, TaskResult
from shardmix.system.threads import running

WAIT_SECONDS = 0.1
"""Longest wait for results at a time."""


class ThreadExecutor:
    """Runs tasks on threads; see `Executor`."""

    def run(
        self, job: Job[T], tasks: Sequence[Task], cancel: threading.Event
    ) -> Generator[TaskResult[T] | None, None, None]:
        """Do every task once; yield each result, and None about ten times a second."""
        queue = TaskQueue(tasks, is_in_order=job.is_in_order)
        # A deque needs no lock. Results wait there, so the caller's thread wakes ten times a
        # second and not for each of some thousand tasks.
        ended: deque[TaskResult[T]] = deque()
        with job.work.opened() as opened:

            def work() -> None:
                try:
                    _work_through(opened, queue, ended)
                except BaseException as error:
                    # The error outlives the pass; the buffers in its frames must not.
                    traceback.clear_frames(error.__traceback__)
                    queue.stop(error)

            with running(work, job.num_workers, stop=queue.stop) as ends:
                yield None
                for end in ends:
                    while not end.is_set():
                        if cancel.is_set():
                            queue.stop()
                        end.wait(WAIT_SECONDS)
                        yield from _taken(ended)
                        yield None
                yield from _taken(ended)
        if queue.error is not None:
            raise queue.error


class TaskQueue:
    """Gives each task to one worker."""

    def __init__(self, tasks: Sequence[Task], *, is_in_order: bool) -> None:
        self._tasks = tasks
        self._is_in_order = is_in_order
        self._lock = threading.Lock()
        self._num_begun = 0
        """Number of tasks in files that some worker has started."""
        self._left: dict[int, Iterator[int]] = {}
        """Started file → its remaining tasks, as indexes."""
        self._is_stopped = False
        self.error: BaseException | None = None
        """The first error, or None if there was none before the workers were stopped."""

    def next_task(self, mine: int | None) -> Task | None:
        """Return a task that no worker has, or None at the end or after `stop`.

        Prefers the worker's current file, then a file nobody has started, then any file.
        """
        with self._lock:
            if self._is_stopped:
                return None
            number = next(self._candidates(mine), None)
            return None if number is None else self._tasks[number]

    def _candidates(self, mine: int | None) -> Iterator[int]:
        if mine is not None:
            yield from self._left[mine]
        while self._num_begun < len(self._tasks):
            yield from self._begun()
        if not self._is_in_order:
            for left in self._left.values():
                yield from left

    def _begun(self) -> Iterator[int]:
        """Start the next file, and return its tasks."""
        first, file = self._num_begun, self._tasks[self._num_begun].file
        stop = bisect.bisect_right(self._tasks, file, lo=first, key=lambda task: task.file)
        self._num_begun = stop
        self._left[file] = left = iter(range(first, stop))
        return left

    def is_stopped(self) -> bool:
        """Return True if the workers must stop."""
        return self._is_stopped

    def stop(self, error: BaseException | None = None) -> None:
        """Give out no more tasks. Later errors are ignored."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped, self.error = True, error


def _work_through(opened: OpenedPass[T], queue: TaskQueue, ended: "deque[TaskResult[T]]") -> None:
    """Do one worker's part."""
    with opened.worker() as worker:
        mine = None
        while (task := queue.next_task(mine)) is not None:
            mine = task.file
            result = worker.run(task, queue.is_stopped)
            if result is None:
                return
            ended.append(result)


def _taken(ended: "deque[TaskResult[T]]") -> Iterator[TaskResult[T]]:
    """Remove and yield all results so far."""
    for _ in range(len(ended)):
        yield ended.popleft()
