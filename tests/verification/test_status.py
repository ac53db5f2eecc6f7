"""`status`: what was left in the moment of putting in place, and what strangers put there."""

import os

import pytest

import shardmix
from shardmix.errors import OutputError
from shardmix.output.hidden_folder import LockedFolder
from shardmix.output.swap import Swap
from shardmix.system.held_folder import open_folder
from shardmix.system.locks import lock_owner
from tests.support.cut_off import cut_off, large_models
from tests.support.models import random_model, save_model


class Killed(BaseException):
    """Ends a run without its clean-up."""


def kill_while_placing(out, monkeypatch, *, after_exchange):
    """Merge over a model, and leave what a kill just behind or amid the exchange leaves."""
    models = large_models(out.parent)
    save_model(out, random_model(1))
    place, clear = Swap.exchange, Swap.clear

    def exchange(staging, old):
        if after_exchange:
            place(staging, old)
        else:
            staging.parent.move("out", staging.hidden, "old")
        raise Killed

    monkeypatch.setattr(Swap, "exchange", exchange)
    monkeypatch.setattr(Swap, "clear", lambda _folder: None)
    monkeypatch.setattr(LockedFolder, "remove_empty", lambda _opened: None)
    with pytest.raises(Killed):
        shardmix.merge(models, out, overwrite=True)
    monkeypatch.undo()
    assert clear is Swap.clear
    return models


def test_finished_exchange_is_not_resumed(tmp_path, monkeypatch):
    """What is left of a finished exchange is not to be gone on with."""
    out = tmp_path / "out"
    models = kill_while_placing(out, monkeypatch, after_exchange=True)
    report = shardmix.status(out)
    assert report.complete is not None
    assert report.unfinished.is_left_over
    assert "the next merge to it tidies up" in report.unfinished.note
    shardmix.merge(models, out, overwrite=True)
    assert shardmix.status(out).unfinished is None


def test_misplaced_old_model_is_told(tmp_path, monkeypatch):
    """An old model out of its place is told of."""
    out = tmp_path / "out"
    models = kill_while_placing(out, monkeypatch, after_exchange=False)
    report = shardmix.status(out)
    assert not report.exists
    assert not report.unfinished.is_left_over
    assert f"the old model lies in {tmp_path / '.out.shardmix' / 'old'}" in report.unfinished.note
    shardmix.merge(models, out, overwrite=True)
    assert shardmix.status(out).unfinished is None


def test_the_root_is_no_output(tmp_path):
    model = save_model(tmp_path / "m", random_model(1))
    with pytest.raises(OutputError, match="/: is the root of the file system"):
        shardmix.status("/")
    with pytest.raises(OutputError, match="/: is the root of the file system"):
        shardmix.merge([(model, 1)], "/", overwrite=True)


def test_deeply_nested_line_ends_the_journal(tmp_path):
    """A line of deep nesting is the journal's end."""
    models = large_models(tmp_path)
    cut_off(models, tmp_path / "out")
    with (tmp_path / ".out.shardmix" / "journal").open("ab") as file:
        file.write(b'[0,6,"",[{},{}],' + b"[" * 100_000 + b"\n")
    assert shardmix.status(tmp_path / "out").unfinished.bytes_done == 3 * 4 * 2**20


@pytest.mark.parametrize("name", ["lock", "placing"])
def test_pipes_are_not_waited_for(tmp_path, name):
    staging = tmp_path / ".out.shardmix"
    staging.mkdir()
    os.mkfifo(staging / name)
    assert shardmix.status(tmp_path / "out").unfinished.process is None


def test_unreadable_lock_is_somebodys(tmp_path, monkeypatch):
    """A lock that cannot be read is somebody's."""
    (tmp_path / "lock").touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with open_folder(tmp_path) as folder:
        assert lock_owner(folder) is None
        monkeypatch.setattr(os, "open", refuse)
        assert lock_owner(folder) == 0
