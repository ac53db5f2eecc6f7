import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.scoring.lockstep import Lockstep


class Recorder:
    """A stage that writes down what is served, and gives back what it was brought."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def serve(self, payloads):
        self.log.append(self.name)
        return [("served", payload) for payload in payloads]

    def release(self):
        self.log.append(f"-{self.name}")


def run(routes):
    """Run one pass a route, each a list of stage names; return the log and the results."""
    log = []
    lockstep = Lockstep()
    stages = {name: Recorder(name, log) for route in routes for name in route}

    def follow(number, route):
        for name in route:
            log.append((number, name))
            lockstep.pass_through(stages[name])
        return number

    results = lockstep.run([lambda n=n, r=r: follow(n, r) for n, r in enumerate(routes)])
    return log, results


def test_stage_is_served_once_for_all_passes():
    """Each stage is served once for all passes."""
    log, results = run(["abc"] * 4)
    assert [entry for entry in log if isinstance(entry, str)] == ["a", "-a", "b", "-b", "c", "-c"]
    assert results == [0, 1, 2, 3]


def test_revisited_stage_is_served_again():
    """A stage that all come back to is served again for all."""
    log, _ = run(["aba"] * 3)
    assert [entry for entry in log if isinstance(entry, str)] == ["a", "-a", "b", "-b", "a", "-a"]


def test_stage_called_twice_is_served_once():
    """Calling a stage twice in a row serves it once."""
    log, _ = run(["aab"] * 2)
    assert [entry for entry in log if isinstance(entry, str)] == ["a", "-a", "b", "-b"]


@given(st.lists(st.text("abcd", max_size=6), min_size=1, max_size=6))
def test_passes_of_any_routes_end(routes):
    """Passes of any routes come to their ends."""
    log, results = run(routes)
    assert results == list(range(len(routes)))
    for number, route in enumerate(routes):
        assert [entry[1] for entry in log if entry[0] == number] == list(route)
    served = [entry for entry in log if isinstance(entry, str)]
    assert served[::2] == [entry.removeprefix("-") for entry in served[1::2]]


def test_passes_values_are_served():
    """What a pass brings is served and comes back."""
    lockstep = Lockstep()
    stage = Recorder("a", [])
    results = lockstep.run([lambda n=n: lockstep.arrive(stage, n) for n in range(3)])
    assert results == [("served", 0), ("served", 1), ("served", 2)]


def test_error_of_one_pass_ends_all():
    """An error of one pass ends all and unwinds them."""
    lockstep = Lockstep()
    log = []
    stage = Recorder("a", log)

    def fail():
        lockstep.pass_through(stage)
        raise ValueError("one")

    def wait():
        try:
            lockstep.pass_through(stage)
            lockstep.pass_through(Recorder("b", log))
        finally:
            log.append("unwound")

    with pytest.raises(ValueError, match="one"):
        lockstep.run([wait, fail, wait])
    assert log == ["a", "-a", "unwound", "unwound"]
