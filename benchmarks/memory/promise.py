"""Holds the memory promise over many combinations: measured peak <= projected peak <= budget."""

import argparse
import functools
import itertools
import os
import random
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import promises
from benchmarks.lib.programs import MERGE, command
from benchmarks.lib.promises import Case, least_budget
from benchmarks.lib.tables import Row, Size
from benchmarks.lib.workspace import Workspace, benchmark, remove

SHAPES = {
    "llama": ("llama-100m",),
    "giant tensor": ("giant", "--tensor-size", "160MiB"),
    "12000 tensors": ("moe", "--num-tensors", "12000"),
}
FACTORS: dict[str, tuple[Any, ...]] = {
    "shape": tuple(SHAPES),
    # Of the models, in turn.
    "dtypes": ("bf16", "f16", "f32", "bf16+f32", "f16+bf16+f32"),
    "models": (2, 3, 5, 8, 10),
    "budget": ("least", "300MiB", "400MiB", "1GiB", "none"),
    "workers": (1, 2, 4, 8),
    "io": ("pread", "mmap"),
    "backend": ("llvm", "torch"),
    "dtype": ("keep", "float32"),
    "digest": ("xxh3", "blake3", "sha256"),
}
OPTIONS = ("workers", "io", "backend", "dtype", "digest")
Combination = Mapping[str, Any]
NUM_DRAWN = 200
"""Combinations that the next one is chosen from."""
TITLES = ("sources", "models", "chunks", *OPTIONS[1:], *promises.BASIC, "promise")
FIGURES = ("budget_bytes", "projected_bytes", "reported_bytes", "measured_bytes", "strip_bytes")
COLUMNS = (*FACTORS, *FIGURES, "seconds", "promise")


def combinations(count: int, generator: random.Random) -> Iterator[Combination]:
    """Yield combinations until every pair of values was there, but at least `count`.

    The next one is the one of `NUM_DRAWN` random ones that brings most pairs that are new.
    """

    def pairs(combination: Combination) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(combination.items(), 2))

    values = ([(name, value) for value in FACTORS[name]] for name in FACTORS)
    missing = {
        pair
        for one, other in itertools.combinations(values, 2)
        for pair in itertools.product(one, other)
    }
    while missing or count > 0:
        drawn = (
            {name: generator.choice(values) for name, values in FACTORS.items()}
            for _ in range(NUM_DRAWN)
        )
        best = max(drawn, key=lambda each: len(pairs(each) & missing))
        missing -= pairs(best)
        count -= 1
        yield best


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure everything, and print."""
    output = workspace.scratch("merged")

    @functools.cache
    def model(shape: str, dtype: str, number: int) -> Path:
        # A folder of hard links, the same for every merge that has it at this place.
        original = f"{shape}-{dtype}".replace(" ", "-")
        folder = workspace.checkpoint(original, *SHAPES[shape], "--dtype", dtype.upper())
        return workspace.linked_copies([folder], f"{original}-{number}", 1)[0]

    def measure_one(one: Combination) -> Row:
        dtypes = itertools.cycle(one["dtypes"].split("+"))
        models = [model(one["shape"], next(dtypes), number) for number in range(one["models"])]
        options = [f"--{name}={one[name]}" for name in OPTIONS]
        words = command(MERGE, args.python, models, output=output, options=options)
        os.sync()
        remove(output)
        nbytes, is_refused = 0, None
        if one["budget"] == "least":
            nbytes, is_refused = least_budget(words, output, is_tried=False), False
        elif one["budget"] != "none":
            nbytes = Size(one["budget"])
        row, finished = promises.measure(Case({}, words, nbytes, is_refused=is_refused))
        if not promises.are_kept([row]):
            told = shlex.join([*words, *promises.budget_option(nbytes)])
            print(f"{row['promise']}: {told}\n  {finished.last_words()}")
        return row | one | {"sources": f"{one['shape']}, {one['dtypes']}"}

    rows = list(map(measure_one, combinations(args.combinations, random.Random(args.seed))))
    promises.print_rows(TITLES, rows)
    measured = [row for row in rows if row["projected_bytes"]]
    kept = sum(row["promise"] == "kept" for row in measured)
    worst = max(row["measured_bytes"] / row["projected_bytes"] for row in measured)
    print(
        f"{kept} of {len(measured)} merges kept the promise, {len(rows) - len(measured)} "
        f"were refused; the worst measured / projected is {worst:.3f}"
    )
    return [{name: row[name] for name in COLUMNS} for row in rows], promises.are_kept(rows)


if __name__ == "__main__":
    benchmark(
        measure,
        combinations=(64, "how many, at least"),
        seed=(0, "other seeds give other combinations"),
        csv=(Path("memory-promise.csv"), "raw figures"),
    )
