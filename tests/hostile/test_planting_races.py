"""Links that are put in place while a merge runs, between any check and what relies on it."""

import os
import shutil
from pathlib import Path

import pytest

import shardmix
from shardmix.errors import OutputError
from shardmix.output import hidden_folder
from shardmix.system.held_folder import HeldFolder
from tests.support import sampling
from tests.support.cut_off import folder_bytes
from tests.support.models import random_model, save_model
from tests.support.planted import Intruder, Precious
from tests.support.sampling import every_nth

pytestmark = pytest.mark.usefixtures("in_time")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models, and the bytes of their merge."""
    folder = tmp_path_factory.mktemp("made")
    models = [
        (save_model(folder / name, random_model(number)), 0.5) for number, name in enumerate("ab")
    ]
    shardmix.merge(models, folder / "out", device="cpu")
    return models, folder_bytes(folder / "out")


def swap(path: Path, target: Path) -> None:
    """Move away what is at a path, if anything is, and put a link to elsewhere there."""
    if os.path.lexists(path):
        os.rename(path, path.with_name(f"{path.name}-moved"))
    path.symlink_to(target)


def num_calls(made, place, **options) -> int:
    with pytest.MonkeyPatch.context() as patch:
        intruder = Intruder(patch, at=0, act=lambda: None)
        if options["overwrite"]:
            save_model(place / "out", random_model(3))
        shardmix.merge(made[0], place / "out", workers=1, **options)
    shutil.rmtree(place / "out")
    return intruder.num_calls


SWAPPED = (
    *("", ".out.shardmix", ".out.shardmix/model", ".out.shardmix/journal"),
    *(".out.shardmix/placing", ".out.shardmix/lock", "out"),
    *(".out.shardmix/model/model.safetensors", ".out.shardmix/model/config.json"),
)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", SWAPPED)
def test_swap_at_any_moment_touches_nothing(made, tmp_path, name, overwrite):
    """A swap at any moment touches nothing.

    Before each call in turn that a merge makes relative to a folder that it holds; in a sample,
    before each 20th.
    """
    place = tmp_path / "place"
    place.mkdir()
    count = num_calls(made, place, overwrite=overwrite)
    outcomes = {
        merge_swapped(made, tmp_path / str(at), name, at, overwrite=overwrite)
        for at in every_nth(range(1, count + 1), 20)
    }
    # Some paths matter at a few calls only, which a sample may miss.
    assert outcomes <= {"merged", "refused"}
    assert "refused" in outcomes or not sampling.SAMPLING.is_whole


def test_swap_while_settling_is_refused(made, tmp_path):
    """The path is resolved before an earlier merge is settled, and again when models are opened."""
    for at in (1, 5, 9):
        assert merge_swapped(made, tmp_path / str(at), "", at, overwrite=False) == "refused"


def merge_swapped(made, folder: Path, name: str, at: int, *, overwrite: bool) -> str:
    """Merge while a path is swapped for a link at the n-th call; return how it ends."""
    models, wanted = made
    place, precious = folder / "place", Precious(folder / "precious")
    save_model(place / "out", random_model(3)) if overwrite else place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        Intruder(patch, at=at, act=lambda: swap(place / name, precious.folder))
        try:
            shardmix.merge(models, place / "out", overwrite=overwrite, workers=1)
        except OutputError:
            outcome = "refused"
        else:
            outcome = "merged"
            # Where the place itself or the output was moved to afterwards.
            found = next(folder.glob("place*/out-moved"), None) or next(folder.glob("place*/out"))
            assert not found.is_symlink()
            if "model/" not in name:  # in the last moment; nobody else gets that far
                assert folder_bytes(found) == wanted
    precious.check()
    shutil.rmtree(folder)
    return outcome


def test_what_is_exchanged_in_is_put_back(made, precious, tmp_path, monkeypatch):
    """A model of somebody's, moved to the output's place just before old and new change places."""
    out = save_model(tmp_path / "out", random_model(3))
    exchange, calls = HeldFolder.exchange, []

    def swapped(self, *names):
        if not calls:
            out.rename(tmp_path / "moved")
            precious.folder.rename(out)
        calls.append(names)
        return exchange(self, *names)

    monkeypatch.setattr(HeldFolder, "exchange", swapped)
    with pytest.raises(OutputError, match="was replaced while the merge was at work"):
        shardmix.merge(made[0], out, overwrite=True)
    assert len(calls) == 2
    out.rename(precious.folder)
    precious.check()


def test_exchanged_leftovers_are_not_removed(made, precious, tmp_path, monkeypatch):
    """What a kill has left exchanged is not removed. Neither by this run, nor by the next."""

    class Killed(BaseException):
        pass

    out = save_model(tmp_path / "out", random_model(3))
    exchange = HeldFolder.exchange

    def killed(self, *names):
        out.rename(tmp_path / "moved")
        precious.folder.rename(out)
        exchange(self, *names)
        monkeypatch.setattr(HeldFolder, "exchange", lambda *_: pytest.fail("it is dead"))
        raise Killed

    monkeypatch.setattr(HeldFolder, "exchange", killed)
    with pytest.raises(Killed):
        shardmix.merge(made[0], out, overwrite=True)
    monkeypatch.undo()
    kept = tmp_path / ".out.shardmix" / "model"
    for options in ({"overwrite": True}, {"overwrite": True, "restart": True}):
        with pytest.raises(OutputError, match="is not the model that was to be replaced"):
            shardmix.merge(made[0], out, **options)
    kept.rename(precious.folder)
    precious.check()


@pytest.mark.parametrize("has_exchange", [True, False])
def test_addition_to_the_old_model_is_kept(made, tmp_path, monkeypatch, has_exchange):
    """What is put into the old model is kept. After it was looked at, and before it goes."""
    out = save_model(tmp_path / "out", random_model(3))
    method = "exchange" if has_exchange else "move"
    real = getattr(HeldFolder, method)

    def late(self, *arguments):
        if out.exists() and not (out / "thesis.tex").exists():
            (out / "thesis.tex").write_text("precious")
        return real(self, *arguments)

    monkeypatch.setattr(HeldFolder, method, late)
    if not has_exchange:
        monkeypatch.setattr(HeldFolder, "exchange", lambda *_: False)
    with pytest.raises(OutputError, match=r"holds thesis\.tex besides a model"):
        shardmix.merge(made[0], out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "precious"


def test_staging_folder_swap_is_not_opened(made, precious, tmp_path, monkeypatch):
    """A staging folder swapped while it is opened.

    Between the look at its owner and the opening: a link is not opened.
    """
    checked = hidden_folder._owner_if_private

    def swap_after(path, parent, there):
        owner = checked(path, parent, there)
        if not path.is_symlink():
            swap(path, precious.folder)
        return owner

    monkeypatch.setattr(hidden_folder, "_owner_if_private", swap_after)
    with pytest.raises(OutputError):
        shardmix.merge(made[0], tmp_path / "out")
    precious.check()
