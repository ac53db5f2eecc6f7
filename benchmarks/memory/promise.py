"""Holds the memory promise over many combinations: measured peak <= projected peak <= budget.

    python -m benchmarks.memory.promise --work-dir WORK

Combinations of shape, dtype, number of models, budget, workers, way to read, backend, output dtype
and digest, chosen so that any two values of two of these meet at least once. Ends with status 1 if
a promise was broken.
"""

import itertools
import os
import random
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.lib import promises
from benchmarks.lib.machine import print_facts
from benchmarks.lib.processes import run
from benchmarks.lib.programs import budget_option, least_budget, merge_command
from benchmarks.lib.tables import Size, print_table, write_csv
from benchmarks.lib.workspace import Workspace, parser, remove

SHAPES = {
    "llama": ("llama-100m",),
    "giant tensor": ("giant", "--tensor-size", "160MiB"),
    "12000 tensors": ("moe", "--num-tensors", "12000"),
}
LEAST = "least"
NO_BUDGET = "none"
FACTORS: dict[str, tuple[Any, ...]] = {
    "shape": tuple(SHAPES),
    # Of the models, in turn.
    "dtypes": ("bf16", "f16", "f32", "bf16+f32", "f16+bf16+f32"),
    "models": (2, 3, 5, 8, 10),
    "budget": (LEAST, "300MiB", "400MiB", "1GiB", NO_BUDGET),
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
HEADER = ("sources", "models", "chunks", *OPTIONS[1:], *promises.HEADER, "promise")


def combinations(count: int, generator: random.Random) -> Iterator[Combination]:
    """Yield combinations until every pair of values was there, but at least `count`.

    The next one is the one of `NUM_DRAWN` random ones that brings most pairs that are new.
    """

    def pairs(combination: Combination) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(combination.items(), 2))

    missing = {
        pair
        for (name, values), (other, others) in itertools.combinations(FACTORS.items(), 2)
        for pair in itertools.product(
            ((name, value) for value in values), ((other, value) for value in others)
        )
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


class Merges:
    """Runs combinations as merges, on sources that are written when they are first needed."""

    def __init__(self, workspace: Workspace, python: str) -> None:
        self._workspace = workspace
        self._python = python
        self._output = workspace.scratch("merged")
        self._links: dict[str, Path] = {}

    def measure(self, combination: Combination) -> dict[str, Any]:
        """Merge once, and return the row; a broken promise is printed with its command."""
        budget, dtypes = combination["budget"], combination["dtypes"].split("+")
        models = [
            self._model(combination["shape"], dtypes[number % len(dtypes)], number)
            for number in range(combination["models"])
        ]
        options = [f"--{name}={combination[name]}" for name in OPTIONS]
        where = self._python, models, self._output
        command = merge_command("shardmix", *where, options=options)
        os.sync()
        remove(self._output)
        if budget == LEAST:
            nbytes = least_budget(command, self._output, is_tried=False)
        else:
            nbytes = 0 if budget == NO_BUDGET else Size(budget)
        command += budget_option(nbytes)
        finished = run(command)
        may_be_refused = None if budget != LEAST else False
        judged = promises.judged(finished, nbytes, is_refused=may_be_refused)
        if judged["promise"] not in ("kept", "refused"):
            print(f"{judged['promise']}: {shlex.join(command)}\n  {finished.last_words()}")
        return judged | dict(combination)

    def _model(self, shape: str, dtype: str, number: int) -> Path:
        """Return a folder of hard links, the same for every merge that has it at this place."""
        original = f"{shape}-{dtype}".replace(" ", "-")
        name = f"{original}-{number}"
        if name not in self._links:
            options = (*SHAPES[shape], "--dtype", dtype.upper())
            folder = self._workspace.checkpoint(original, *options)
            self._links[name] = self._workspace.linked_copy(folder, name)
        return self._links[name]


def cells(row: Mapping[str, Any]) -> list[object]:
    """Return the cells of the table."""
    chosen = (row[name] for name in OPTIONS[1:])
    first = [f"{row['shape']}, {row['dtypes']}", row["models"], promises.chunks(row)]
    return [*first, *chosen, *promises.cells(row), row["promise"]]


def main() -> None:
    """Measure everything; exit with 1 if a promise was broken."""
    args = parser(
        "Hold shardmix's memory promise over many combinations.",
        combinations=(64, "how many, at least"),
        seed=(0, "other seeds give other combinations"),
        csv=(Path("memory-promise.csv"), "raw figures"),
    ).parse_args()
    with Workspace(args) as workspace:
        print_facts(args.work_dir, args.python)
        merges = Merges(workspace, args.python)
        chosen = combinations(args.combinations, random.Random(args.seed))
        rows = [merges.measure(combination) for combination in chosen]
    print_table(HEADER, map(cells, rows))
    measured = [row for row in rows if row["projected_bytes"]]
    kept = sum(row["promise"] == "kept" for row in measured)
    worst = max(row["measured_bytes"] / row["projected_bytes"] for row in measured)
    print(
        f"\n{kept} of {len(measured)} merges kept the promise, {len(rows) - len(measured)} "
        f"were refused; the worst measured / projected is {worst:.3f}"
    )
    figures = ("budget_bytes", "projected_bytes", "reported_bytes", "measured_bytes")
    columns = (*FACTORS, *figures, "strip_bytes", "seconds", "promise")
    write_csv(args.csv, [{name: row[name] for name in columns} for row in rows])
    raise SystemExit(promises.exit_status(rows))


if __name__ == "__main__":
    main()
