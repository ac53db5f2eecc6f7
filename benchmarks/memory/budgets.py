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
from benchmarks.lib.control_group import NoMemoryGroupError, memory_group
from benchmarks.lib.machine import can_drop_caches, drop_caches, print_facts
from benchmarks.lib.processes import Finished, run
from benchmarks.lib.programs import budget_option, merge_command, split_options
from benchmarks.lib.tables import Size, mib, print_table, write_csv
from benchmarks.lib.workspace import Workspace, parser, remove

NUM_MODELS = (2, 8)
IO_MODES = ("mmap", "pread")
TOO_SMALL = Size("32MiB")
"""Less than python with torch takes for itself."""
HEADER = ("case", "models", "io", *promises.HEADER, "chunks", "s", "promise")
Row = dict[str, object]


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

    def row(self, finished: Finished) -> Row:
        """Return the row of the CSV."""
        judged = promises.judged(finished, self.budget_bytes, is_refused=self.is_refused)
        return {"case": self.title, "models": len(self.models), "io": self.io, **judged}


def cells(row: Row) -> list[object]:
    """Return the cells of the table."""
    seconds = "" if row["failure"] else f"{row['seconds']:.2f}"
    start = (row["case"], row["models"], row["io"], *promises.cells(row))
    return [*start, promises.chunks(row), seconds, row["promise"]]


def main() -> None:
    """Measure everything; exit with 1 if a peak was above what was promised."""
    args = parser(
        "Hold shardmix's peak memory against what it promised.",
        budgets=(
            [Size(size) for size in ("350MiB", "400MiB", "600MiB", "1GiB")],
            "of --max-memory",
        ),
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

        def command(case: Case) -> list[str]:
            options = [*budget_option(case.budget_bytes), "--io", case.io]
            options += split_options(args, "shardmix")
            python = args.python
            return merge_command(
                "shardmix", python, case.models, output, fsync=True, options=options
            )

        def measure(title: str, cases: Sequence[Case]) -> list[Row]:
            rows = []
            for case in cases:
                os.sync()
                remove(output)
                rows.append(case.row(run(command(case))))
            remove(output)
            print(f"{title}\n")
            print_table(HEADER, map(cells, rows))
            promises.print_failures(rows)
            return rows

        def measure_in_group(case: Case) -> list[Row]:
            """The merge inside a group, which is charged for its page cache too, and outside."""
            size = args.group_size
            print(
                f"Inside a memory control group of {mib(size)} MiB, sources not in the page cache\n"
            )
            if not can_drop_caches():
                print("skipped: only root may empty the page cache and make control groups\n")
                return []
            rows, table = [], []
            try:
                with memory_group(size) as group:
                    for where in ("outside", "inside"):
                        remove(output)
                        drop_caches()
                        words = command(case)
                        rows.append(
                            case.row(run(group.wrap(words) if where == "inside" else words))
                        )
                        charged = [mib(group.peak_bytes()), str(group.oom_kills())]
                        charged = charged if where == "inside" else ["-", "-"]
                        table.append([where, *cells(rows[-1])[1:], *charged])
            except NoMemoryGroupError as error:
                print(f"skipped: {error}\n")
                return []
            finally:
                remove(output)
            print_table((*HEADER, "charged MiB", "OOM kills"), table)
            promises.print_failures(rows)
            if not any(row["failure"] for row in rows):
                outside, inside = (float(str(row["seconds"])) for row in rows)
                print(f"inside / outside: {inside / outside:.2f} of the time")
            return rows

        originals = workspace.checkpoints(args.preset, "ab", "llama", "--preset", args.preset)
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
        rows += measure_in_group(Case(args.preset, llamas[:2], "mmap", budget))
    write_csv(args.csv, rows)
    raise SystemExit(promises.exit_status(rows))


if __name__ == "__main__":
    main()
