"""Who may read an output: whom the umask lets in, but nobody who could not read every source."""

import os
import stat
from contextlib import contextmanager
from pathlib import Path

import pytest

import shardmix
from shardmix.output.journal import Journal
from tests.support.cut_off import cut_off, folder_bytes, large_models
from tests.support.models import random_model, save_model
from tests.support.planted import SOMEBODY, needs_root


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def models(tmp_path):
    """Two models that anybody can read."""
    return [opened(save_model(tmp_path / name, random_model(1))) for name in "ab"]


def opened(folder):
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def merge(models, out, mask=0o022, **options):
    with umask(mask):
        return shardmix.merge([(model, 1 / len(models)) for model in models], out, **options)


def modes(out: Path) -> tuple[set[int], set[int]]:
    """Return the permissions of an output's folders, and of its files."""
    paths = [out, *out.rglob("*")]
    folders = {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_dir()}
    return folders, {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
@pytest.mark.parametrize("left", [None, 0o700, 0o755, 0o500])
def test_the_umask_decides(models, tmp_path, mask, left):
    """Whatever the mode of the hidden folder was."""
    if left is not None:
        (tmp_path / ".out.shardmix").mkdir()
        (tmp_path / ".out.shardmix").chmod(left)
    (models[0] / "additional_chat_templates").mkdir()
    (models[0] / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    opened(models[0] / "additional_chat_templates")
    report = merge(models, tmp_path / "new" / "out" if left is None else tmp_path / "out", mask)
    out = Path(report.output)
    assert modes(out) == ({0o777 & ~mask}, {0o666 & ~mask})
    assert (out / "additional_chat_templates" / "rag.jinja").exists()
    assert report.notes == ()
    if left is None:
        assert stat.S_IMODE(out.parent.stat().st_mode) == 0o777 & ~mask


def test_the_hidden_folder_is_nobody_elses(models, tmp_path, monkeypatch):
    seen, add = [], Journal.add

    def look(self, *arguments):
        seen.append(stat.S_IMODE((tmp_path / ".out.shardmix").stat().st_mode))
        add(self, *arguments)

    monkeypatch.setattr(Journal, "add", look)
    merge(models, tmp_path / "out", 0o002)
    assert set(seen) == {0o700}


@pytest.mark.parametrize("masks", [(0o077, 0o022), (0o022, 0o077)])
def test_resume_has_its_own_runs_umask(tmp_path, masks):
    """A resume has the umask of its own run."""
    models = large_models(tmp_path)
    for folder, _ in models:
        opened(folder)
    with umask(masks[0]):
        cut_off(models, tmp_path / "out")
    with umask(masks[1]):
        report = shardmix.merge(models, tmp_path / "out")
    assert report.bytes_kept > 0
    assert modes(tmp_path / "out") == ({0o777 & ~masks[1]}, {0o666 & ~masks[1]})


@pytest.mark.parametrize(
    ("mode", "folders", "files", "who"),
    [
        (0o600, 0o700, 0o600, "only its owner"),
        (0o400, 0o700, 0o600, "only its owner"),
        (0o640, 0o750, 0o640, "only its owner and group"),
        (0o660, 0o750, 0o640, "only its owner and group"),
        (0o604, 0o705, 0o604, "only its owner"),
        (0o444, 0o755, 0o644, None),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_the_most_private_source_decides(models, tmp_path, number, mode, folders, files, who):
    private = models[number] / "model.safetensors"
    private.chmod(mode)
    report = merge(models, tmp_path / "out")
    assert modes(tmp_path / "out") == ({folders}, {files})
    if who is None:
        assert report.notes == ()
    elif mode != 0o604:
        assert report.notes == (
            f"{tmp_path / 'out'}: can be read by {who}, as {private} can; with --share "
            "(share=True) by all that the umask allows",
        )
    assert report.warnings == ()


def test_a_private_folder_is_a_private_model(models, tmp_path):
    models[1].chmod(0o700)
    report = merge(models, tmp_path / "out")
    assert modes(tmp_path / "out") == ({0o700}, {0o600})
    assert f"as {models[1]} can" in report.notes[0]


def test_folders_above_a_model_do_not_count(models, tmp_path):
    """Nor does the folder that a single file lies in: it is a heap of files, and no model."""
    (tmp_path / "home").mkdir(mode=0o700)
    moved = [model.rename(tmp_path / "home" / model.name) for model in models]
    merge(moved, tmp_path / "out")
    assert modes(tmp_path / "out") == ({0o755}, {0o644})
    for number, model in enumerate(moved):
        (model / "model.safetensors").rename(tmp_path / "home" / f"{number}.safetensors")
    merge(sorted((tmp_path / "home").glob("*.safetensors")), tmp_path / "of-files")
    assert modes(tmp_path / "of-files") == ({0o755}, {0o644})


def test_copied_private_file_counts(models, tmp_path):
    """A private file that is copied counts."""
    (models[0] / "config.json").chmod(0o600)
    merge(models, tmp_path / "out")
    assert modes(tmp_path / "out") == ({0o700}, {0o600})


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_cached_file_is_judged_by_its_blob(models, tmp_path, mode):
    """A file of the Hub's cache is judged by its blob."""
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in models[0].iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    (repository / "blobs" / "model.safetensors").chmod(mode)
    merge([snapshot, models[1]], tmp_path / "out")
    assert modes(tmp_path / "out") == ({0o755 if mode == 0o644 else 0o700}, {mode})


@needs_root
@pytest.mark.parametrize(("mode", "files"), [(0o640, 0o600), (0o644, 0o644)])
def test_a_source_of_another_group(models, tmp_path, mode, files):
    """Its group's members are not those of the output's group."""
    private = models[0] / "model.safetensors"
    os.chown(private, -1, SOMEBODY)
    private.chmod(mode)
    merge(models, tmp_path / "out")
    assert modes(tmp_path / "out")[1] == {files}


def test_sharing_is_asked_for(models, tmp_path):
    (models[0] / "model.safetensors").chmod(0o600)
    report = merge(models, tmp_path / "out", share=True)
    assert modes(tmp_path / "out") == ({0o755}, {0o644})
    assert report.notes == ()


def test_strict_umask_is_silent(models, tmp_path):
    """Nothing is said if the umask is as strict."""
    (models[0] / "model.safetensors").chmod(0o600)
    report = merge(models, tmp_path / "out", 0o077)
    assert modes(tmp_path / "out") == ({0o700}, {0o600})
    assert report.notes == ()


def test_sharing_is_the_same_merge(tmp_path):
    """Neither its digest nor its journal knows of it; only permissions differ."""
    models = large_models(tmp_path)
    plans = [shardmix.plan_merge(models, tmp_path / "out", share=share) for share in (False, True)]
    assert plans[0].digest() == plans[1].digest()
    with umask(0o022):
        cut_off(models, tmp_path / "out", share=True)
        report = shardmix.merge(models, tmp_path / "out")
        assert report.bytes_kept > 0
        assert modes(tmp_path / "out") == ({0o700}, {0o600})  # as safetensors saves models
        shardmix.merge(models, tmp_path / "shared" / "out", share=True)
    assert modes(tmp_path / "shared" / "out") == ({0o755}, {0o644})
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "shared" / "out")
