"""Holds shardmix's peak resident memory against `--max-memory` and against its own projection.

    python -m benchmarks.memory.budgets --work-dir WORK

Three tables: the llama of 1.1B at several budgets, with 2 and with 8 models, memory-mapped and
pread; tensors larger than the budget and very many small ones; and the same merge inside a memory
control group of 512 MiB beside one outside. Ends with status 1 if a promise was broken.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib import promises
from benchmarks.lib.control_group import NoMemoryGroupError, run_within
from benchmarks.lib.machine import can_drop_caches, drop_caches, print_facts
from benchmarks.lib.programs import budget_option, merge_command, split_options
from benchmarks.lib.promises import Row
from benchmarks.lib.tables import Size, mib, print_table, write_csv
from benchmarks.lib.workspace import Workspace, parser, remove

NUM_MODELS = (2, 8)
IO_MODES = ("mmap", "pread")
TOO_SMALL = Size("32MiB")
"""Less than python with torch takes for itself."""
HEADER = ("case", "models", "io", *promises.HEADER, "chunks", "s", "promise")


@dataclass(frozen=True, slots=True)
class Case:
    """One merge to measure."""

    title: str
    models: Sequence[Path]
    io: str
    budget_bytes: int
    """`--max-memory`; 0 leaves it to shardmix."""
    is_refused: bool = False
    """Whether the budget is too small for any merge."""
    group_bytes: int = 0
    """Size of the memory control group that it runs in; 0 for none."""


def cells(row: Row, charged: tuple[object, object]) -> list[object]:
    """Return the cells of the table."""
    seconds = "" if row["failure"] else f"{row['seconds']:.2f}"
    start = (row["case"], row["models"], row["io"], *promises.cells(row))
    return [*start, promises.chunks(row), seconds, row["promise"], *charged]


def main() -> None:
    """Measure everything; exit with 1 if a peak was above what was promised."""
    budgets = [Size(size) for size in ("350MiB", "400MiB", "600MiB", "1GiB")]
    args = parser(
        "Hold shardmix's peak memory against what it promised.",
        budgets=(budgets, "values of --max-memory"),
        preset=("llama-1b", "shape of the checkpoints"),
        tensor_size=(Size("1GiB"), "of the giant tensor"),
        num_tensors=(20_000, "of the small ones"),
        group_size=(Size("512MiB"), "of the control group"),
        shardmix_options=("", "as one string"),
        csv=(Path("memory.csv"), "raw figures"),
    ).parse_args()
    with Workspace(args) as workspace:
        print_facts(args.work_dir, args.python)
        output = workspace.scratch("merged")

        def measure(title: str, cases: Sequence[Case], *, is_cold: bool = False) -> list[Row]:
            print(f"{title}\n")
            rows, table = [], []
            for case in cases:
                options = [*budget_option(case.budget_bytes), "--io", case.io]
                options += split_options(args, "shardmix")
                where = args.python, case.models, output
                command = merge_command("shardmix", *where, fsync=True, options=options)
                remove(output)
                drop_caches() if is_cold else os.sync()
                finished, charged = run_within(case.group_bytes, command)
                judged = promises.judged(finished, case.budget_bytes, is_refused=case.is_refused)
                named = {"case": case.title, "models": len(case.models), "io": case.io}
                rows.append(named | judged)
                table.append(cells(rows[-1], charged))
            remove(output)
            print_table((*HEADER, "charged MiB", "OOM kills"), table)
            promises.print_failures(rows)
            return rows

        originals = workspace.checkpoints(args.preset, "ab", args.preset)
        copies = [
            workspace.linked_copy(originals[number % 2], f"{args.preset}-copy-{number}")
            for number in range(max(NUM_MODELS) - 2)
        ]
        llamas = [*originals, *copies]
        every = itertools.product((*args.budgets, 0), NUM_MODELS, IO_MODES)
        cases = [Case(args.preset, llamas[:models], io, budget) for budget, models, io in every]
        cases.append(Case("too small a budget", llamas[:2], "mmap", TOO_SMALL, is_refused=True))
        rows = measure("Budgets", cases)
        size, count = args.tensor_size, args.num_tensors
        giant = workspace.checkpoint(f"giant-{size}", "giant", "--tensor-size", size)
        moe = workspace.checkpoint(f"moe-{count}", "moe", "--num-tensors", count)
        shapes = {
            "giant tensor": (giant, workspace.linked_copy(giant, "giant-copy")),
            f"{count} tensors": (moe, workspace.linked_copy(moe, "moe-copy")),
        }
        budget = Size("400MiB")
        cases = [Case(title, shapes[title], io, budget) for title in shapes for io in IO_MODES]
        rows += measure(f"One tensor of {mib(size)} MiB; {count} small tensors", cases)
        title = f"Inside a memory control group of {mib(args.group_size)} MiB, beside outside, cold"
        cases = [
            Case(where, llamas[:2], "mmap", budget, group_bytes=nbytes)
            for where, nbytes in (("outside", 0), ("inside", args.group_size))
        ]
        try:
            if not can_drop_caches():
                raise NoMemoryGroupError("only root may empty the page cache and make groups")
            outside, inside = measure(title, cases, is_cold=True)
            rows += [outside, inside]
            if not inside["failure"]:
                print(f"inside / outside: {inside['seconds'] / outside['seconds']:.2f} of the time")
        except NoMemoryGroupError as error:
            print(f"skipped: {error}\n")
    write_csv(args.csv, rows)
    raise SystemExit(promises.exit_status(rows))


if __name__ == "__main__":
    main()
