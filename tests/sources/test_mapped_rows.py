"""Mapped rows: each from where its map says, in any part."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmix.sources.mapped_rows import AVERAGE, MEAN, ZERO, RowRuns
from shardmix.sources.resolve import open_source
from tests.support.mapped_source import GIVERS, MARK, OWN, ROWS, add_mapping
from tests.support.models import load_model
from tests.support.sampling import examples
from tests.support.vocabularies import EMBEDDING, WIDTH, model_of, numbered


def test_each_row_is_what_its_map_says(tmp_path, monkeypatch):
    """Of two models of different dtypes: own rows, another's, zeros, means, averages."""
    add_mapping(monkeypatch)
    model_of(tmp_path / "other", numbered(list("abcdefgh")), seed=7, dtype=torch.float32)
    model_of(tmp_path / "m", numbered(list("abcdefghij")), seed=8)
    stored = [load_model(tmp_path / name)[EMBEDDING].float() for name in ("m", "other")]
    (tmp_path / "m" / MARK).touch()
    source = open_source(str(tmp_path / "m"))
    row = source.tensors.names.index(EMBEDDING)
    assert source.tensors.shapes[row] == (len(GIVERS), WIDTH)
    assert source.tensors[row].dtype == "F32"
    assert source.tensors.kept_dtypes(np.array([row])) == ["BF16"]
    wanted: list[torch.Tensor] = []
    for at, (giver, its) in enumerate(zip(GIVERS, ROWS, strict=True)):
        if giver >= 0:
            wanted.append(stored[giver][its])
        elif giver == ZERO:
            wanted.append(torch.zeros(WIDTH))
        elif giver == MEAN:
            rows = [stored[model][own[at]] for model, own in enumerate(OWN) if own[at] >= 0]
            wanted.append(sum(rows, torch.zeros(WIDTH)) / len(rows))
        else:
            before = torch.stack(wanted[: GIVERS.index(AVERAGE)]).double()
            total = torch.zeros(WIDTH, dtype=torch.float64)
            for each in before:
                total += each
            wanted.append((total / len(before)).float())
    reader = source.open_reader()
    buffer = bytearray(4 * WIDTH * len(GIVERS))
    reader.read(row, 0, memoryview(buffer))
    reader.close()
    assert buffer == torch.stack(wanted).numpy().tobytes()


@settings(max_examples=examples(50), deadline=None)
@given(st.data())
def test_runs_say_what_single_rows_say(data):
    """For any rows, and any part of them."""
    count = data.draw(st.integers(1, 30))
    givers = data.draw(st.lists(st.integers(-3, 2), min_size=count, max_size=count))
    rows = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    runs = RowRuns.of(np.array(givers, np.int16), np.array(rows, np.int32))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    found = [
        (giver, at + number if giver >= 0 else None)
        for first, end, giver, at in runs.between(start, stop)
        for number in range(end - first)
    ]
    assert found == [
        (giver, row if giver >= 0 else None)
        for giver, row in list(zip(givers, rows, strict=True))[start:stop]
    ]


@pytest.mark.parametrize("rows", [[3, 4, 5], [0, 1, 3]])
def test_only_one_run_of_all_is_identity(rows):
    runs = RowRuns.of(np.zeros(3, np.int16), np.array(rows, np.int32))
    assert not runs.is_identity(0, 3)
    whole = RowRuns.of(np.zeros(3, np.int16), np.arange(3, dtype=np.int32))
    assert whole.is_identity(0, 3)
    assert not whole.is_identity(0, 4)
    assert not whole.is_identity(1, 3)
