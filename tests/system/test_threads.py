"""Threads that end with the block that started them."""

import threading
from contextlib import contextmanager

import pytest

from shardmix.system import threads
from shardmix.system.threads import running


@contextmanager
def no_thread_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def test_tasks_run_and_end():
    """Each event is set at its thread's end."""
    done = []
    with no_thread_left(), running(lambda: done.append(1), 3, stop=lambda: None) as ends:
        for end in ends:
            assert end.wait(60)
    assert done == [1, 1, 1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_stops_and_waits(error):
    stopped = threading.Event()
    ended = []

    def task():
        stopped.wait(60)
        ended.append(1)

    with no_thread_left(), pytest.raises(error), running(task, 2, stop=stopped.set):
        raise error
    assert ended == [1, 1]


def test_a_second_interrupt_changes_nothing(monkeypatch):
    """It comes while the first one's end is waited for."""
    stopped = threading.Event()
    ended = []

    def task():
        stopped.wait(60)
        ended.append(1)

    wait, stop = threading.Event.wait, stopped.set
    interrupts = iter([KeyboardInterrupt, KeyboardInterrupt])

    def interrupted_wait(event, *args):
        if threading.current_thread() is threading.main_thread():
            for interrupt in interrupts:
                raise interrupt
        return wait(event, *args)

    calls = []

    def stop_interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        stop()
        monkeypatch.setattr(threading.Event, "wait", interrupted_wait)

    first = pytest.raises(RuntimeError, match="the first")
    with no_thread_left(), first, running(task, 2, stop=stop_interrupted):
        raise RuntimeError("the first")
    assert ended == [1, 1]
    assert list(interrupts) == []


def test_a_start_that_is_interrupted(monkeypatch):
    """Threads that were not started are not waited for; one that was ends by itself."""
    start = threading.Thread.start
    started = []

    def interrupted_start(thread):
        start(thread)
        started.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    with pytest.raises(KeyboardInterrupt), running(lambda: None, 2, stop=lambda: None):
        pass
    (thread,) = started
    thread.join(60)
    assert not thread.is_alive()


def test_the_thread_itself_is_waited_for(monkeypatch):
    """Not just its task: at its end it is still there for a moment."""
    joined = threading.Event()
    run, join = threads._Member._run, threading.Thread.join

    def lingering_run(member):
        run(member)
        joined.wait(60)

    def noted_join(thread, *args):
        joined.set()
        join(thread, *args)

    monkeypatch.setattr(threads._Member, "_run", lingering_run)
    monkeypatch.setattr(threading.Thread, "join", noted_join)
    try:
        with no_thread_left(), running(lambda: None, 2, stop=lambda: None):
            pass
    finally:
        joined.set()
