"""A method with a factor of each model, and of each tensor: its statistics decide them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import shardmix
from shardmix.methods import registry
from shardmix.methods.base import Needs
from shardmix.methods.statistics import GROUP_NUM_ELEMENTS
from shardmix.output import journal
from shardmix.plan import memory_budget
from tests.support.models import load_model, random_tensor, save_model

SHAPES = {"large": (GROUP_NUM_ELEMENTS + 7,), "middle": (300, 1001), "small": (7,)}
SOURCES = 3
NUM_BINS = 500


@dataclasses.dataclass(frozen=True)
class Squares:
    """The sum of squares of each model, and many more entries that nobody reads."""

    def num_entries(self, num_values):
        return num_values + NUM_BINS

    def of_piece(self, values):
        squares = [float(np.sum(value * value)) for value in values]
        return (*squares, *[-1 / 3] * NUM_BINS)

    def total(self, partials):
        return tuple(math.fsum(entries) for entries in zip(*partials, strict=True))


class UnitMean:
    """The mean of the models, each divided by its norm."""

    name = "unit_mean"
    summary = "mean of unit vectors"
    reference = ""
    parameters = ()
    num_factors = None
    is_weighted_sum = False
    takes_changes = False
    is_copy = False

    def check(self, params):
        pass

    def needs(self, params):
        return Needs(statistics=(Squares(),))

    def contributors(self, params, *, is_wide):
        return tuple(range(len(params.by_model)))

    def factors(self, params, models, statistics):
        return tuple(1 / (math.sqrt(statistics[0][model]) * len(models)) for model in models)

    def combine(self, ops, values, factors):
        total = ops.mul(values[0], factors[0])
        for value, factor in zip(values[1:], factors[1:], strict=True):
            total = ops.add(total, ops.mul(value, factor))
        return total


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.METHODS, UnitMean.name, UnitMean())
    return [
        save_model(
            tmp_path / f"m{number}",
            {name: random_tensor(shape, seed=number) for name, shape in SHAPES.items()},
        )
        for number in range(SOURCES)
    ]


@pytest.mark.parametrize("backend", ["llvm", "torch"])
@pytest.mark.parametrize("chunk_nbytes", [1 << 16, None], ids=["gathered", "read whole"])
def test_each_model_has_a_factor(tmp_path, models, monkeypatch, backend, chunk_nbytes):
    if chunk_nbytes is not None:
        sizes = dict.fromkeys(memory_budget.BEST_CHUNK_NBYTES, chunk_nbytes)
        monkeypatch.setattr(memory_budget, "BEST_CHUNK_NBYTES", sizes)
        monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", chunk_nbytes)
    shardmix.merge(models, tmp_path / "out", method=UnitMean.name, backend=backend)
    merged = load_model(tmp_path / "out")
    stored = [load_model(model) for model in models]
    for name in SHAPES:
        units = [each[name].double() / each[name].double().norm() for each in stored]
        expected = sum(units) / SOURCES
        assert torch.allclose(merged[name].double(), expected, rtol=1e-5, atol=1e-9)


def test_statistics_are_counted(tmp_path, models, monkeypatch):
    """The disk's need has room for the journal, the budget for what is kept."""
    sizes = {}
    original = journal.Journal.close

    def close(self):
        sizes["journal"] = self._path.stat().st_size
        original(self)

    monkeypatch.setattr(journal.Journal, "close", close)
    plan = shardmix.plan_merge(models, method=UnitMean.name)
    assert plan.gathering.num_entries == len(SHAPES) * (SOURCES + NUM_BINS)
    assert plan.gathering.kept_nbytes > 8 * plan.gathering.num_entries
    sizes_by_chunk = dict.fromkeys(memory_budget.BEST_CHUNK_NBYTES, 1 << 16)
    monkeypatch.setattr(memory_budget, "BEST_CHUNK_NBYTES", sizes_by_chunk)
    monkeypatch.setattr(memory_budget, "_LARGEST_WHOLE_NBYTES", 1 << 16)
    shardmix.merge(models, tmp_path / "out", method=UnitMean.name)
    planned = shardmix.plan_merge(models, tmp_path / "other", method=UnitMean.name)
    # The head names the output, whose path is as long.
    assert 20 * NUM_BINS < sizes["journal"] <= journal.journal_nbytes(planned) + 100
