"""LM-Cocktail's experiments, for any family of models: who is mixed with whom, and how much.

A family is a base, fine-tunes of it, and a measure for each task. Mixing here means weights for
`shardmix.merge`; those drawn from data come from `shardmix.scoring`. Knows nothing of training.

Columns of the raw figures: `experiment` is `single`, `tuned` (half of the mix is the task's own
model), `new` (mixed without it) or `pool` (it is one among all); `task` is what the mix is for, or
a single model's name; `model` is a model's name, or how the mix was made: `half`, `data`,
`uniform`; `test` is what was measured, `accuracy` in percent.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import shardmix
from benchmarks.lib.tables import Row, column, where
from shardmix.scoring import compute_weights, score

TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 5.0)
"""What the choice is made from; the last is LM-Cocktail's default."""
NUM_EXAMPLES = 5
"""Of a task, to weigh models by."""
DRAWS = range(5)
"""Each draws five examples of its own."""
TUNED_DRAWS = range(2)
"""Those for mixes that are measured on every test."""
TARGET_SHARE = 0.5
"""How much of a mix is the model fine-tuned on the task, as in LM-Cocktail (its α)."""
UNIFORM = {"model": "uniform", "temperature": None, "draw": None}
HALF = UNIFORM | {"model": "half"}

Weights = dict[str, float]
"""Shares of a mix by model; they sum to one."""
Losses = dict[tuple[str, int], dict[str, float]]
"""By task and draw: the loss of every model on that draw's five examples."""


@dataclass(frozen=True, slots=True)
class Family:
    """A base, its fine-tunes, and what is needed to weigh and to measure them."""

    name: str
    """As `shardmix score` calls such models."""
    pooling: str
    """How an encoder makes one vector of a text; no matter for others."""
    folders: dict[str, Path]
    """Model folders: `base`, and one for each task."""
    development_tasks: tuple[str, ...]
    """Tasks on which the temperature is chosen."""
    other_tests: tuple[str, ...]
    """What is measured besides the tasks, and has no fine-tune."""
    draw_examples: Callable[[str, int], list[dict[str, Any]]]
    """`(task, draw)` to five examples, none of which is in a test."""
    mix_folder: Path
    """Where each mix is written in turn."""
    measure: Callable[[Path, str], float]
    """`(model folder, test)` to held-out accuracy in percent."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks that have a fine-tune."""
        return tuple(name for name in self.folders if name != "base")

    @property
    def final_tasks(self) -> tuple[str, ...]:
        """Those that no choice was made by."""
        return tuple(task for task in self.tasks if task not in self.development_tasks)

    @property
    def tests(self) -> tuple[str, ...]:
        """All that is measured."""
        return self.tasks + self.other_tests

    def rows(self, how: Row, folder: Path, tests: Iterable[str], weights: str = "") -> list[Row]:
        """Measure a model on these tests; `how` says what it is."""
        start = {"family": self.name, **how}
        return [
            {**start, "test": test, "accuracy": self.measure(folder, test), "weights": weights}
            for test in tests
        ]


def measure_singles(family: Family) -> list[Row]:
    """Measure every model on every test."""
    rows = []
    for model, folder in family.folders.items():
        how = {"experiment": "single", "task": model, **UNIFORM, "model": model}
        rows += family.rows(how, folder, family.tests)
    return rows


def compute_all_losses(family: Family) -> Losses:
    """Score all models on each draw of examples of each task."""
    models = list(map(str, family.folders.values()))
    how = {"pooling": family.pooling, "device": "cpu"}
    losses: Losses = {}
    for task in family.tasks:
        for draw in DRAWS:
            examples = family.draw_examples(task, draw)
            scores = score(models, family.name, examples, **how)
            losses[task, draw] = dict(zip(family.folders, scores.losses, strict=True))
    return losses


def measure_by_data(family: Family, losses: Losses, experiment: str) -> list[Row]:
    """Mix uniformly and by data, and measure on the task; `experiment` is `new` or `pool`."""
    rows = []
    for task in family.tasks:
        what = {"experiment": experiment, "task": task}
        mixed = [name for name in family.folders if experiment == "pool" or name != task]
        uniform = dict.fromkeys(mixed, 1 / len(mixed))
        rows += _measure(family, what | UNIFORM, uniform, [task])
        for draw in DRAWS:
            known = {name: losses[task, draw][name] for name in mixed}
            for temperature in TEMPERATURES:
                how = {"model": "data", "temperature": temperature, "draw": draw}
                rows += _measure(family, what | how, weigh(known, temperature), [task])
    return rows


def choose_temperature(family: Family, rows: list[Row], experiment: str) -> float:
    """Return the temperature of the best mean accuracy over development tasks.

    Of equals, the highest: it leans least on five examples.
    """
    by_data = where(rows, experiment=experiment, model="data")
    found = [row for row in by_data if row["task"] in family.development_tasks]

    def rank(temperature: float) -> tuple[float, float]:
        return mean(column(found, "accuracy", temperature=temperature)), temperature

    return max(TEMPERATURES, key=rank)


def measure_tuned_tasks(family: Family, losses: Losses, temperature: float) -> list[Row]:
    """Mix each fine-tune with the base, and with all by data; measure both on every test."""
    rows = []
    for task in family.tasks:
        what = {"experiment": "tuned", "task": task}
        rows += _measure(family, what | HALF, {"base": 0.5, task: 0.5}, family.tests)
        for draw in TUNED_DRAWS:
            others = {name: loss for name, loss in losses[task, draw].items() if name != task}
            shares = weigh(others, temperature).items()
            weights = {task: TARGET_SHARE}
            weights |= {name: (1 - TARGET_SHARE) * share for name, share in shares}
            how = {"model": "data", "temperature": temperature, "draw": draw}
            rows += _measure(family, what | how, weights, family.tests)
    return rows


def weigh(losses: Mapping[str, float], temperature: float) -> Weights:
    """Return each model's share: the softmax of its negative loss over the temperature."""
    shares = compute_weights(list(losses.values()), temperature)
    return dict(zip(losses, shares, strict=True))


def _measure(family: Family, how: Row, weights: Weights, tests: Iterable[str]) -> list[Row]:
    """Merge by weight and measure."""
    # A softmax may underflow; a model that has no share need not be read.
    sources = {str(family.folders[name]): share for name, share in weights.items() if share > 0}
    donor = str(family.folders["base"])
    # The mix is read once and replaced: nothing is lost if the machine stops before it is on disk.
    shardmix.merge(sources, family.mix_folder, config_from=donor, overwrite=True, fsync=False)
    mix = " ".join(f"{name}={share:.4f}" for name, share in weights.items())
    return family.rows(how, family.mix_folder, tests, mix)
