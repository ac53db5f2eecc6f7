import threading
from types import SimpleNamespace

import pytest

from shardmix.system import timer
from shardmix.system.timer import DIGEST, NO_CLOCK, OTHER, READ, STAGES, WRITE, StageClock


@pytest.fixture
def now(monkeypatch):
    """A time that stands still until a test moves it."""
    moment = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(timer.time, "perf_counter", lambda: moment.seconds)
    return moment


def test_lap_is_the_time_since_the_last_one(now):
    clock = StageClock()
    clock.start()
    for stage, seconds, nbytes in ((READ, 2, 11), (WRITE, 3, 13), (READ, 5, 17), (OTHER, 7, 0)):
        now.seconds += seconds
        clock.lap(stage, nbytes)
    assert dict(zip(STAGES, clock.seconds(), strict=True)) == {
        **{"read": 7, "reduce": 0, "write": 3, "digest": 0, "finish": 0, "other": 7}
    }
    assert dict(zip(STAGES, clock.nbytes(), strict=True)) == {
        **{"read": 28, "reduce": 0, "write": 13, "digest": 0, "finish": 0, "other": 0}
    }
    assert clock.last_lap() == 1017


def test_laps_of_threads_are_added_up(now):
    """Each thread has its own laps, and all are added up."""
    clock = StageClock()
    clock.start()

    def other_thread():
        now.seconds += 100  # before it starts: nobody's but the first thread's
        clock.start()
        now.seconds += 2
        clock.lap(DIGEST, 3)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    now.seconds += 5
    clock.lap(DIGEST, 7)
    assert clock.seconds()[DIGEST] == 2 + (100 + 2 + 5)
    assert clock.nbytes()[DIGEST] == 10


def test_untold_clock_knows_no_last_lap():
    """A clock that nobody told anything knows no last lap."""
    assert StageClock().last_lap() is None
    NO_CLOCK.lap(READ, 1)  # also where no thread has started it
