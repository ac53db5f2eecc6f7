"""The files of a pass that several workers of a process are at."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from shardmix.execute.executor import Task


class Closable(Protocol):
    """An open file."""

    def close(self) -> None:
        """Close it. Closing it twice does nothing."""


F = TypeVar("F", bound=Closable)


class SharedFiles(Generic[F]):
    """Files that are opened with their first task. Their last task is known by its leaves."""

    def __init__(self, open_file: Callable[[int], F], num_leaves: Callable[[int], int]) -> None:
        """Both functions are given a file's number."""
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
        """Count a task as done; return whether its file was the last to wait for it."""
        with self._lock:
            self._num_leaves_done[task.file] += task.stop_leaf - task.first_leaf
            return self._num_leaves_done[task.file] == self._num_leaves(task.file)

    def forget(self, number: int) -> None:
        """Close a file that is done with."""
        with self._lock:
            file = self._files.pop(number)
        file.close()

    def close(self) -> None:
        """Close what is still open."""
        for file in self._files.values():
            file.close()
