"""A disk that is full is called by its name; given room, the same merge goes on.

The long form is `tests/faults/campaign.py disk`.
"""

import pytest

from tests.faults.faulty_cli import Fault
from tests.faults.merges import NONE, Variation, resize
from tests.support.small_disks import disk_or_skip


@pytest.fixture
def disk(bench, request):
    """A disk of a few bytes, mounted for one test."""
    folder = bench.folder / f"disk-{abs(hash(request.node.name))}"
    with disk_or_skip(folder, 400_000) as place:
        yield place


@pytest.mark.parametrize("nbytes", [16_384, 300_000, 825_000], ids=["lock", "weights", "card"])
def test_full_disk_is_named_then_resumed(bench, disk, nbytes):
    """A disk that runs full is named, and with more room the merge goes on."""
    resize(disk, nbytes)
    merge = bench.merge(Variation(sharded=nbytes > 500_000), disk)
    # It looks roomy beforehand: somebody else fills it meanwhile.
    done = merge.run(Fault(is_blind=True))
    assert done.status == 1
    assert done.is_one_clear_line, done
    assert "the disk is full (No space left on device); free some space" in done.stderr
    kept = f"are done and kept in {merge.staging}: the same merge goes on from there"
    assert (kept in done.stderr) == (nbytes > 200_000)
    assert merge.found == NONE
    resize(disk, 4_000_000)
    assert merge.trouble_after_end() == ""


def test_resume_on_small_disk_says_its_state(bench, disk):
    """On too small a disk, a merge that goes on says what is kept."""
    merge = bench.merge(Variation(), disk)
    merge.run(Fault(is_blind=True))
    done = merge.run()
    assert done.status == 1
    assert "needs 8" in done.stderr
    assert "goes on from there" in done.stderr
    resize(disk, 4_000_000)
    assert merge.trouble_after_end() == ""
