"""Links, pipes and folders of others where a merge writes: nothing that they lead to is touched.

Each ends in the right merge, or in one refusal that names what was found.
"""

import os
import shutil
from itertools import product
from pathlib import Path

import pytest

import shardmix
from shardmix.errors import OutputError
from tests.support.cut_off import cut_off, folder_bytes, large_models
from tests.support.models import random_model, save_model
from tests.support.planted import PLANTS, SOMEBODY, needs_root, plant
from tests.support.sampling import sample

pytestmark = pytest.mark.usefixtures("in_time")

STAGING = ".out.shardmix"
SHARD = "model-00001-of-00002.safetensors"
PLACES = (
    "",
    *("/lock", "/journal", "/model", "/placing", "/old", "/fresh"),
    *(f"/model/{SHARD}", "/model/config.json", "/model/shardmix.json", "/model/2_Dense"),
)
"""What is known beforehand, below the staging folder."""
COMMANDS = ("merge", "resume", "restart", "overwrite", "status")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models, their merge, and what a run leaves that is killed in the midst of it."""
    folder = tmp_path_factory.mktemp("made")
    models = large_models(folder)
    shardmix.merge(models, folder / "whole" / "out")
    cut_off(models, folder / "out")
    save_model(folder / "old", random_model(3))
    return models, folder, folder_bytes(folder / "whole" / "out")


def prepared(made, place: Path, command: str) -> Path:
    """Make what the command begins from, and return the output's path."""
    _, folder, _ = made
    place.mkdir(exist_ok=True)
    if command in ("resume", "restart", "status"):
        shutil.copytree(folder / STAGING, place / STAGING, dirs_exist_ok=True)
        (place / STAGING).chmod(0o700)
    if command == "overwrite":
        shutil.copytree(folder / "old", place / "out")
    if command == "verify":
        shutil.copytree(folder / "whole" / "out", place / "out")
    return place / "out"


def run(made, out: Path, command: str):
    """Run the command; return the refusal, or None if it did what it should."""
    models, _, whole = made
    try:
        if command == "status":
            shardmix.status(out)
        elif command == "verify":
            shardmix.verify(out)
        else:
            options = {"restart": command == "restart", "overwrite": command == "overwrite"}
            shardmix.merge(models, out, **options)
            assert not out.is_symlink()
            assert folder_bytes(out) == whole
    except OutputError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("place", "kind", "command"), sample("planted links", product(PLACES, PLANTS, COMMANDS), 40)
)
def test_what_is_planted_leads_nowhere(made, precious, tmp_path, place, kind, command):
    out = prepared(made, tmp_path / "p", command)
    plant(kind, Path(f"{out.parent / STAGING}{place}"), precious)
    refusal = run(made, out, command)
    precious.check()
    assert refusal is None or str(out.parent) in refusal
    if command == "overwrite":
        model = folder_bytes(out)
        assert model == (made[2] if refusal is None else folder_bytes(made[1] / "old"))


@pytest.mark.parametrize("kind", PLANTS)
def test_verify_has_no_use_for_it(made, precious, tmp_path, kind):
    out = prepared(made, tmp_path / "p", "verify")
    plant(kind, out.parent / STAGING, precious)
    assert run(made, out, "verify") is None
    precious.check()


@pytest.mark.parametrize("place", ["/lock", "/journal", "/model"])
@pytest.mark.parametrize("kind", PLANTS)
def test_a_refusal_leaves_what_was_planted(made, precious, tmp_path, place, kind):
    """It is for a person to look at; a second run must not find it gone."""
    out = prepared(made, tmp_path / "p", "merge")
    path = Path(f"{out.parent / STAGING}{place}")
    plant(kind, path, precious)
    for _ in range(2):
        refusal = run(made, out, "merge")
        assert refusal is not None
        assert refusal.startswith(f"{path}: ")
        assert "it was left as it is" in refusal
        assert os.path.lexists(path)
    assert not out.exists()
    path.unlink()
    assert run(made, out, "merge") is None


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_shard_is_merged_anew(made, precious, tmp_path, kind):
    """Its bytes are not in it: what the journal claims is found to be false."""
    out = prepared(made, tmp_path / "p", "resume")
    plant(kind, out.parent / STAGING / "model" / SHARD, precious)
    assert run(made, out, "resume") is None
    assert not (out / SHARD).is_symlink()
    assert (out / SHARD).stat().st_nlink == 1
    precious.check()


