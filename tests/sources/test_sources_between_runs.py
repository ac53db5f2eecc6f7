"""A source that changes while a merge waits to be gone on with, or while it is at work.

The long form is `tests/faults/campaign.py sources`.
"""

import os
import signal

import pytest

from tests.faults.faulty_cli import Fault
from tests.faults.merges import NONE, UNHARMED, Variation

NOBODY = 65534


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def cut_short(path):
    os.truncate(path, path.stat().st_size - 2)


def change_header(path):
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))


def remove(path):
    path.unlink()


@pytest.fixture
def source(bench):
    """A weight file of the second model, put back afterwards; its file system knows that it was."""
    path = bench.source("b", True) / "model-00001-of-00004.safetensors"
    content, status = path.read_bytes(), path.stat()

    def restore():
        path.write_bytes(content)
        path.chmod(0o644)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    yield path, restore
    restore()


def begun(bench):
    merge = bench.merge(Variation(fsync=False))
    done = merge.run(Fault(at=20, action="kill", operations=("pwrite",)))
    assert done.status == -signal.SIGKILL
    assert merge.num_claims > 0
    return merge


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (touch, "has changed since (time of modification)"),
        (change_header, "has changed since (header)"),
        (cut_short, "describes 200120 bytes but the file has 200118"),
        (remove, "is not in the folder"),
    ],
)
def test_change_between_runs_is_refused(bench, source, change, finding):
    """Between two runs, it is named and refused."""
    path, restore = source
    merge = begun(bench)
    change(path)
    done = merge.run()
    assert done.status == 1, done
    assert done.is_one_clear_line
    assert path.name in done.stderr
    assert finding in done.stderr
    assert merge.found == NONE
    restore()
    assert "written to or replaced" in merge.run().stderr
    assert merge.trouble_after_end("--restart") == ""


@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_change_during_a_merge_is_refused(bench, source, io):
    """While a merge is at work, it is named, and nothing appears."""
    path, restore = source
    merge = bench.merge(Variation(io=io, fsync=False))
    gate, reached = bench.folder / f"gate-{io}", bench.folder / f"reached-{io}"
    os.mkfifo(reached)
    running = merge.start(Fault(wait_for=str(gate), reached=str(reached)))
    with open(reached) as pipe:
        pipe.read()
    touch(path)  # which is open by now: it is looked at by its path in the end
    gate.touch()
    done = running.wait()
    assert done.status == 1
    assert done.is_one_clear_line
    assert f"{path}: has changed since its header was read" in done.stderr
    assert merge.found == NONE
    restore()
    assert merge.trouble_after_end("--restart") == ""


def test_source_made_unreadable_is_named(bench, source):
    """One that may not be read any more is named."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not read a file")
    path, restore = source
    merge = bench.merge(Variation(fsync=False))
    os.chmod(merge.place, 0o777)
    for folder in (bench.source("a", True), bench.source("b", True)):
        for file in folder.iterdir():
            file.chmod(0o644)
    begin = Fault(at=20, action="kill", operations=("pwrite",))
    assert merge.run(begin, user=NOBODY).status == -signal.SIGKILL
    path.chmod(0)
    done = merge.run(user=NOBODY)
    assert done.status == 1
    assert done.is_one_clear_line, done
    assert str(path) in done.stderr
    assert "Permission denied" in done.stderr
    assert merge.found == NONE
    restore()
    assert merge.run(UNHARMED, "--restart", user=NOBODY).status == 0


def test_output_in_closed_folder_is_refused(bench):
    """An output in a folder that may not be entered is refused."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody who may not enter a folder")
    merge = bench.merge(Variation())
    os.chmod(merge.place, 0o700)
    done = merge.run(user=NOBODY)
    assert done.status == 1
    assert done.is_one_clear_line, done
    assert "Permission denied" in done.stderr
