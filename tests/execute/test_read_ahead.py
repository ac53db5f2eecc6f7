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


def test_the_first_run_of_every_source_is_asked_for_by_turns(tmp_path, monkeypatch):
    plan = plan_of_two(tmp_path)
    run = plan.shards[0].segments[0]
    nbytes = 18 * MIB
    expected = [
        (file, offset + start, min(8 * MIB, nbytes - start))
        for start in range(0, nbytes, 8 * MIB)
        for file, offset in zip(run.files, run.offsets, strict=True)
    ]
    assert asked(plan, monkeypatch) == expected


def test_no_more_is_asked_for_than_is_allowed(tmp_path, monkeypatch):
    plan = plan_of_two(tmp_path)
    monkeypatch.setattr(read_ahead, "_STEP_NBYTES", 100)
    monkeypatch.setattr(read_ahead, "MOST_NBYTES", 350)
    assert [nbytes for *_, nbytes in asked(plan, monkeypatch)] == [100, 100, 100]


def test_nothing_is_asked_for_once_the_backend_is_there(tmp_path, monkeypatch):
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


def test_a_source_that_is_gone_is_left_to_those_who_read_it(tmp_path):
    plan = plan_of_two(tmp_path, num_elements=100)
    (tmp_path / "b" / "model.safetensors").unlink()
    before = threading.active_count()
    with read_ahead.reading_ahead(plan):
        while threading.active_count() > before:
            time.sleep(0.001)
