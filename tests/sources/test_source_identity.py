"""What a source is known by: an edit whose size and time of modification are as before is found."""

import dataclasses
import os
import shutil

import pytest

import shardmix
from shardmix.errors import OutputError, SourceChangedError, SourceError
from shardmix.execute import compare_pass, jobs, merge, prepare
from shardmix.sources.identity import FileStamp, SourceFile, SourceIdentity
from tests.support.cut_off import cut_off, folder_bytes, large_models

NAME = "model-00002-of-00002.safetensors"


def times_kept(path, change):
    """Change a file, and set its times back."""
    status = path.stat()
    change(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def edit(path):
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\1" * 8)


def replace(path):
    shutil.copyfile(path, path.with_name("new"))
    edit(path.with_name("new"))
    path.with_name("new").replace(path)


def restore(path):
    """Put back a copy of it, times and all, as from a backup."""
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def link(path):
    os.link(path, path.parent.parent / "link")


def make_private(path):
    path.chmod(0o600)


@pytest.fixture
def models(tmp_path):
    return large_models(tmp_path)


@pytest.mark.parametrize("change", [edit, replace, restore, link, make_private])
def test_between_runs_any_change_is_refused(tmp_path, models, change):
    """Also one of rights or links: it cannot be told from an edit, and costs time, no bytes."""
    path = models[1][0] / NAME
    cut_off(models, tmp_path / "out")
    times_kept(path, change)
    before = folder_bytes(tmp_path / ".out.shardmix")
    with pytest.raises(OutputError, match=rf"{path} has changed since \(its status.*--restart"):
        shardmix.merge(models, tmp_path / "out")
    after = folder_bytes(tmp_path / ".out.shardmix")
    assert {**before, "lock": b""} == {**after, "lock": b""}
    assert shardmix.merge(models, tmp_path / "out", restart=True).bytes_kept == 0
    shardmix.merge(models, tmp_path / "fresh" / "out")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh" / "out")


def test_without_a_change_it_goes_on(tmp_path, models):
    """Reading, and looking, changes nothing; nor does one model given twice."""
    twice = [models[0], (models[1][0], 0.2), (models[1][0], 0.2)]
    cut_off(twice, tmp_path / "out")
    (models[1][0] / NAME).read_bytes()
    assert shardmix.merge(twice, tmp_path / "out").bytes_kept > 0


def changing(change):
    """Return a callback that changes something once, when all is read, and what it was told."""
    events = []

    def note(event):
        if event.num_bytes_done == event.num_bytes_total and "changed" not in events:
            change()
            events.append("changed")
        events.append(event)

    return note, events


@pytest.mark.parametrize("change", [edit, replace])
def test_during_a_merge_an_edit_is_found(tmp_path, models, change):
    path = models[1][0] / NAME
    note, _ = changing(lambda: times_kept(path, change))
    with pytest.raises(SourceChangedError, match=rf"{path}: has changed since its header was read"):
        shardmix.merge(models, tmp_path / "out", on_progress=note)
    assert not (tmp_path / "out").exists()


def chmod_in_vain(path):
    path.chmod(path.stat().st_mode)


def make_public(path):
    path.chmod(0o666)


@pytest.mark.parametrize("change", [link, make_public, chmod_in_vain, restore])
def test_during_a_merge_a_touch_is_none(tmp_path, models, change, monkeypatch):
    """If nothing explains it, all is computed again and held against the output."""
    path = models[1][0] / NAME
    note, events = changing(lambda: times_kept(path, change))
    passes = []
    run_job = jobs.run_job

    def counted(*args, **options):
        passes.append(1)
        run_job(*args, **options)

    for module in (merge, compare_pass):
        monkeypatch.setattr(module, "run_job", counted)
    shardmix.merge(models, tmp_path / "out", on_progress=note)
    assert len(passes) == (2 if change in (chmod_in_vain, restore) else 1)
    assert [event.is_end for event in events[-2:]] == [False, True]
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_edit_during_comparison_is_found(tmp_path, models):
    """An edit while it is compared is found."""
    path = models[1][0] / NAME
    changes = iter([chmod_in_vain, edit])

    def note(event):
        if event.num_bytes_done == event.num_bytes_total:
            for change in changes:
                times_kept(path, change)
                return

    with pytest.raises(SourceChangedError, match=rf"{path}: has changed since its header was read"):
        shardmix.merge(models, tmp_path / "out", on_progress=note)


def test_change_during_backend_choice(tmp_path, models, monkeypatch):
    """A change while the backend is chosen.

    The plan is made anew then, and would take the edited file for the planned one.
    """
    ready = prepare.ready

    def replanned(plan, options, replan):
        times_kept(models[1][0] / NAME, edit)
        return ready(replan(options), options, replan)

    monkeypatch.setattr(prepare, "ready", replanned)
    with pytest.raises(SourceChangedError, match="has changed since its header was read"):
        shardmix.merge(models, tmp_path / "out")


def test_what_was_touched_is_named(tmp_path):
    files = []
    for name in "abc":
        (tmp_path / name).write_bytes(bytes(50))
        status = (tmp_path / name).stat()
        stamp = FileStamp.of(status)
        files.append(SourceFile(str(tmp_path / name), 50, status.st_mtime_ns, stamp=stamp))
    then = SourceIdentity(tuple(files))
    assert then.renewed().written_since(then) is None
    times_kept(tmp_path / "b", edit)
    assert then.renewed().written_since(then) == str(tmp_path / "b")
    unknown = SourceIdentity(tuple(dataclasses.replace(file, stamp=None) for file in files))
    assert then.renewed().written_since(unknown) is None
    (tmp_path / "b").unlink()
    with pytest.raises(SourceError, match="b: reading failed"):
        then.renewed()


THEN = FileStamp(1000, 7, (0o100644, 1, 0, 0))


@pytest.mark.parametrize(
    ("now", "between", "during"),
    [
        (THEN, False, False),
        (FileStamp(1001, 7, THEN.status), True, True),
        (FileStamp(1001, 8, THEN.status), True, True),
        # Replaced by a file of other rights.
        (FileStamp(1001, 8, (0o100600, 1, 0, 0)), True, True),
        (FileStamp(1001, 7, (0o100600, 1, 0, 0)), True, False),
        (FileStamp(1001, 7, (0o100644, 2, 0, 0)), True, False),
        # Mounted anew: inodes are numbered as they come.
        (FileStamp(1000, 8, THEN.status), False, False),
        (FileStamp(1000, None, THEN.status), False, False),
        # A file system without the one, or without both.
        (FileStamp(None, 7, THEN.status), False, False),
        (FileStamp(None, 8, THEN.status), True, True),
        (FileStamp(None, None, THEN.status), False, False),
    ],
)
def test_what_a_stamp_tells(now, between, during):
    assert now.may_be_written_since(THEN) == between
    assert now.is_written_since(THEN) == during


def test_zeros_are_unknown(tmp_path):
    names = ["st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size"]
    status = os.stat_result([0] * len(names) + [0, 0, 0])
    assert (FileStamp.of(status).ctime_ns, FileStamp.of(status).inode) == (None, None)


def test_a_file_of_the_hub_has_no_stamp(tmp_path, models):
    """Its commit stands for it, and a cache may be moved."""
    plan = shardmix.plan_merge(models)
    assert all(file.stamp is not None for file in plan.file_identities())
    sources = []
    for source in plan.sources:
        files = tuple(dataclasses.replace(f, commit="c0ffee") for f in source.identity.files)
        identity = dataclasses.replace(source.identity, commit="c0ffee", files=files)
        sources.append(dataclasses.replace(source, identity=identity))
    of_the_hub = dataclasses.replace(plan, sources=tuple(sources))
    assert all(file.stamp is None for file in of_the_hub.file_identities())
