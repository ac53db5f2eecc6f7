"""Draws samples of long campaigns: `make test` runs a sample of each, `make campaign` all of it.

A campaign's cases have kinds: a hostile file is a header or a recipe, a plant is a link or a pipe.
A sample holds every kind at least once. pytest prints the seed; the same seed draws the same.
"""

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Case = TypeVar("Case")


@dataclass(slots=True)
class Sampling:
    """How this run of the tests draws its samples, and what it has drawn."""

    is_whole: bool = False
    """Whether campaigns run whole."""
    seed: int = 0
    """What samples are drawn by; one number for all processes of a run."""
    drawn: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Sampled campaign → how many of its cases run, and how many it has."""


SAMPLING = Sampling()
"""Of this process: conftest.py sets it by the options, before it imports any test."""


def sample(
    name: str,
    cases: Iterable[Case],
    most: int,
    *,
    kinds: Callable[[Case], Iterable[Hashable]] | None = None,
) -> list[Case]:
    """Return about `most` of the cases, in their order; with --campaign, all of them.

    A case is of several kinds. By default they are its values, if it is a tuple: each value of each
    parameter. If the kinds take more than `most` cases, the sample is larger.
    """
    cases = list(cases)
    if SAMPLING.is_whole or len(cases) <= most:
        return cases
    drawn = _draw(cases, most, kinds or _values, random.Random(f"{SAMPLING.seed} {name}"))
    SAMPLING.drawn[name] = len(drawn), len(cases)
    return drawn


def every_nth(steps: Sequence[Case], nth: int) -> Sequence[Case]:
    """Return every nth of the steps of one case, from a random one on; with --campaign, all."""
    if SAMPLING.is_whole:
        return steps
    return steps[random.Random(SAMPLING.seed).randrange(min(nth, len(steps))) :: nth]


def examples(most: int) -> int:
    """Return how many examples Hypothesis is to try: ten times as many with --campaign."""
    return most * 10 if SAMPLING.is_whole else most


def _draw(
    cases: Sequence[Case],
    most: int,
    kinds: Callable[[Case], Iterable[Hashable]],
    chance: random.Random,
) -> list[Case]:
    order = list(range(len(cases)))
    chance.shuffle(order)
    chosen, met = set(), set()
    for at in order:  # what brings a new kind
        new = set(kinds(cases[at])) - met
        if new:
            met |= new
            chosen.add(at)
    for at in order:  # then anything
        if len(chosen) >= most:
            break
        chosen.add(at)
    return [cases[at] for at in sorted(chosen)]


def _values(case: object) -> Iterable[Hashable]:
    """Return a tuple's values, each with its place."""
    return enumerate(case) if isinstance(case, tuple) else ()
