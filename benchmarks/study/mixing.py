"""LM-Cocktail's experiments, for any family of models: who is mixed with whom, and how much.

A family is a base, fine-tunes of it, and a measure for each task. Mixing here means weights for
`shardmix.merge`; those drawn from data come from `shardmix.scoring`. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import shardmix
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

Weights = dict[str, float]
"""Shares of a mix by model; they sum to one."""
Losses = dict[tuple[str, int], dict[str, float]]
"""By task and draw: the loss of every model on that draw's five examples."""


@dataclass(frozen=True, slots=True)
class Family:
    """A base, its fine-tunes, and what is needed to weigh and to measure them."""

    name: str
    model_type: str
    """As `shardmix score` calls it."""
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
    def tests(self) -> tuple[str, ...]:
        """All that is measured."""
        return self.tasks + self.other_tests


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; the columns of the raw figures."""

    family: str
    experiment: str
    """`single`; `tuned` (half of the mix is the task's own model); `new` (mixed without it); `pool`
    (it is one among all)."""
    task: str
    """The task the mix is for; of a single model, its name."""
    model: str
    """A model's name, or how the mix was made: `half`, `data`, `uniform`."""
    temperature: float | None
    draw: int | None
    test: str
    """What was measured."""
    accuracy: float
    """In percent."""
    weights: str
    """The mix, as `name=share` separated by spaces."""


def measure_singles(family: Family) -> Iterator[Row]:
    """Measure every model on every test."""
    for model, folder in family.folders.items():
        for test in family.tests:
            accuracy = family.measure(folder, test)
            yield Row(family.name, "single", model, model, None, None, test, accuracy, "")


def compute_all_losses(family: Family) -> Losses:
    """Score all models on each draw of examples of each task."""
    losses: Losses = {}
    for task in family.tasks:
        for draw in DRAWS:
            scores = score(
                [str(folder) for folder in family.folders.values()],
                family.model_type,
                family.draw_examples(task, draw),
                pooling=family.pooling,
                device="cpu",
            )
            losses[task, draw] = dict(zip(family.folders, scores.losses, strict=True))
    return losses


def measure_by_data(family: Family, losses: Losses, experiment: str) -> Iterator[Row]:
    """Mix uniformly and by data, and measure on the task; `experiment` is `new` or `pool`."""
    for task in family.tasks:
        mixed = [name for name in family.folders if experiment == "pool" or name != task]
        uniform = dict.fromkeys(mixed, 1 / len(mixed))
        yield from _measure(family, (experiment, task, "uniform", None, None), uniform, [task])
        for draw in DRAWS:
            known = {name: losses[task, draw][name] for name in mixed}
            for temperature in TEMPERATURES:
                how = (experiment, task, "data", temperature, draw)
                yield from _measure(family, how, weigh(known, temperature), [task])


def choose_temperature(family: Family, rows: list[Row], experiment: str) -> float:
    """Return the temperature of the best mean accuracy over development tasks.

    Of equals, the highest: it leans least on five examples.
    """

    def development_mean(temperature: float) -> float:
        return mean(
            row.accuracy
            for row in rows
            if (row.experiment, row.model, row.temperature) == (experiment, "data", temperature)
            and row.task in family.development_tasks
        )

    return max(TEMPERATURES, key=lambda temperature: (development_mean(temperature), temperature))


def measure_tuned_tasks(family: Family, losses: Losses, temperature: float) -> Iterator[Row]:
    """Mix each fine-tune with the base, and with all by data; measure both on every test."""
    for task in family.tasks:
        half = {"base": 0.5, task: 0.5}
        yield from _measure(family, ("tuned", task, "half", None, None), half, family.tests)
        for draw in TUNED_DRAWS:
            others = {name: loss for name, loss in losses[task, draw].items() if name != task}
            weights = {task: TARGET_SHARE}
            for name, share in weigh(others, temperature).items():
                weights[name] = (1 - TARGET_SHARE) * share
            how = ("tuned", task, "data", temperature, draw)
            yield from _measure(family, how, weights, family.tests)


def weigh(losses: Mapping[str, float], temperature: float) -> Weights:
    """Return each model's share: the softmax of its negative loss over the temperature."""
    shares = compute_weights(list(losses.values()), temperature)
    return dict(zip(losses, shares, strict=True))


def _measure(
    family: Family,
    how: tuple[str, str, str, float | None, int | None],
    weights: Weights,
    tests: Iterable[str],
) -> Iterator[Row]:
    """Merge by weight and measure; `how` is a row's experiment, task, model, temperature, draw."""
    # A softmax may underflow; a model that has no share need not be read.
    sources = {str(family.folders[name]): share for name, share in weights.items() if share > 0}
    # The mix is read once and replaced: nothing is lost if the machine stops before it is on disk.
    shardmix.merge(
        sources,
        family.mix_folder,
        config_from=str(family.folders["base"]),
        overwrite=True,
        fsync=False,
    )
    mix = " ".join(f"{name}={share:.4f}" for name, share in weights.items())
    for test in tests:
        yield Row(family.name, *how, test, family.measure(family.mix_folder, test), mix)
