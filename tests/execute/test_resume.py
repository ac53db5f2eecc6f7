"""A merge that was cut off goes on from what it had done; another merge doesn't."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import shardmix
from shardmix.errors import OutputError, SourceChangedError
from tests.support.cut_off import cut_off, cut_off_after, folder_bytes, large_models
from tests.support.sampling import sample

LEAF = 4 * 2**20


@pytest.fixture
def models(tmp_path):
    return large_models(tmp_path)


@pytest.fixture
def undisturbed(tmp_path, models):
    shardmix.merge(models, tmp_path / "whole" / "out")
    return folder_bytes(tmp_path / "whole" / "out")


def staged(tmp_path):
    return tmp_path / ".out.shardmix"


def test_same_merge_resumes_to_same_bytes(tmp_path, models, undisturbed):
    """The same merge goes on, and ends with the same bytes."""
    cut_off(models, tmp_path / "out", num_leaves=3)
    assert not (tmp_path / "out").exists()
    report = shardmix.merge(models, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert not staged(tmp_path).exists()
    # Three leaves of two models, but for the header and what else has no source.
    assert 0.99 * 6 * LEAF < report.bytes_kept <= 6 * LEAF
    assert report.bytes_read + report.bytes_kept == 2 * (28_000_000 + 80)


def test_other_settings_resume_all_the_same(tmp_path, models, undisturbed):
    """Other chunks, workers and ways to read go on all the same."""
    for number in range(1, 7):
        io, backend = (("pread", "torch"), ("mmap", "llvm"))[number % 2]
        cut_off(models, tmp_path / "out", num_leaves=1, io=io, backend=backend)
        done = shardmix.status(tmp_path / "out").unfinished.bytes_done
        assert done == number * LEAF
    report = shardmix.merge(models, tmp_path / "out", workers=2, max_memory="4GiB")
    assert report.bytes_kept > 0.8 * 56_000_000  # six leaves of seven
    assert folder_bytes(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("digest", ["blake3", "sha256"])
def test_with_other_digests_too(tmp_path, models, digest):
    shardmix.merge(models, tmp_path / "whole" / "out", digest=digest)
    cut_off(models, tmp_path / "out", num_leaves=6, digest=digest)
    report = shardmix.merge(models, tmp_path / "out", digest=digest)
    assert report.bytes_kept > 0.7 * 56_000_000
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole" / "out")


def test_early_cut_leaves_nothing(tmp_path, models):
    """A merge cut off before anything was done leaves nothing."""
    with cut_off_after(0), pytest.raises(KeyboardInterrupt):
        shardmix.merge(models, tmp_path / "out")
    assert not staged(tmp_path).exists()


def test_error_says_what_is_kept(tmp_path, models):
    """An error says what is kept and how to go on."""
    error = OutputError("the disk is full")
    with cut_off_after(3, error), pytest.raises(OutputError) as caught:
        shardmix.merge(models, tmp_path / "out", workers=1)
    assert str(caught.value) == (
        f"the disk is full; 12.6 MB of 28.0 MB are done and kept in {staged(tmp_path)}: the same "
        "merge goes on from there"
    )


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"weights": (0.5, 0.5)}, r"weights 0\.6, 0\.4 then, 0\.5, 0\.5 now"),
        ({"dtype": "float16"}, "dtype keep then, float16 now"),
        ({"max_shard_size": "10MB"}, "max shard size none then, 10000000 now"),
        ({"digest": "blake3"}, "digest xxh3 then, blake3 now"),
        ({"record_paths": True}, "record paths False then, True now"),
        ({"model_type": "encoder"}, "model type none then, encoder now"),
        ({"allow_differences": ["a", "b"]}, "allow differences none then, a, b now"),
    ],
)
def test_another_merge_is_refused_by_name(tmp_path, models, change, finding):
    """Another merge is refused, and the difference named."""
    cut_off(models, tmp_path / "out")
    before = folder_bytes(staged(tmp_path))
    weights = change.pop("weights", (0.6, 0.4))
    others = [(folder, weight) for (folder, _), weight in zip(models, weights, strict=True)]
    with pytest.raises(OutputError, match=f"beginning of another merge: {finding}.*--restart"):
        shardmix.merge(others, tmp_path / "out", **change)
    after = folder_bytes(staged(tmp_path))
    del before["lock"], after["lock"]
    assert after == before
    report = shardmix.merge(others, tmp_path / "out", restart=True, **change)
    assert report.bytes_kept == 0
    assert not staged(tmp_path).exists()


def test_other_models_are_refused(tmp_path, models):
    cut_off(models, tmp_path / "out")
    shutil.copytree(models[1][0], tmp_path / "other")
    others = [models[0], (tmp_path / "other", 0.4)]
    with pytest.raises(OutputError, match="models m0, m1 then, m0, other now"):
        shardmix.merge(others, tmp_path / "out")


def change_header(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))


def change_time(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "finding"), [(change_time, "time of modification"), (change_header, "header")]
)
def test_changed_source_is_refused_by_name(tmp_path, models, change, finding):
    """A source that has changed is refused and named."""
    path = models[1][0] / "model-00002-of-00002.safetensors"
    cut_off(models, tmp_path / "out")
    change(path)
    with pytest.raises(
        OutputError, match=rf"{path} has changed since \({finding}\); throw it away with --restart"
    ):
        shardmix.merge(models, tmp_path / "out")
    shardmix.merge(models, tmp_path / "out", restart=True)


def test_change_meanwhile_ends_the_resume(tmp_path, models):
    """A source that changes meanwhile is no use going on with."""

    def touch(event):
        if event.num_bytes_done < event.num_bytes_total:
            return
        os.utime(models[0][0] / "model-00001-of-00002.safetensors", ns=(1, 1))

    with pytest.raises(SourceChangedError, match=r"has changed since.*start over with --restart"):
        shardmix.merge(models, tmp_path / "out", on_progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_gone_is_named(tmp_path, models):
    cut_off(models, tmp_path / "out")
    single = large_models(tmp_path / "single", shards=False)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (models[1][0] / name).unlink()
    (models[1][0] / "model.safetensors.index.json").unlink()
    shutil.copy(single[1][0] / "model.safetensors", models[1][0])
    with pytest.raises(OutputError, match=r"model\.safetensors was not among.*is no longer among"):
        shardmix.merge(models, tmp_path / "out")


def test_other_spelling_is_the_same_merge(tmp_path, models, monkeypatch):
    """A path spelt otherwise is the same merge."""
    cut_off(models, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    report = shardmix.merge([("m0", 0.6), ("./m1/", 0.4)], "out")
    assert report.bytes_kept > 0


@pytest.mark.parametrize("where", [100, LEAF + 5, 2 * LEAF - 1])
def test_leaf_unlike_its_journal_is_redone(tmp_path, models, undisturbed, where):
    """A leaf that is not what the journal claims is merged again."""
    cut_off(models, tmp_path / "out", num_leaves=4)
    path = staged(tmp_path) / "model" / "model-00001-of-00002.safetensors"
    with path.open("r+b") as file:
        file.seek(max(where, 1000))
        file.write(b"\x55\x55\x55")
    report = shardmix.merge(models, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == undisturbed
    assert report.bytes_kept < 3.1 * 2 * LEAF


TAILS = [
    b"[0,5,",
    b"\0" * 4096,
    b'[0,99,"00"]\n',
    b'[7,0,"' + b"0" * 32 + b'"]\n',
    b'[1,0,"' + b"0" * 32 + b'"]\n',
    b'[0,0,"xyz"]\n[1,1,"x"]\n',
    b"\xff\xfe\n",
]


@pytest.mark.parametrize("tail", sample("torn ends of a journal", TAILS, 4))
def test_torn_journal_does_no_harm(tmp_path, models, undisturbed, tail):
    """A journal with a torn or wrong end does no harm."""
    cut_off(models, tmp_path / "out")
    with (staged(tmp_path) / "journal").open("ab") as file:
        file.write(tail)
    report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    assert folder_bytes(tmp_path / "out") == undisturbed


HEADLESS = [b"", b"{", b"\0" * 100, b"[" * 100_000 + b"\n", b'{"format":1,"merge":5}\n']


@pytest.mark.parametrize("content", sample("journals without a beginning", HEADLESS, 3))
def test_headless_journal_claims_nothing(tmp_path, models, undisturbed, content):
    """A journal without a beginning claims nothing."""
    cut_off(models, tmp_path / "out")
    (staged(tmp_path) / "journal").write_bytes(content)
    assert shardmix.status(tmp_path / "out").unfinished.merge is None
    assert shardmix.merge(models, tmp_path / "out").bytes_kept == 0
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_pipe_for_a_journal_is_not_awaited(tmp_path, models):
    """A pipe in place of the journal is not waited for."""
    cut_off(models, tmp_path / "out")
    (staged(tmp_path) / "journal").unlink()
    os.mkfifo(staged(tmp_path) / "journal")
    with pytest.raises(OutputError, match="journal: is a pipe"):
        shardmix.merge(models, tmp_path / "out")
    with pytest.raises(OutputError, match="journal: is a pipe"):
        shardmix.status(tmp_path / "out")
    shardmix.merge(models, tmp_path / "out", restart=True)


def test_missing_staged_files_are_redone(tmp_path, models, undisturbed):
    """Staged files that are gone are merged again."""
    cut_off(models, tmp_path / "out")
    shutil.rmtree(staged(tmp_path) / "model")
    assert shardmix.merge(models, tmp_path / "out").bytes_kept == 0
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_journal_of_other_version_is_refused(tmp_path, models):
    """A journal of another version is refused."""
    cut_off(models, tmp_path / "out")
    journal = staged(tmp_path) / "journal"
    head, rest = journal.read_bytes().split(b"\n", 1)
    other = {"format": 99, "version": "9.9", "all": json.loads(head), "else": "is otherwise"}
    journal.write_bytes(json.dumps(other).encode() + b"\n" + rest)
    with pytest.raises(OutputError, match=r"left by shardmix 9\.9.*--restart"):
        shardmix.merge(models, tmp_path / "out")


def test_anomalies_before_the_cut_are_told(tmp_path):
    """What was found before the cut is told after it."""
    models = large_models(tmp_path)
    path = models[0][0] / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["layer0.weight"][0, :3] = float("nan")
    tensors["layer1.weight"][-1, -1] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    whole = shardmix.merge(models, tmp_path / "whole" / "out")
    cut_off(models, tmp_path / "out", num_leaves=6)
    report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    assert report.nonfinite == whole.nonfinite
    assert [finding.name for finding in report.nonfinite] == ["layer0.weight", "layer1.weight"]
    assert report.warnings == whole.warnings
    assert any("steps: differs in" in warning for warning in report.warnings)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole" / "out")
    cut_off(models, tmp_path / "out2", num_leaves=6)
    with pytest.raises(shardmix.NonfiniteError, match=r"layer\d\.weight"):
        shardmix.merge(models, tmp_path / "out2", on_nonfinite="error")


def test_anomalies_of_a_leaf_merged_again(tmp_path, models, undisturbed):
    """A leaf's last line counts: what an earlier one found in it is not told of the new bytes."""
    cut_off(models, tmp_path / "out", num_leaves=3)
    journal = staged(tmp_path) / "journal"
    head, *lines = journal.read_bytes().splitlines(keepends=True)
    shard, leaf, digest, *_ = json.loads(lines[0])
    found = [shard, leaf, digest, [{"layer0.weight": [5, 0, 0]}, {}]]
    journal.write_bytes(head + json.dumps(found).encode() + b"\n" + b"".join(lines))
    report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    assert report.nonfinite == ()
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_cancelled_merge_resumes(tmp_path, models, undisturbed):
    """A cancelled merge can be gone on with."""
    cancel = threading.Event()

    def stop(event):
        if event.num_bytes_done:
            cancel.set()

    with pytest.raises(shardmix.MergeCancelled):
        shardmix.merge(
            models, tmp_path / "out", workers=1, max_memory="4GiB", cancel=cancel, on_progress=stop
        )
    shardmix.merge(models, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    "stray", ["model-00003-of-00003.safetensors", "notes.txt", "2_Dense/model.safetensors", "tf/x"]
)
def test_strays_in_staging_are_no_output(tmp_path, stray):
    """Strays in the staging folder are no output.

    What an earlier run left, or somebody put there, is not this merge's.
    """
    models = large_models(tmp_path)
    cut_off(models, tmp_path / "out")
    path = tmp_path / ".out.shardmix" / "model" / stray
    path.parent.mkdir(exist_ok=True)
    path.write_text("stray")
    report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    shardmix.merge(models, tmp_path / "clean")
    assert set(folder_bytes(tmp_path / "out")) == set(folder_bytes(tmp_path / "clean"))
    recorded = json.loads((tmp_path / "out" / "shardmix.json").read_text())
    assert stray not in recorded["digests"]["files"]
    assert not (tmp_path / "out" / Path(stray).parts[0]).is_dir()


