"""What executors in this process must do besides: buffers, errors and threads can be watched there.

A new one is a line in `EXECUTORS` here and in `test_executor_contract`.
"""

import gc
import threading
import weakref
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest

from shardmix.execute.executor import Job, TaskResult
from shardmix.execute.tasks import Tasks
from shardmix.execute.thread_executor import ThreadExecutor
from shardmix.system.hashing import LEAF_NBYTES
from tests.support.executors import SerialExecutor

EXECUTORS = [ThreadExecutor, SerialExecutor]


@pytest.fixture(params=EXECUTORS, ids=lambda kind: kind.__name__)
def executor(request):
    return request.param()


@dataclass
class Noted:
    """A pass that notes its tasks, and does with each what it is told to."""

    act: object = lambda task, is_stopped: None

    def __post_init__(self):
        self.opened_now = self.num_workers = 0
        self.done = []
        self.buffers = []

    @contextmanager
    def opened(self):
        self.opened_now += 1
        try:
            yield self
        finally:
            self.opened_now -= 1

    @contextmanager
    def worker(self):
        self.num_workers += 1
        try:
            yield NotedWorker(self)
        finally:
            self.num_workers -= 1

    @property
    def is_closed(self):
        return self.opened_now == self.num_workers == 0


class Buffer(bytearray):
    """Memory that can be watched."""


class NotedWorker:
    def __init__(self, work):
        self.work = work
        self.buffer = Buffer(1000)
        work.buffers.append(weakref.ref(self.buffer))

    def run(self, task, is_stopped):
        if self.work.act(task, is_stopped) == "stopped":
            return None
        self.work.done.append(task)
        return TaskResult(task, 10, task.first_leaf)


def run_all(executor, job, tasks, cancel=None):
    """Return all results."""
    with closing(executor.run(job, tasks, cancel or threading.Event())) as results:
        told = list(results)
    return [result for result in told if result is not None]


TASKS = Tasks([n * LEAF_NBYTES for n in (3, 1, 0, 40, 2)], leaves_per_task=2)


@pytest.mark.parametrize("num_workers", [1, 2, 7])
@pytest.mark.parametrize("is_in_order", [False, True])
def test_each_task_once(executor, num_workers, is_in_order):
    work = Noted()
    results = run_all(executor, Job(work, num_workers, is_in_order), TASKS)
    assert len(TASKS) == 2 + 1 + 1 + 20 + 1
    assert Counter(work.done) == Counter(result.task for result in results) == Counter(TASKS)
    assert all(result.value == result.task.first_leaf for result in results)
    assert work.is_closed


def test_no_task_at_all(executor):
    work = Noted()
    assert run_all(executor, Job(work, 2), []) == []
    assert work.is_closed


def test_order_within_a_file(executor):
    """One worker has a file from end to end if its digest needs that."""
    workers = {}
    lock = threading.Lock()

    def note(task, _):
        with lock:
            workers.setdefault(task.file, []).append((threading.get_ident(), task.first_leaf))

    run_all(executor, Job(Noted(note), 3, is_in_order=True), TASKS)
    for seen in workers.values():
        assert len({worker for worker, _ in seen}) == 1
        assert seen == sorted(seen)


def test_none_comes_first(executor):
    """The caller's thread has something else to do once the workers have started."""
    work = Noted()
    with closing(executor.run(Job(work, 2), TASKS, threading.Event())) as results:
        assert next(results) is None
        assert work.opened_now == 1


def test_none_comes_while_a_task_lasts(monkeypatch):
    """About ten times a second; of executors that wait for workers."""
    monkeypatch.setattr("shardmix.execute.thread_executor.WAIT_SECONDS", 0.001)
    enough = threading.Event()
    work = Noted(lambda task, is_stopped: enough.wait(60) and None)
    with closing(ThreadExecutor().run(Job(work, 1), TASKS[:1], threading.Event())) as results:
        for _ in range(5):
            assert next(results) is None
        enough.set()
        assert len([result for result in results if result is not None]) == 1


def test_cancelled_in_the_middle(executor):
    """A task that comes to its end all the same counts."""
    cancel = threading.Event()

    def cancel_and_wait(task, is_stopped):
        if task.first_leaf == 4:
            cancel.set()
            while not is_stopped():
                cancel.wait(0.001)

    work = Noted(cancel_and_wait)
    results = run_all(executor, Job(work, 1), TASKS, cancel)
    assert [result.task for result in results] == work.done == TASKS[:7]
    assert work.is_closed


def test_a_long_task_is_told_to_stop(executor):
    """It returns None then, and there is no result of it."""
    cancel = threading.Event()
    waiting = threading.Event()

    def wait(task, is_stopped):
        cancel.set()
        while not is_stopped():
            waiting.wait(0.001)
        return "stopped"

    work = Noted(wait)
    assert run_all(executor, Job(work, 2), TASKS, cancel) == []
    assert work.done == []
    assert work.is_closed


def test_closing_stops_the_workers(executor):
    work = Noted()
    results = executor.run(Job(work, 2), TASKS, threading.Event())
    next(results)
    results.close()
    assert work.is_closed


def test_the_callers_error_stops_the_workers(executor):
    work = Noted()
    with (
        pytest.raises(KeyboardInterrupt),
        closing(executor.run(Job(work, 2), TASKS, threading.Event())) as results,
    ):
        for result in results:
            if result is not None:
                raise KeyboardInterrupt
    assert work.is_closed


class FlawError(Exception):
    pass


@pytest.mark.parametrize("num_workers", [1, 4])
def test_an_error_stops_the_others(executor, num_workers):
    """The first one is raised; what had ended before is yielded."""

    def fail(task, _):
        if task.file == 3 and task.first_leaf >= 4:
            raise FlawError(task.first_leaf)

    work, told = Noted(fail), []
    with pytest.raises(FlawError) as caught:
        for result in executor.run(Job(work, num_workers), TASKS, threading.Event()):
            told += [] if result is None else [result]
    assert caught.value.args[0] >= 4
    assert Counter(result.task for result in told) == Counter(work.done)
    assert len(work.done) < len(TASKS)
    assert work.is_closed


@pytest.mark.parametrize("error", [FlawError, MemoryError, KeyboardInterrupt])
def test_an_error_holds_no_buffers(executor, error):
    """Else a GPU's memory would be held for as long as the error is."""

    def fail(task, _):
        raise error

    work = Noted(fail)
    caught = None
    try:
        run_all(executor, Job(work, 2), TASKS)
    except error as raised:
        caught = raised
    assert type(caught) is error
    if isinstance(executor, ThreadExecutor):
        assert caught.__traceback__ is not None
    else:
        caught = None  # its frames are the caller's own
    gc.collect()
    assert work.buffers
    assert not any(buffer() for buffer in work.buffers)


def test_an_error_while_opening(executor):
    class Unopened(Noted):
        @contextmanager
        def opened(self):
            raise FlawError
            yield

    with pytest.raises(FlawError):
        run_all(executor, Job(Unopened(), 2), TASKS)


def test_an_error_while_a_worker_is_made(executor):
    class Poor(Noted):
        @contextmanager
        def worker(self):
            raise FlawError
            yield

    with pytest.raises(FlawError):
        run_all(executor, Job(Poor(), 2), TASKS)
