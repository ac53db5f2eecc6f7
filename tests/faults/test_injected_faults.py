"""Whatever call fails: one clear line, nothing half-done, and the same merge goes on.

The long form is `tests/faults/campaign.py injected`.
"""

import dataclasses
import errno

import pytest

from tests.faults.faulty_cli import Fault
from tests.faults.merges import NEW, Variation, calls_of
from tests.support.sampling import every_nth

NEW_OUTPUT = Variation(sharded=False, fsync=True)
OVERWRITING = Variation(overwrite=True, sharded=False)
SHARD = ".out.shardmix/model/model.safetensors"
JOURNAL = ".out.shardmix/journal"
MODEL = ".out.shardmix/model"
MARKER = ".out.shardmix/placing"


def nth(made, operation, path, number=-1):
    """Return which call that is: by default, the last of its kind."""
    return [at for at, call in enumerate(made, 1) if call[:2] == [operation, path]][number]


@pytest.fixture(scope="module")
def made(bench):
    """The calls of a merge that nothing disturbs."""
    return {
        variation: [list(call) for call in calls_of(bench.merge(variation))]
        for variation in (NEW_OUTPUT, OVERWRITING)
    }


@pytest.mark.parametrize(
    ("operation", "path", "number", "error", "finding"),
    [
        ("stat", JOURNAL, 0, errno.EACCES, "cannot be used (Permission denied)"),
        ("stat", ".", 2, errno.EIO, "Input/output error"),
        ("open", ".", 0, errno.EACCES, "Permission denied"),
        ("open", ".out.shardmix", 0, errno.EIO, "cannot be made (Input/output error)"),
        ("mkdir", ".out.shardmix", 0, errno.EACCES, "cannot be made (Permission denied)"),
        ("flock", ".out.shardmix/lock", 0, errno.EIO, "cannot be made (Input/output error)"),
        ("open", JOURNAL, 0, errno.ENOSPC, "the disk is full"),
        ("write", JOURNAL, 4, errno.EIO, "journal: cannot be written (Input/output error); "),
        ("statvfs", ".", 0, errno.EIO, "the free space of its disk cannot be read"),
        ("truncate", SHARD, 0, errno.ENOSPC, "the disk is full"),
        ("pwrite", SHARD, 9, errno.EIO, "cannot be written (Input/output error); "),
        ("fsync", SHARD, 0, errno.EIO, "cannot be written (Input/output error); "),
        ("close", SHARD, 0, errno.EIO, "cannot be written (Input/output error); "),
        ("write", ".out.shardmix/model/README.md", -1, errno.ENOSPC, "the disk is full"),
        ("close", ".out.shardmix/model/shardmix.json", 0, errno.EIO, "shardmix.json: cannot be"),
        (
            "scandir",
            MODEL,
            -3,
            errno.EACCES,
            "shardmix.json: cannot be written (Permission denied)",
        ),
        ("scandir", MODEL, -1, errno.EACCES, "cannot be finished (Permission denied)"),
        ("write", MARKER, -1, errno.ENOSPC, "the disk is full"),
        (
            "fsync",
            MODEL,
            -1,
            errno.EIO,
            "cannot be finished (Input/output error); ",
        ),
        (
            "rename",
            MODEL,
            -1,
            errno.EIO,
            "cannot be finished (Input/output error); ",
        ),
    ],
)
def test_a_call_that_fails_is_one_clear_line(bench, made, operation, path, number, error, finding):
    merge = bench.merge(NEW_OUTPUT)
    fault = Fault(at=nth(made[NEW_OUTPUT], operation, path, number))
    if path == JOURNAL or path.startswith(".out.shardmix/model/"):
        # By its own count: what is written while workers merge has no place among all calls.
        own = [call for call in made[NEW_OUTPUT] if call[:2] == [operation, path]]
        at = number % len(own) + 1
        fault = Fault(root=str(merge.place / path), operations=(operation,), at=at)
    done = merge.run(dataclasses.replace(fault, action="error", number=error))
    assert done.status == 1, done
    assert done.is_one_clear_line, done.stderr
    assert finding in done.stderr
    kept = "are done and kept in" in done.stderr
    assert kept == (merge.num_claims > 0)
    assert merge.trouble() == ""
    assert merge.trouble_after_end() == ""


