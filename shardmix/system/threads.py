"""Threads that end with the block that started them, in every case; values that they make once."""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


def made_once(make: Callable[..., T]) -> Callable[..., T]:
    """Return a function that keeps its results by its arguments.

    `functools.cache` may call it twice if two threads ask at once; here the second one waits.
    """
    lock, kept = threading.Lock(), functools.cache(make)

    @functools.wraps(make)
    def ask(*arguments: object) -> T:
        with lock:
            return kept(*arguments)

    return ask


@contextmanager
def running(
    task: Callable[[], None], count: int, *, stop: Callable[[], None]
) -> Iterator[Sequence[threading.Event]]:
    """Run a task on several threads; none of them is left when the block has ended.

    Yields an event for each thread, set at its end. At the end of the block, also by an exception,
    `stop` is called, which must make the tasks return soon. A second interrupt changes nothing. The
    task must not raise.
    """
    crew = [_Member(task, number) for number in range(count)]
    try:
        for member in crew:
            member.thread.start()
        yield [member.end for member in crew]
    finally:
        _uninterrupted(stop)
        for member in crew:
            _uninterrupted(member.dismiss)


class _Member:
    """One thread, which begins its task only if it has not been dismissed before."""

    def __init__(self, task: Callable[[], None], number: int) -> None:
        self._task = task
        self._lock = threading.Lock()
        self._has_begun = self._is_dismissed = False
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"shardmix-{number}")

    def _run(self) -> None:
        with self._lock:
            if self._is_dismissed:
                return
            self._has_begun = True
        try:
            self._task()
        finally:
            self.end.set()

    def dismiss(self) -> None:
        """Wait for the thread's end; a thread interrupted during its start does nothing."""
        with self._lock:
            self._is_dismissed = True
        if self._has_begun:
            # `Thread.join` only afterwards: interrupted by a signal, it may take a running
            # thread for an ended one (CPython 3.10 to 3.12), whose files would then be closed
            # during use.
            self.end.wait()
            self.thread.join()


def _uninterrupted(function: Callable[[], None]) -> None:
    """Call a function, again if an interrupt cuts it short."""
    while True:
        with suppress(KeyboardInterrupt):
            return function()


MOST_WORKERS = 256
"""Upper limit of threads; more only get in each other's way."""


def num_cores() -> int:
    """Return the number of cores that the process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores or 1