@pytest.mark.parametrize("command", ["merge", "restart", "overwrite", "status"])
@pytest.mark.parametrize("kind", PLANTS)
def test_planted_output_is_refused(made, precious, tmp_path, kind, command):
    """An output that is planted is refused."""
    out = prepared(made, tmp_path / "p", "merge")
    plant(kind, out, precious)
    refusal = run(made, out, command)
    precious.check()
    assert command == "status" or refusal is not None
    assert os.path.lexists(out)


@needs_root
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o777])
def test_others_staging_folder_is_refused(made, tmp_path, command, mode):
    """A staging folder of others is refused."""
    out = prepared(made, tmp_path / "p", command)
    hidden = out.parent / STAGING
    hidden.mkdir(exist_ok=True)
    if command != "merge":  # there it is empty
        (hidden / "note.txt").write_text("mine")
    hidden.chmod(mode)
    os.chown(hidden, SOMEBODY, SOMEBODY)
    before = folder_bytes(hidden), hidden.stat()
    if command == "status":
        assert f"belongs to user {SOMEBODY}" in shardmix.status(out).unfinished.note
    else:
        refusal = run(made, out, command)
        assert refusal is not None
        assert f"belongs to user {SOMEBODY}" in refusal
        assert "choose another output" in refusal
    assert (folder_bytes(hidden), hidden.stat()) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_open_staging_folder_is_refused(made, tmp_path, command, mode):
    """A staging folder open to others is refused."""
    out = prepared(made, tmp_path / "p", command)
    hidden = out.parent / STAGING
    hidden.mkdir(exist_ok=True)
    hidden.chmod(mode)
    before = folder_bytes(hidden), hidden.stat()
    if command == "status":
        assert "others may write to it" in shardmix.status(out).unfinished.note
    else:
        refusal = run(made, out, command)
        assert refusal is not None
        assert "chmod 700" in refusal
    assert (folder_bytes(hidden), hidden.stat()) == before
    hidden.chmod(0o700)
    assert run(made, out, command) is None


@needs_root
@pytest.mark.parametrize("name", ["lock", "journal", "model", f"model/{SHARD}", "placing"])
def test_others_files_within_are_not_used(made, tmp_path, name):
    """What others own within is not taken up.

    As it may be if the folder was open to them for a while: they could still write to it.
    """
    out = prepared(made, tmp_path / "p", "resume")
    path = out.parent / STAGING / name
    path.touch()
    os.chown(path, SOMEBODY, SOMEBODY)
    refusal = run(made, out, "resume")
    if name == f"model/{SHARD}":
        assert refusal is None
        assert (out / SHARD).stat().st_uid == os.geteuid()
    elif name == "placing":  # which is read, and removed
        assert refusal is None
    else:
        assert refusal == (
            f"{path}: belongs to user {SOMEBODY}, and a merge has "
            f"a {'folder' if name == 'model' else 'file'} of its own there; it was left as it is; "
            "find out who put it there, then remove it"
        )


def test_links_above_the_output_are_followed(made, tmp_path):
    """Links above the output are the user's own."""
    (tmp_path / "disk" / "models").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    models, _, whole = made
    report = shardmix.merge(models, tmp_path / "link" / "models" / "new" / "out")
    assert report.output == str(tmp_path / "disk" / "models" / "new" / "out")
    assert folder_bytes(Path(report.output)) == whole


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_profile_is_not_written(made, precious, tmp_path, kind):
    """A planted profile is not written through."""
    models, _, _ = made
    plant(kind, tmp_path / "run.json", precious)
    with pytest.raises(OutputError, match=r"run\.json: "):
        shardmix.merge(models, tmp_path / "out", profile=tmp_path / "run.json")
    precious.check()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", PLANTS)
def test_profile_planted_late_is_not_written(made, precious, tmp_path, kind):
    """A profile planted meanwhile is not written through."""
    models, _, _ = made
    planted = []

    def plant_once(_event):
        if not planted:
            planted.append(plant(kind, tmp_path / "run.json", precious))

    with pytest.raises(OutputError, match=r"run\.json: "):
        shardmix.merge(
            models, tmp_path / "out", profile=tmp_path / "run.json", on_progress=plant_once
        )
    precious.check()