@pytest.mark.parametrize("variation", [NEW_OUTPUT, OVERWRITING])
def test_disk_that_stays_away_is_named(bench, made, variation):
    """If no file can be looked at any more, the error names the first, not one that follows."""
    looks = [at for at, call in enumerate(made[variation], start=1) if call[0] == "stat"]
    ends = []
    for at in every_nth(looks, 6):
        merge = bench.merge(variation)
        lost = Fault(at=at, action="error", number=errno.EIO, is_lasting=True)
        done = merge.run(lost)
        ends.append(done.status)
        if done.status:
            assert done.is_one_clear_line, done.stderr
            assert str(merge.place) in done.stderr
            assert not (merge.found == NEW and "goes on from there" in done.stderr), done.stderr
        assert merge.trouble() == ""
        merge.remove()
    assert ends.count(1) > len(ends) // 2


@pytest.mark.parametrize(
    ("variation", "operation", "path"),
    [
        (NEW_OUTPUT, "fsync", "."),
        (OVERWRITING, "fsync", ".out.shardmix"),
    ],
)
def test_unconfirmed_placing_is_said(bench, made, variation, operation, path):
    """If the disk does not confirm what is in place, that is said."""
    merge = bench.merge(variation)
    at = nth(made[variation], operation, path)
    done = merge.run(Fault(at=at, action="error", number=errno.EIO))
    assert done.status == 1
    assert "is complete and in place, but the disk does not confirm it" in done.stderr
    assert "goes on" not in done.stderr
    assert merge.found == NEW
    assert not merge.staging.exists()


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("close", JOURNAL),
        ("close", ".out.shardmix/lock"),
        ("unlink", ".out.shardmix/model/merges.txt"),
        ("unlink", MARKER),
        ("rmdir", ".out.shardmix"),
    ],
)
def test_late_failure_is_made_up_for(bench, made, operation, path):
    """What fails once the output is in place is made up for by the next run."""
    merge = bench.merge(OVERWRITING)
    at = nth(made[OVERWRITING], operation, path)
    done = merge.run(Fault(at=at, action="error", number=errno.EIO))
    assert done.status == 0, done
    assert merge.found == NEW
    assert merge.trouble_after_end() == ""


def test_failed_exchange_leaves_old_model(bench, made):
    """A failed exchange leaves the old model."""
    merge = bench.merge(OVERWRITING)
    at = nth(made[OVERWRITING], "renameat2", MODEL)
    done = merge.run(Fault(at=at, action="error", number=errno.EIO))
    assert "cannot be finished (Input/output error); " in done.stderr
    assert merge.trouble_after_end() == ""


def test_system_without_locks_will_do(bench, made):
    """A system that knows no locks and no exchange will do."""
    merge = bench.merge(OVERWRITING)
    at = nth(made[OVERWRITING], "flock", ".out.shardmix/lock", 0)
    fault = Fault(at=at, action="error", number=errno.ENOLCK, has_no_exchange=True)
    assert merge.run(fault).status == 0
    assert merge.found == NEW


@pytest.mark.parametrize(
    "fault",
    [Fault(action="short"), Fault(alarm_seconds=0.001)],
    ids=["short reads and writes", "interrupted calls"],
)
def test_partial_calls_are_made_again(bench, fault):
    """Calls that do only a part, or are interrupted, are made again."""
    merge = bench.merge(Variation(sharded=False, digest="sha256"))
    merge.run(Fault(at=15, action="kill", operations=("pwrite", "write", "fsync")))
    assert merge.num_claims > 0
    done = merge.run(fault)
    assert done.status == 0, done
    assert merge.found == NEW


def test_unreadable_source_is_named(bench):
    """A source that cannot be read is named."""
    merge = bench.merge(NEW_OUTPUT)
    source = bench.source("b", False)
    fault = Fault(at=3, action="error", number=errno.EIO, root=str(source), operations=("preadv",))
    done = merge.run(fault)
    assert done.status == 1
    assert f"{source}/model.safetensors: reading failed (Input/output error)" in done.stderr
    assert merge.trouble_after_end() == ""


def test_missing_auxiliary_file_is_named(bench):
    """An auxiliary file that is gone when it is to be copied is named.

    It is opened first to be held against the other model's.
    """
    merge = bench.merge(NEW_OUTPUT)
    source = bench.source("a", False) / "tokenizer.json"
    fault = Fault(at=2, action="error", number=errno.ENOENT, root=str(source), operations=("open",))
    done = merge.run(fault)
    assert f"{source}: cannot be read" in done.stderr
    assert merge.trouble_after_end() == ""
