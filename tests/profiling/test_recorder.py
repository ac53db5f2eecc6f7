"""What a recorded merge writes down, and what becomes of it when the merge does not end well."""

import itertools
import json
import threading

import pytest

import shardmix
from shardmix.errors import OutputError, RecipeError
from shardmix.execute.thread_executor import TaskQueue
from shardmix.output.journal import Journal
from shardmix.profiling import profile_file, recorder
from shardmix.profiling.profile import Profile
from shardmix.system.units import MIB
from tests.support.cut_off import cut_off, cut_off_after, folder_bytes, large_models
from tests.support.models import random_model, save_model

STAGES = {"read", "reduce", "write", "digest", "finish", "other"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return large_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def small(tmp_path):
    return [(save_model(tmp_path / name, random_model(1)), 0.5) for name in "ab"]


def profile_of(path):
    return Profile.from_json(path.read_bytes())


@pytest.fixture(scope="module")
def merged(models, tmp_path_factory):
    """Return a merge's report, its profile, and the folder of both."""
    folder = tmp_path_factory.mktemp("merged")
    report = shardmix.merge(
        models, folder / "out", profile=folder / "run.json", workers=2, max_memory="8GiB"
    )
    return report, profile_of(folder / "run.json"), folder


def test_profile_changes_no_output(models, merged, tmp_path):
    """The output is the same with and without."""
    shardmix.merge(models, tmp_path / "out")
    assert folder_bytes(merged[2] / "out") == folder_bytes(tmp_path / "out")
    assert sorted(path.name for path in merged[2].iterdir()) == ["out", "run.json"]


def test_bytes_of_the_stages_are_the_plans(merged):
    report, profile, _ = merged
    stages = profile.stages
    assert set(stages) == STAGES
    assert stages["read"].bytes == stages["reduce"].bytes == report.bytes_read
    assert stages["write"].bytes + stages["finish"].bytes == report.bytes_written
    assert stages["digest"].bytes == report.bytes_written
    assert stages["other"].bytes == 0


def test_stage_seconds_are_the_workers(merged):
    """Seconds of the stages are those of the workers."""
    _, profile, _ = merged
    for name, stage in profile.stages.items():
        assert stage.worker_seconds >= 0
        if name in ("finish", "other"):
            assert stage.gb_per_second is None
        else:
            rate = stage.bytes / 1e9 / (stage.worker_seconds / profile.plan.workers)
            assert stage.gb_per_second == pytest.approx(rate)
    # Nothing of a worker's time is lost, and none is counted twice.
    total = sum(stage.worker_seconds for stage in profile.stages.values())
    assert total <= profile.plan.workers * profile.merge_seconds
    assert profile.seconds == pytest.approx(
        profile.load_seconds + profile.merge_seconds + profile.finish_seconds
    )


def test_samples_cover_the_whole_time(merged):
    """Samples are columns over the whole time."""
    _, profile, _ = merged
    samples = profile.samples
    columns = {
        name: value
        for name in samples.__dataclass_fields__
        if isinstance(value := getattr(samples, name), list)
    }
    assert {len(column) for column in columns.values()} == {len(samples.seconds)}
    assert len(samples.seconds) >= 2
    assert samples.failure is None
    times = samples.seconds
    assert all(a < b for a, b in itertools.pairwise(times))
    assert 0 <= times[0] < times[-1] <= profile.seconds
    assert 0 < samples.interval_seconds < 1
    for name in ("read", "reduce", "write", "digest"):
        done = [value for value in columns[f"{name}_bytes"] if value is not None]
        assert done == sorted(done)
        assert done[-1] == profile.stages[name].bytes
    # The kernel's high-water mark is less exact than its other counters, by pages for each core.
    assert max(samples.rss_bytes) <= profile.peak_rss_bytes + MIB
    assert min(samples.rss_bytes) > MIB
    assert (samples.vram_reserved_bytes, samples.vram_device_used_bytes) == (None, None)


def test_profile_names_the_merge_but_no_path(merged, models):
    """A profile says what was merged, where and how, but names no path."""
    report, profile, folder = merged
    plan = profile.plan
    assert profile.outcome == "complete"
    for name in ("num_models", "num_tensors", "bytes_read", "bytes_written", "device", "io"):
        assert getattr(plan, name) == getattr(report, name)
    for name in ("backend", "workers", "strip_bytes", "projected_peak_bytes", "digest"):
        assert getattr(plan, name) == getattr(report, name)
    assert (plan.max_memory_bytes, plan.max_vram_bytes) == (8 * 2**30, None)
    # The kernel adds up the pages of threads late, so that a peak may be seen a page smaller.
    assert profile.peak_rss_bytes >= report.peak_rss_bytes - MIB
    assert profile.machine.num_cores >= 1
    assert profile.machine.memory_bytes > 64 * MIB
    text = (folder / "run.json").read_text()
    assert "/" not in text.replace("GB/s", "")
    assert all(model.name not in text for model, _ in models)
    assert json.loads(text)["profile_version"] == 1


def test_sha256_and_mmap_keep_the_bytes(models, tmp_path):
    """With sha256 and mapped files, the bytes are the same."""
    options = {"io": "mmap", "digest": "sha256", "backend": "torch", "fsync": False}
    report = shardmix.merge(models, tmp_path / "out", profile=tmp_path / "run.json", **options)
    profile = profile_of(tmp_path / "run.json")
    assert profile.stages["read"].bytes == profile.stages["reduce"].bytes == report.bytes_read
    assert profile.stages["digest"].bytes == report.bytes_written
    assert (profile.plan.io, profile.plan.fsync) == ("mmap", False)


def test_sampling_needs_a_profile(small, tmp_path, monkeypatch):
    """Without a profile, nothing is sampled."""
    monkeypatch.setattr(recorder, "Sampler", None)
    monkeypatch.setattr(recorder, "StageClock", None)
    shardmix.merge(small, tmp_path / "out")


def test_cancelled_merge_leaves_its_profile(models, tmp_path):
    """A cancelled merge leaves the profile of what ran."""
    cancel, stopped = threading.Event(), threading.Event()
    claim, stop = Journal.add, TaskQueue.stop

    def claim_and_cancel(self, *args):
        claim(self, *args)
        cancel.set()
        stopped.wait(60)  # so that it is cancelled in the middle

    def stop_and_say(self, *args):
        stop(self, *args)
        stopped.set()

    file = tmp_path / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", claim_and_cancel)
        patch.setattr(TaskQueue, "stop", stop_and_say)
        with pytest.raises(shardmix.MergeCancelled):
            shardmix.merge(models, tmp_path / "out", profile=file, workers=1, cancel=cancel)
    first = profile_of(file)
    assert first.outcome == "cancelled"
    assert 0 < first.stages["read"].bytes < first.plan.bytes_read
    # The same again goes on, and writes its own.
    report = shardmix.merge(models, tmp_path / "out", profile=file)
    second = profile_of(file)
    assert second.outcome == "complete"
    assert second.stages["read"].bytes == report.bytes_read
    assert report.bytes_kept == first.plan.bytes_read - report.bytes_read > 0


@pytest.mark.parametrize(
    ("error", "outcome"), [(KeyboardInterrupt, "cancelled"), (OutputError("full"), "failed")]
)
def test_failed_merge_leaves_its_profile(models, tmp_path, error, outcome):
    """A merge that breaks off leaves the profile of what ran."""
    kind = error if isinstance(error, type) else type(error)
    with cut_off_after(3, error), pytest.raises(kind, match="are done and kept"):
        shardmix.merge(models, tmp_path / "out", workers=1, profile=tmp_path / "run.json")
    profile = profile_of(tmp_path / "run.json")
    assert profile.outcome == outcome
    assert profile.stages["write"].bytes > 0


def test_unbegun_merge_leaves_no_profile(small, tmp_path, monkeypatch):
    """A merge that does not begin leaves no profile."""
    monkeypatch.setattr("shardmix.api.check_disk", refuse)
    with pytest.raises(OutputError, match="no room"):
        shardmix.merge(small, tmp_path / "out", profile=tmp_path / "run.json")
    assert not (tmp_path / "run.json").exists()


def refuse(*_args, **_options):
    raise OutputError("no room")


def test_unwritable_profile_is_a_late_error(small, tmp_path):
    """A profile that cannot be written at the end is an error that says what is whole."""
    file = tmp_path / "folder" / "run.json"
    file.parent.mkdir()

    def take_away(_event):
        file.parent.exists() and file.parent.rmdir()

    with pytest.raises(OutputError) as caught:
        shardmix.merge(small, tmp_path / "out", profile=file, on_progress=take_away)
    assert "the profile cannot be written (No such file or directory)" in str(caught.value)
    assert "out is the new model all the same, and whole" in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_both_failures_are_said(models, tmp_path):
    """A failed merge whose profile cannot be written says both."""
    file = tmp_path / "folder" / "run.json"
    file.parent.mkdir()

    def take_away(_event):
        file.parent.exists() and file.parent.rmdir()

    with cut_off_after(3, OutputError("the disk is full")), pytest.raises(OutputError) as caught:
        shardmix.merge(models, tmp_path / "out", profile=file, on_progress=take_away)
    assert "the disk is full; " in str(caught.value)
    assert "the profile cannot be written" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "error", "finding"),
    [
        ("run.txt", RecipeError, r"'.*run.txt': must end in .json"),
        ("none/run.json", OutputError, "there is no folder .*none; make it first"),
        ("out/run.json", OutputError, "a profile cannot be in .*out;"),
        ("out/deep/run.json", OutputError, "a profile cannot be in .*out;"),
        (".out.shardmix/run.json", OutputError, r"a profile cannot be in .*\.out\.shardmix;"),
        ("a/run.json", OutputError, "a profile cannot be in .*a;"),
        ("a/config.json", OutputError, "exists and is not a profile"),
        ("mine.json", OutputError, "exists and is not a profile"),
        ("folder.json", OutputError, "exists and is not a profile"),
        ("frozen/run.json", OutputError, "cannot be written to"),
    ],
)
def test_bad_place_is_refused_early(small, tmp_path, monkeypatch, place, error, finding):
    """A bad place is refused before anything is done."""
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "frozen").mkdir()
    access = profile_file.os.access  # root may write anywhere
    monkeypatch.setattr(
        profile_file.os, "access", lambda path, *mode: path.name != "frozen" and access(path, *mode)
    )
    before = folder_bytes(tmp_path)
    for act in (shardmix.merge, shardmix.plan_merge):
        with pytest.raises(error, match=finding):
            act(small, tmp_path / "out", profile=tmp_path / place)
    assert folder_bytes(tmp_path) == before
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.shardmix").exists()


def test_relative_path_is_the_folders(small, tmp_path, monkeypatch):
    """A relative path is taken from the current folder."""
    monkeypatch.chdir(tmp_path)
    shardmix.merge(small, tmp_path / "out", profile="run.json")
    assert profile_of(tmp_path / "run.json").outcome == "complete"


def test_a_plan_with_a_profile_writes_none(small, tmp_path):
    shardmix.plan_merge(small, tmp_path / "out", profile=tmp_path / "run.json")
    assert not (tmp_path / "run.json").exists()


def test_resume_counts_only_its_own_bytes(models, tmp_path):
    """A merge that goes on counts only its own bytes."""
    cut_off(models, tmp_path / "out")
    report = shardmix.merge(models, tmp_path / "out", profile=tmp_path / "run.json")
    stages = profile_of(tmp_path / "run.json").stages
    assert report.bytes_kept > 0
    assert stages["read"].bytes == report.bytes_read
    assert stages["write"].bytes < report.bytes_written
