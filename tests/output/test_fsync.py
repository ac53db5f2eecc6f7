"""What is told to be done is on the disk: files before the rename, folders after it."""

import os

import pytest

import shardmix
from shardmix.execute import merge
from shardmix.system.held_folder import HeldFolder
from tests.support.cut_off import large_models


@pytest.fixture
def synced(monkeypatch):
    """Collect the inodes that were forced to disk."""
    inodes, fsync = [], os.fsync

    def noted(descriptor):
        fsync(descriptor)
        inodes.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    return inodes


@pytest.fixture
def before_rename(monkeypatch, synced):
    """Collect what was forced to disk when the output was put in its place."""
    found, move = [], HeldFolder.move

    def noted(self, name, target, target_name):
        if name == "model":
            found.extend(synced)
            synced.clear()
        move(self, name, target, target_name)

    monkeypatch.setattr(HeldFolder, "move", noted)
    return found


def test_files_and_folders_before_the_rename(tmp_path, synced, before_rename):
    shardmix.merge(large_models(tmp_path), tmp_path / "out")
    folder = tmp_path / "out"
    wanted = {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert len(wanted) == 7  # folder, two shards, index, config, card, shardmix.json
    assert wanted <= set(before_rename)
    assert tmp_path.stat().st_ino in synced  # after it


def test_a_finished_shard_is_forced_at_once(tmp_path, synced, monkeypatch):
    """Not all of them at the end, which no signal interrupts."""
    write_provenance, found = merge.write_provenance, []

    def noted(*args, **options):
        found.extend(synced)
        return write_provenance(*args, **options)

    monkeypatch.setattr(merge, "write_provenance", noted)
    shardmix.merge(large_models(tmp_path), tmp_path / "out")
    shards = {path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) == 2
    assert shards <= set(found)


def test_without_fsync_nothing_is_forced(tmp_path, synced):
    shardmix.merge(large_models(tmp_path), tmp_path / "out", fsync=False)
    assert synced == []
