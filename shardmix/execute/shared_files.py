"""The files of a pass that several workers of a process use."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from shardmix.execute.executor import Task


class Closable(Protocol):
    """An open file."""

    def close(self) -> None:
        """Close the file. Closing it twice does nothing."""


F = TypeVar("F", bound=Closable)


class SharedFiles(Generic[F]):
    """Files that are opened with their first task. The count of leaves reveals their last task."""

    def __init__(self, open_file: Callable[[int], F], num_leaves: Callable[[int], int]) -> None:
        """Take two functions of a file's number."""
        self._open_file = open_file
        self._num_leaves = num_leaves
        self._lock = threading.Lock()
        self._files: dict[int, F] = {}
        self._num_leaves_done: Counter[int] = Counter()

    def __getitem__(self, number: int) -> F:
        with self._lock:
            if number not in self._files:
                self._files[number] = self._open_file(number)
            return self._files[number]

    def task_done(self, task: Task) -> bool:
        """Count a task as done; return True if it was the last one of its file."""
        with self._lock:
            self._num_leaves_done[task.file] += task.stop_leaf - task.first_leaf
            return self._num_leaves_done[task.file] == self._num_leaves(task.file)

    def forget(self, number: int) -> None:
        """Close a file once all its tasks are done."""
        with self._lock:
            file = self._files.pop(number)
        file.close()

    def close(self) -> None:
        """Close all files that are still open."""
        for file in self._files.values():
            file.close()
