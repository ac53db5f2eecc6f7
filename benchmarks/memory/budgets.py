"""Holds shardmix's peak resident memory against `--max-memory` and against its own projection."""

import argparse
import itertools
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import promises
from benchmarks.lib.control_group import NoMemoryGroupError
from benchmarks.lib.machine import can_drop_caches, drop_caches
from benchmarks.lib.programs import MERGE, command
from benchmarks.lib.promises import BASIC, GROUP, Case
from benchmarks.lib.tables import Row, Size, mib
from benchmarks.lib.workspace import Workspace, benchmark, remove

NUM_MODELS = (2, 8)
IO_MODES = ("mmap", "pread")
BUDGET = Size("400MiB")
TOO_SMALL = Size("32MiB")
"""Less than python with torch takes for itself."""
TITLES = ("case", "models", "io", *BASIC, "chunks", "s", "promise", *GROUP)


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure everything, and print."""
    output = workspace.scratch("merged")
    rows: list[Row] = []

    def case(title: str, models: Sequence[Path], io: str, *budget: int, **how: Any) -> Case:
        options = ["--io", io, *shlex.split(args.shardmix_options)]
        words = command(MERGE, args.python, models, output=output, fsync=True, options=options)
        return Case({"case": title, "models": len(models), "io": io}, words, *budget, **how)

    def measure_all(title: str, cases: Sequence[Case], *, is_cold: bool = False) -> None:
        print(f"{title}\n")
        measured = []
        for each in cases:
            remove(output)
            drop_caches() if is_cold else os.sync()
            measured.append(promises.measure(each)[0])
        remove(output)
        promises.print_rows(TITLES, measured)
        rows.extend(measured)

    originals = workspace.checkpoints(args.preset, "ab", args.preset)
    copies = workspace.linked_copies(originals, args.preset, max(NUM_MODELS) - 2)
    llamas = [*originals, *copies]
    cases = [
        case(args.preset, llamas[:count], io, budget)
        for budget, count, io in itertools.product((*args.budgets, 0), NUM_MODELS, IO_MODES)
    ]
    cases.append(case("too small a budget", llamas[:2], "mmap", TOO_SMALL, is_refused=True))
    measure_all("Budgets", cases)
    size, count = args.tensor_size, args.num_tensors
    cases = []
    for title, name, *words in (
        ("giant tensor", f"giant-{size}", "giant", "--tensor-size", size),
        (f"{count} tensors", f"moe-{count}", "moe", "--num-tensors", count),
    ):
        first = workspace.checkpoint(name, *words)
        models = [first, *workspace.linked_copies([first], name, 1)]
        cases += [case(title, models, io, BUDGET) for io in IO_MODES]
    measure_all(f"One tensor of {mib(size)} MiB; {count} small tensors", cases)
    title = f"Inside a memory control group of {mib(args.group_size)} MiB, beside outside, cold"
    groups = {"outside": 0, "inside": args.group_size}
    cases = [
        case(place, llamas[:2], "mmap", BUDGET, group_bytes=nbytes)
        for place, nbytes in groups.items()
    ]
    try:
        if not can_drop_caches():
            raise NoMemoryGroupError("only root may empty the page cache and make groups")
        measure_all(title, cases, is_cold=True)
        outside, inside = rows[-2:]
        if not inside["failure"]:
            print(f"inside / outside: {inside['seconds'] / outside['seconds']:.2f} of the time")
    except NoMemoryGroupError as error:
        print(f"skipped: {error}\n")
    return rows, promises.are_kept(rows)


if __name__ == "__main__":
    budgets = [Size(size) for size in ("350MiB", "400MiB", "600MiB", "1GiB")]
    benchmark(
        measure,
        budgets=(budgets, "values of --max-memory"),
        preset=("llama-1b", "shape of the checkpoints"),
        tensor_size=(Size("1GiB"), "of the giant tensor"),
        num_tensors=(20_000, "of the small ones"),
        group_size=(Size("512MiB"), "of the control group"),
        shardmix_options=("", "as one string"),
        csv=(Path("memory.csv"), "raw figures"),
    )
