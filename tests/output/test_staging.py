import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from shardmix.errors import OutputError
from shardmix.output.hidden_folder import LockedFolder
from shardmix.output.staging import open_staging, settle
from shardmix.output.swap import Swap
from tests.support.models import random_model, save_model


@contextmanager
def staged_folder(output, *, overwrite, fsync):
    with open_staging(output) as staging:
        yield staging.folder.path
        staging.place(overwrite=overwrite, fsync=fsync)


def model(folder, seed=1):
    return save_model(folder, random_model(seed))


def fill(folder, text="new"):
    (folder / "model.safetensors").write_text(text)


def test_output_appears_whole_at_the_end(tmp_path):
    """The output appears whole, as the last step."""
    out = tmp_path / "deep" / "out"
    with staged_folder(out, overwrite=False, fsync=True) as folder:
        fill(folder)
        assert not out.exists()
        # Beside the output: the same file system, so that a rename is possible.
        assert folder.parent.parent == out.parent
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path, error):
    with (
        pytest.raises(error),
        staged_folder(tmp_path / "out", overwrite=False, fsync=False) as folder,
    ):
        fill(folder)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_folders_close(tmp_path, monkeypatch):
    """An interrupt after all is in place says so, also if it comes as the last folder closes."""
    close = LockedFolder.close

    def close_and_stop(self):
        close(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(LockedFolder, "close", close_and_stop)
    with (
        pytest.raises(KeyboardInterrupt, match="out is complete and in place"),
        staged_folder(tmp_path / "out", overwrite=False, fsync=False) as folder,
    ):
        fill(folder)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_keeps_the_old_till_then(tmp_path, monkeypatch, exchange):
    """Overwriting keeps the old one until the new is whole."""
    if not exchange:  # a system without renameat2

        class NoLibc:
            def __init__(self, *_, **__):
                pass

        monkeypatch.setattr(ctypes, "CDLL", NoLibc)
    out = model(tmp_path / "out")
    old = (out / "model.safetensors").read_bytes()
    with staged_folder(out, overwrite=True, fsync=False) as folder:
        fill(folder)
        assert (out / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_text() == "new"


def test_failed_overwrite_leaves_the_old_one(tmp_path):
    out = model(tmp_path / "out")
    old = (out / "model.safetensors").read_bytes()
    with (
        pytest.raises(RuntimeError),
        staged_folder(out, overwrite=True, fsync=False) as folder,
    ):
        fill(folder)
        raise RuntimeError
    assert (out / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_that_appears_is_left_alone(tmp_path):
    """An output that appears meanwhile is left alone."""
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="exists"),
        staged_folder(out, overwrite=False, fsync=False) as folder,
    ):
        fill(folder)
        out.mkdir()
    assert list(out.iterdir()) == []


def test_other_file_there_is_not_overwritten(tmp_path):
    """Something else that appears is not overwritten."""
    out = model(tmp_path / "out")
    with (
        pytest.raises(OutputError, match="besides a model"),
        staged_folder(out, overwrite=True, fsync=False) as folder,
    ):
        fill(folder)
        (out / "checkpoint-1").mkdir()
        (out / "checkpoint-1" / "trainer_state.json").write_text("precious")
    assert (out / "checkpoint-1" / "trainer_state.json").read_text() == "precious"


def test_failed_swap_puts_the_old_one_back(tmp_path, monkeypatch):
    """A failed swap in two steps puts the old one back."""
    out = model(tmp_path / "out")
    old = (out / "model.safetensors").read_bytes()

    class NoLibc:
        def __init__(self, *_, **__):
            pass

    monkeypatch.setattr(ctypes, "CDLL", NoLibc)
    rename = os.rename

    def failing_rename(source, target, **folders):
        if (source, target) == ("model", "out"):
            raise OSError(5, "Input/output error")
        rename(source, target, **folders)

    monkeypatch.setattr(os, "rename", failing_rename)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        staged_folder(out, overwrite=True, fsync=False) as folder,
    ):
        fill(folder)
    assert (out / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_next_run_finds_what_was_kept(tmp_path):
    """What is worth keeping is found by the next run."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), open_staging(out) as staging:
        fill(staging.folder.path, "half")
        (staging.path / "journal").write_text("half of it is done")
        staging.is_worth_keeping = True
        raise RuntimeError
    assert not out.exists()
    with open_staging(out) as staging:
        assert (staging.folder.path / "model.safetensors").read_text() == "half"
        fill(staging.folder.path, "whole")
        staging.place(overwrite=False, fsync=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_text() == "whole"


def test_a_restart_throws_away_what_is_kept(tmp_path):
    with open_staging(tmp_path / "out") as staging:
        fill(staging.folder.path)
        (staging.path / "journal").write_text("journal")
        staging.is_worth_keeping = True
    with open_staging(tmp_path / "out", restart=True) as staging:
        assert list(staging.folder.path.iterdir()) == []
        assert not (staging.path / "journal").exists()
    assert list(tmp_path.iterdir()) == []


def test_refusal_leaves_anothers_files(tmp_path):
    """What another merge has left is not removed by a refusal."""
    with open_staging(tmp_path / "out") as staging:
        (staging.path / "journal").write_text("another merge's")
        staging.is_worth_keeping = True
    with pytest.raises(OutputError), open_staging(tmp_path / "out") as staging:
        raise OutputError("it is another merge's")
    assert (staging.path / "journal").read_text() == "another merge's"


def test_folders_made_for_an_output_go(tmp_path):
    """Folders made for an output go with it."""
    with pytest.raises(RuntimeError), open_staging(tmp_path / "deep" / "er" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_second_run_is_refused_by_name(tmp_path):
    """A second run is refused, naming the first."""
    with (
        open_staging(tmp_path / "out"),
        pytest.raises(OutputError, match=rf"process {os.getpid()} \(this one\) is at work"),
        open_staging(tmp_path / "out"),
    ):
        pass
    with open_staging(tmp_path / "out"):  # and not for longer than that
        pass


def test_a_dead_process_lock_is_taken_over(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from shardmix.output.staging import open_staging\n"
        "manager = open_staging(Path(sys.argv[1])); manager.__enter__()\n"
        "print(os.getpid(), flush=True); os.kill(os.getpid(), 9)"
    )
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, check=False)
    assert died.returncode == -9
    lock = tmp_path / ".out.shardmix" / "lock"
    assert lock.read_text() == died.stdout.decode().strip()  # it is there, and still names the dead
    with open_staging(out):
        assert lock.read_text() == str(os.getpid())


class Killed(BaseException):
    """Stands for a kill: nothing is tidied up after it."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_at_exchange_leaves_old_or_new(tmp_path, monkeypatch, moment):
    """A kill around the exchange leaves the old or the new."""
    out = model(tmp_path / "out")
    old = (out / "model.safetensors").read_bytes()
    exchange = Swap.exchange

    def killed(*args):
        if moment == "after":
            exchange(*args)
        raise Killed

    monkeypatch.setattr(Swap, "exchange", killed)
    with pytest.raises(Killed), open_staging(out) as staging:
        fill(staging.folder.path)
        staging.is_worth_keeping = True
        staging.place(overwrite=True, fsync=False)
    monkeypatch.undo()
    settle(out)
    if moment == "after":
        assert (out / "model.safetensors").read_text() == "new"
        assert not (staging.folder.path / "model.safetensors").exists()  # the old one is gone
    else:
        assert (out / "model.safetensors").read_bytes() == old
        assert (staging.folder.path / "model.safetensors").read_text() == "new"


def test_kill_between_steps_restores_the_old(tmp_path, monkeypatch):
    """A kill between the two steps of a swap brings the old one back.

    Where a system cannot exchange two folders in one step.
    """
    out = model(tmp_path / "out")
    old = (out / "model.safetensors").read_bytes()

    def killed(staging, _old):
        staging.parent.move("out", staging.hidden, "old")
        raise Killed

    monkeypatch.setattr(Swap, "exchange", killed)
    with pytest.raises(Killed), open_staging(out) as staging:
        fill(staging.folder.path)
        staging.is_worth_keeping = True
        staging.place(overwrite=True, fsync=False)
    assert not out.exists()
    settle(out)
    assert (out / "model.safetensors").read_bytes() == old
    assert (staging.folder.path / "model.safetensors").read_text() == "new"


@pytest.mark.parametrize("name", [".out.shardmix", ".out.shardmix/lock"])
def test_link_for_staging_folder_is_refused(tmp_path, name):
    """A link where the staging folder should be is refused."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError), open_staging(tmp_path / "out"):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_data_is_synced_before_the_rename(tmp_path, monkeypatch, overwrite):
    """Data is on disk before the rename, and the rename before success."""
    out = tmp_path / "out"
    if overwrite:
        model(out)
    forced = []
    fsync = os.fsync

    def noted(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        weights = out / "model.safetensors"
        is_placed = weights.exists() and weights.read_bytes() == b"new"
        forced.append((os.path.relpath(path, tmp_path), is_placed))
        fsync(descriptor)

    with open_staging(out) as staging:
        (staging.folder.path / "deep").mkdir()
        (staging.folder.path / "deep" / "file").write_text("x")
        (staging.folder.path / "model.safetensors").write_text("new")
        monkeypatch.setattr(os, "fsync", noted)
        staging.place(overwrite=overwrite, fsync=True)
        monkeypatch.undo()
    before = {path for path, is_placed in forced if not is_placed}
    after = {path for path, is_placed in forced if is_placed}
    new = ".out.shardmix/model"
    assert before >= {f"{new}/model.safetensors", f"{new}/deep/file", f"{new}/deep", new}
    assert before >= {".out.shardmix", ".out.shardmix/placing"}
    assert after == {".", ".out.shardmix"}


def test_child_does_not_keep_the_lock(tmp_path):
    """A child process does not keep the lock.

    As data loaders' and others' that were forked during a merge, and live on.
    """
    with open_staging(tmp_path / "out"):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with open_staging(tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_onlooker_does_not_refuse_a_merge(tmp_path, monkeypatch):
    """Who only looks whose it is does not refuse a merge."""
    with open_staging(tmp_path / "out") as staging:
        staging.is_worth_keeping = True
    looking = os.open(staging.path / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
    with open_staging(tmp_path / "out"):
        pass
    os.close(looking)


@pytest.mark.parametrize("left", [b"", b"\0\0\0\0", b"noise", b"12" + bytes(4096)])
def test_spoilt_marker_still_means_placed(tmp_path, left):
    """A marker that a power cut spoilt still tells that the output is in place."""
    output = tmp_path / "out"
    with open_staging(output) as staging:
        (staging.folder.path / "config.json").write_text("{}")
        staging.place(overwrite=False, fsync=False)
    # As if the run had been killed before it tidied up.
    staging.path.mkdir()
    (staging.path / "placing").write_bytes(left)
    (staging.path / "journal").write_text("{}\n")
    settle(output)
    assert (output / "config.json").exists()
    assert not staging.path.exists()


def test_impossible_lock_leaves_nothing(tmp_path, monkeypatch):
    """A lock that cannot be made leaves nothing."""
    opened = os.open

    def full(path, *arguments, **options):
        if path == "lock":
            raise OSError(28, "No space left on device")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OutputError, match="disk is full"), open_staging(tmp_path / "new" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_old_model_is_no_part_of_the_new(tmp_path):
    """What is put aside meanwhile takes nothing of the room that the merge has been told of."""
    with open_staging(tmp_path / "out") as staging:
        before = staging.nbytes
        (staging.path / "model" / "half").write_bytes(bytes(8192))
        assert staging.nbytes >= before + 8192
        there = staging.nbytes
        (staging.path / "old").mkdir()
        (staging.path / "old" / "whole").write_bytes(bytes(8192))
        assert staging.nbytes == there