def test_a_claim_without_its_end_is_none(tmp_path, models, undisturbed):
    """The next one would be written behind it, on the same line."""
    cut_off(models, tmp_path / "out", num_leaves=3)
    journal = staged(tmp_path) / "journal"
    content = journal.read_bytes()
    journal.write_bytes(content.removesuffix(b"\n"))
    json.loads(content.splitlines()[-1])  # it is whole, but for its end
    cut_off(models, tmp_path / "out", num_leaves=1)
    lines = journal.read_bytes().splitlines()
    assert len([json.loads(line) for line in lines]) == 1 + 3
    report = shardmix.merge(models, tmp_path / "out")
    assert 0.9 * 6 * LEAF < report.bytes_kept <= 6 * LEAF
    assert folder_bytes(tmp_path / "out") == undisturbed


def test_other_plan_of_same_words_is_refused(tmp_path, models):
    """Another plan of the same words is refused. As another version might make it."""
    cut_off(models, tmp_path / "out")
    journal = staged(tmp_path) / "journal"
    head, rest = journal.read_bytes().split(b"\n", 1)
    content = json.loads(head)
    content["plan_digest"] = content["plan_digest"][::-1]
    content["version"] = "0.0.9"
    journal.write_bytes(json.dumps(content).encode() + b"\n" + rest)
    with pytest.raises(OutputError, match=r"another merge: shardmix 0\.0\.9 planned it otherwise"):
        shardmix.merge(models, tmp_path / "out")
    assert shardmix.merge(models, tmp_path / "out", restart=True).bytes_kept == 0
