"""Two merges to one output, and merges that are told to stop.

The long form is `tests/faults/campaign.py races` and `signals`.
"""

import contextlib
import dataclasses
import os
import signal

import pytest

from tests.faults.faulty_cli import Fault
from tests.faults.merges import NEW, NONE, OLD, Variation, calls


@pytest.fixture
def held(bench):
    """A merge that waits in the midst of its work until a file is there."""
    gate = bench.folder / "gate"
    gate.unlink(missing_ok=True)
    merge = bench.merge(Variation(sharded=False))
    reached = bench.folder / "reached"
    reached.unlink(missing_ok=True)
    os.mkfifo(reached)
    running = merge.start(Fault(wait_for=str(gate), reached=str(reached)))
    with open(reached) as pipe:  # opens once the other end does
        pipe.read()
    yield merge, running, gate
    with contextlib.suppress(ProcessLookupError):
        running.kill()


def test_second_merge_is_refused(held):
    """A second merge to an output is refused, and names the first."""
    merge, running, gate = held
    second = merge.run()
    assert second.status == 1
    assert f"process {running.process} is at work on this output; wait for it" in second.stderr
    assert second.is_one_clear_line
    gate.touch()
    assert running.wait().status == 0
    assert merge.found == NEW


def test_killed_merges_lock_is_taken_over(held):
    """The lock of a killed merge is taken over."""
    merge, running, _ = held
    running.kill()
    assert running.wait().status == -signal.SIGKILL
    assert merge.trouble_after_end() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_cuts_nothing_short(held, number):
    """A second signal does not cut short what the first set off."""
    merge, running, gate = held
    running.kill(number)
    running.kill(number)
    gate.touch()
    done = running.wait()
    assert done.status == 128 + number
    assert done.is_one_clear_line, done.stderr
    assert merge.found == NONE
    assert merge.trouble_after_end() == ""


@pytest.mark.parametrize("seed", range(2))
def test_no_two_of_many_work_at_once(bench, seed):
    """Of many at once, never two are at work."""
    merge = bench.merge(Variation(overwrite=seed == 1, fsync=False))
    log = bench.folder / f"race-{seed}.log"
    running = [merge.start(Fault(log=str(log))) for _ in range(4)]
    ends = [each.wait() for each in running]
    assert any(end.status == 0 for end in ends)
    for end in ends:
        refused = "is at work on this output" in end.stderr or ": exists; " in end.stderr
        assert end.status == 0 or (end.status == 1 and refused and end.is_one_clear_line), end
    writers = [process for _, path, process in calls(log) if "/model/model" in path]
    in_turn = [process for i, process in enumerate(writers) if i == 0 or writers[i - 1] != process]
    assert len(in_turn) == len(set(in_turn))
    assert merge.found == NEW
    assert not merge.staging.exists()


def test_signal_waits_for_the_workers(bench):
    """A signal waits for the workers before their files are closed.

    Thread.join takes a running thread for ended when a signal interrupts it.
    """
    merge, log = bench.merge(Variation(sharded=False)), bench.folder / "interrupted.log"
    shard = str(merge.staging / "model" / "model.safetensors")
    fault = Fault(action="signal", number=signal.SIGINT, seconds_after_signal=0.3, log=str(log))
    done = merge.run(dataclasses.replace(fault, root=shard, at=3, operations=("pwrite", "close")))
    assert done.status == 130
    assert done.is_one_clear_line, done.stderr
    made = [operation for operation, *_ in calls(log)]
    assert made.index("pwrite, ended") < made.index("close")


@pytest.mark.parametrize(
    ("operation", "path", "finding", "is_new"),
    [
        ("mkdir", ".out.shardmix", "nothing was written", False),
        ("fsync", ".out.shardmix/model/model.safetensors", "goes on from there", False),
        ("write", ".out.shardmix/model/shardmix.json", "goes on from there", False),
        ("write", ".out.shardmix/placing", "goes on from there", False),
        ("unlink", ".out.shardmix/model/merges.txt", "out is complete and in place", True),
        ("unlink", ".out.shardmix/journal", "out is complete and in place", True),
    ],
)
def test_signal_says_how_to_go_on(bench, operation, path, finding, is_new):
    """A signal says what there is, and how to go on."""
    merge = bench.merge(Variation(overwrite=True, sharded=False))
    # Known by its path, not its number: threads make their calls in no fixed order.
    root = str(merge.staging.parent / path)
    fault = Fault(at=1, action="signal", number=signal.SIGTERM, root=root)
    done = merge.run(dataclasses.replace(fault, operations=(operation,)))
    assert done.status == 143, done
    assert done.is_one_clear_line, done.stderr
    assert finding in done.stderr
    assert merge.found == (NEW if is_new else OLD)
    assert merge.trouble_after_end() == ""
