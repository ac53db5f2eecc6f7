import pytest

from shardmix import staging as staging_module
from shardmix.errors import OutputError
from shardmix.staging import check_disk, check_output, staged_folder
from tests.models import random_model, save_model


def model(folder, seed=1):
    return save_model(folder, random_model(seed))


def fill(folder, text="new"):
    (folder / "model.safetensors").write_text(text)


def test_the_output_appears_whole_as_the_last_step(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out, overwrite=False, fsync=True) as folder:
        fill(folder)
        assert not out.exists()
        assert folder.parent == out.parent  # same file system, so that a rename is possible
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


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_keeps_the_old_one_until_the_new_is_whole(tmp_path, monkeypatch, exchange):
    if not exchange:  # a system without renameat2

        class NoLibc:
            def __init__(self, *_, **__):
                pass

        monkeypatch.setattr(staging_module.ctypes, "CDLL", NoLibc)
    out = model(tmp_path / "out")
    old = (out / "model.safetensors").read_bytes()
    with staged_folder(out, overwrite=True, fsync=False) as folder:
        fill(folder)
        assert (out / "model.safetensors").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert (out / "model.safetensors").read_text() == "new"


def test_a_failed_overwrite_leaves_the_old_one(tmp_path):
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


def test_an_output_that_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="has appeared"),
        staged_folder(out, overwrite=False, fsync=False) as folder,
    ):
        fill(folder)
        out.mkdir()
    assert list(out.iterdir()) == []


def refused(output, finding, *, overwrite=False, inputs=()):
    with pytest.raises(OutputError, match=finding):
        check_output(output, overwrite=overwrite, inputs=list(inputs))


def test_an_existing_output_is_refused_unless_overwritten(tmp_path):
    out = model(tmp_path / "out")
    refused(out, "exists.*--overwrite")
    check_output(out, overwrite=True, inputs=[])


def test_only_a_model_is_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    refused(tmp_path / "home", "holds no safetensors weights", overwrite=True)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a folder", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=True, inputs=[])


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_that_is_or_touches_an_input_is_refused(tmp_path, overwrite):
    a = model(tmp_path / "x" / "a")
    options = {"overwrite": overwrite, "inputs": [a]}
    refused(a, "is the input", **options)
    refused(tmp_path / "x" / "b" / ".." / "a", "is the input", **options)
    refused(a / "merged", "lies inside", **options)
    refused(tmp_path / "x", "contains the input", **options)
    link = tmp_path / "link"
    link.symlink_to(a)
    refused(link, "is the input", **options)
    check_output(tmp_path / "x" / "merged", **options)


def test_a_folder_beside_a_single_file_input_is_fine(tmp_path):
    path = model(tmp_path / "a") / "model.safetensors"
    check_output(tmp_path / "a" / "merged", overwrite=False, inputs=[path])


def test_an_output_named_like_a_file_is_refused(tmp_path):
    refused(tmp_path / "out.safetensors", "names a file")


def test_too_little_disk_is_refused_with_both_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(staging_module, "free_nbytes", lambda path: 1000)
    check_disk(tmp_path / "out", 1000)
    with pytest.raises(OutputError, match=r"needs 1.00 kB \(1001 bytes\).*1.00 kB free"):
        check_disk(tmp_path / "out", 1001)
