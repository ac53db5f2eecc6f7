"""A merge that is killed at any moment leaves nothing half-done, and can be gone on with.

The long form is `tests/faults/campaign.py kills`, `points` and `losses`.
"""

import dataclasses
import random
import signal

import pytest

from tests.faults.faulty_cli import Fault
from tests.faults.merges import NEW, NONE, OLD, Variation, calls_of, lose_writes

CHANGING = (
    *("open", "write", "pwrite", "sendfile", "truncate", "ftruncate", "fsync", "mkdir"),
    *("rename", "renameat2", "unlink", "rmdir"),
)
OVERWRITING = Variation(overwrite=True, sharded=False, fsync=False)


def killed(merge, fault, **changed):
    """Run a merge to the call at which it kills itself."""
    done = merge.run(dataclasses.replace(fault, action="kill", operations=CHANGING), **changed)
    assert done.status == -signal.SIGKILL, done
    assert merge.trouble() == ""


@pytest.mark.parametrize(
    ("variation", "how"),
    [
        (Variation(sharded=False, fsync=False), {}),
        (OVERWRITING, {}),
        (OVERWRITING, {"has_no_exchange": True}),
    ],
    ids=["new", "exchanged", "two renames"],
)
def test_kill_while_placing_loses_nothing(bench, variation, how):
    """Killed at any step of the placing, nothing is lost.

    From the marker on, before each call that changes what is there.
    """
    made = calls_of(bench.merge(variation), operations=CHANGING, **how)
    first = [call[:2] for call in made].index(("write", ".out.shardmix/placing")) + 1
    steps = [
        at
        for at, (operation, path, _) in enumerate(made, 1)
        if at >= first
        and operation not in ("open", "fsync")
        and not path.endswith(".json")  # of the old model's files one or two will do
    ]
    assert len(steps) >= 4
    founds = set()
    if how:
        steps = steps[:6]  # what comes then is as where there is an exchange
    for at in steps:
        merge = bench.merge(variation)
        killed(merge, Fault(at=at, **how))
        founds.add(merge.found)
        assert merge.trouble_after_end() == "", f"killed at {made[at - 1]}"
    before = {OLD} if variation.overwrite else {NONE}
    # Between the two renames of a system that has no exchange there is nothing for a moment.
    assert founds - {NONE} | before == before | {NEW}


@pytest.mark.parametrize(
    ("variation", "changes"),
    [
        (Variation(), {"io": "mmap", "backend": "llvm", "workers": 2}),
        (Variation(sharded=False, digest="sha256", backend="llvm"), {"workers": 2}),
        (Variation(overwrite=True, digest="blake3", workers=2), {"backend": "llvm"}),
    ],
    ids=["xxh3", "sha256", "blake3"],
)
def test_repeated_kills_leave_no_trace(bench, variation, changes):
    """Killed again and again, it ends as if nothing had been.

    Each time it is another way to run it; what was found in the data is told in the end.
    """
    merge, claims = bench.merge(variation), []
    for at, chunk_nbytes in [(60, 64 * 1024), (40, 2**20), (50, 128 * 1024)]:
        killed(merge, Fault(at=at, chunk_nbytes=chunk_nbytes), **changes)
        claims.append(merge.num_claims)
    assert 0 < claims[0] <= claims[1] <= claims[2]
    assert bench.wanted(variation).anomalies["nonfinite"]
    assert merge.trouble_after_end() == ""


@pytest.mark.parametrize("seed", range(5))
def test_power_cut_costs_no_bytes(bench, seed):
    """Writes that a power cut has taken back cost work, and not bytes."""
    chance = random.Random(seed)
    merge = bench.merge(Variation(sharded=seed % 2 == 0, digest=("xxh3", "sha256")[seed % 3 == 0]))
    killed(merge, Fault(at=chance.randrange(60, 90)))
    done = [lose_writes(merge, chance) for _ in range(2)]
    assert merge.trouble() == ""
    assert merge.trouble_after_end() == "", done


def test_lost_journal_mixes_no_files(bench):
    """Of a merge whose journal is lost, no file gets into another.

    Of the same name, but of more and of other files.
    """
    merge = bench.merge(Variation(sharded=True))
    killed(merge, Fault(at=90))
    (merge.staging / "journal").write_bytes(b"")
    single = bench.merge(Variation(sharded=False), merge.place)
    assert single.trouble_after_end() == ""


def test_killed_clean_up_is_not_resumed(bench):
    """What a killed clean-up has left of the old model is not gone on with."""
    merge = bench.merge(OVERWRITING)
    made = calls_of(bench.merge(OVERWRITING), operations=CHANGING)
    at = [path for _, path, _ in made].index(".out.shardmix/model/merges.txt") + 1
    killed(merge, Fault(at=at))
    assert merge.found == NEW
    assert (merge.staging / "model" / "merges.txt").exists()
    assert merge.trouble_after_end() == ""
