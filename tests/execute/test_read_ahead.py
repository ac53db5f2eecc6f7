"""What is asked of the disk while a backend is being loaded."""

import threading
import time

import torch

import shardmix
from shardmix.execute import read_ahead
from shardmix.sources.readers import PreadReader
from shardmix.system.units import MIB
from tests.support.models import save_model


def plan_of_two(folder, *, num_elements=9 * MIB):
    for seed, name in enumerate("ab"):
        values = torch.full((num_elements,), float(seed)).bfloat16()
        save_model(folder / name, {"t": values})
    return shardmix.plan_merge({folder / "a": 0.5, folder / "b": 0.5}, workers=2)


def asked(plan, monkeypatch):
    """Return what was asked for by the time that nobody asks any more."""
    made = []
    monkeypatch.setattr(PreadReader, "will_need", lambda _, *asked: made.append(asked))
    before = threading.active_count()
    with read_ahead.reading_ahead(plan):
        while threading.active_count() > before:
            time.sleep(0.001)
    return made


def test_sources_are_asked_for_in_turn(tmp_path, monkeypatch):
    """The first segment of every source is asked for by turns."""
    plan = plan_of_two(tmp_path)
    segment = plan.shards[0].segments[0]
    nbytes = 18 * MIB
    expected = [
        (source.file, source.offset + start, min(8 * MIB, nbytes - start))
        for start in range(0, nbytes, 8 * MIB)
        for source in segment.sources
    ]
    assert asked(plan, monkeypatch) == expected


def test_read_ahead_keeps_its_bound(tmp_path, monkeypatch):
    """No more is asked for than is allowed."""
    plan = plan_of_two(tmp_path)
    monkeypatch.setattr(read_ahead, "_STEP_NBYTES", 100)
    monkeypatch.setattr(read_ahead, "MOST_NBYTES", 350)
    assert [nbytes for *_, nbytes in asked(plan, monkeypatch)] == [100, 100, 100]


def test_read_ahead_ends_with_the_backend(tmp_path, monkeypatch):
    """Nothing is asked for once the backend is there."""
    plan = plan_of_two(tmp_path, num_elements=4000)
    monkeypatch.setattr(read_ahead, "_STEP_NBYTES", 1)
    made, may_go_on = [], threading.Event()

    def will_need(_, *asked):
        made.append(asked)
        may_go_on.wait(60)

    monkeypatch.setattr(PreadReader, "will_need", will_need)
    before = threading.active_count()
    with read_ahead.reading_ahead(plan):
        while not made:
            time.sleep(0.001)
    may_go_on.set()
    while threading.active_count() > before:
        time.sleep(0.001)
    assert len(made) == 1


def test_missing_source_is_left_to_readers(tmp_path):
    """A source that is gone is left to those who read it."""
    plan = plan_of_two(tmp_path, num_elements=100)
    (tmp_path / "b" / "model.safetensors").unlink()
    before = threading.active_count()
    with read_ahead.reading_ahead(plan):
        while threading.active_count() > before:
            time.sleep(0.001)
