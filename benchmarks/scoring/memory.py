"""Holds the peak memory and the reads of `shardmix score` against what it promises.

    python -m benchmarks.scoring.memory --work-dir WORK --data llm_examples.json

Two tables: a bf16 llama of 2.2B parameters (4.5 GB), scored as two models, at several budgets; and
the same inside a memory control group smaller than one model, beside transformers with accelerate's
disk offload. Ends with status 1 if a promise was broken.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib import promises
from benchmarks.lib.control_group import NoMemoryGroupError, memory_group, run_within
from benchmarks.lib.machine import can_drop_caches, drop_caches, print_facts, wait_until_idle
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import budget_option, score_command
from benchmarks.lib.promises import Row
from benchmarks.lib.tables import Size, mib, over, print_table, write_csv
from benchmarks.lib.workspace import Workspace, parser
from benchmarks.scoring.task import copy_examples

MAX_READS = 1.1
"""Times the checkpoints' bytes that a scoring may read: each once, and a little."""
TOO_SMALL = Size("64MiB")
"""Less than python with torch takes for itself."""
READS = {
    # Weights, all models together, as the tool counts them.
    "bytes_read": "weights read",
    # What read calls returned to the process, and what came from disk; libraries included.
    "read_calls_bytes": "read calls",
    "disk_bytes": "from disk",
}
HEADER = ("case", *promises.HEADER, *READS.values(), "s", "promise", "charged MiB", "OOM kills")


@dataclass(frozen=True, slots=True)
class Case:
    """One scoring to measure."""

    title: str
    tool: str
    budget_bytes: int = 0
    """`--max-memory`; 0 leaves it to shardmix."""
    group_bytes: int = 0
    """Size of the memory control group that it runs in; 0 for none."""
    is_refused: bool = False
    """Whether the budget is too small for any scoring, so that shardmix must say so."""


def measure(case: Case, python: str, models: Sequence[Path], data: Path) -> Row:
    """Score once, with the models out of the page cache and the libraries in it."""
    print(f"scoring: {case.title} ...", file=sys.stderr)
    if can_drop_caches():
        drop_caches()
    run_or_exit([python, "-c", "import torch, transformers, accelerate"])
    wait_until_idle()
    options = budget_option(case.budget_bytes)
    command = score_command(case.tool, python, models, data, options=options)
    finished, charged = run_within(case.group_bytes, command)
    row = promises.judged(finished, case.budget_bytes, is_refused=case.is_refused)
    shards = [path for model in models for path in model.glob("*.safetensors")]
    checkpoint_bytes = sum(path.stat().st_size for path in shards)
    bytes_read = 0 if finished.returncode else finished.report().get("bytes_read", 0)
    if case.tool != "shardmix" and not finished.returncode:
        row["promise"] = "-"
    elif bytes_read > MAX_READS * checkpoint_bytes:
        row["promise"] = "BROKEN: reads"
    return {
        "case": case.title,
        "tool": case.tool,
        "group_bytes": case.group_bytes,
        **row,
        "charged_mib": charged[0],
        "oom_kills": charged[1],
        "checkpoint_bytes": checkpoint_bytes,
        "bytes_read": bytes_read,
        "read_calls_bytes": finished.read_calls_bytes,
        "disk_bytes": finished.disk_bytes,
        "wall_s": finished.wall_s,
    }


def print_rows(rows: Sequence[Row]) -> None:
    """Print the scorings side by side and, below, what those without figures said."""
    table = []
    for row in rows:
        figures = [""] * (len(READS) + 1)
        if not row["failure"]:
            figures = [over(row[name], row["checkpoint_bytes"]) for name in READS]
            figures.append(f"{row['seconds']:.1f}")
        last = (row[name] for name in ("promise", "charged_mib", "oom_kills"))
        table.append([row["case"], *promises.cells(row), *figures, *last])
    print_table(HEADER, table)
    promises.print_failures(rows)


def group_cases(args: argparse.Namespace) -> list[Case]:
    """Return both tools outside and inside a control group; without the right to one, outside."""
    budgets = {"shardmix": min(args.budgets), "accelerate": 0}
    cases = [
        Case(f"{tool}{place}", tool, budget, group)
        for tool, budget in budgets.items()
        for place, group in (("", 0), (", inside", args.group_size))
        if args.accelerate or tool == "shardmix"
    ]
    try:
        with memory_group(args.group_size):
            return cases
    except NoMemoryGroupError as error:
        print(f"inside a control group: skipped, {error}\n")
        return [case for case in cases if not case.group_bytes]


def main() -> None:
    """Measure everything; exit with 1 if more was held or read than promised."""
    args = parser(
        "Hold the peak memory of shardmix score against its promise.",
        budgets=([Size(size) for size in ("1.5GiB", "2GiB", "4GiB")], "values of --max-memory"),
        preset=("llama-2b", "shape of the checkpoint"),
        data=(Path, "file of examples; default: 45 made-up ones"),
        num_examples=(8, "the first so many"),
        group_size=(Size("2GiB"), "of the control group"),
        accelerate=(True, "beside accelerate"),
        csv=(Path("scoring-memory.csv"), "raw figures"),
    ).parse_args()
    with Workspace(args) as workspace:
        print_facts(args.work_dir, args.python)
        model = workspace.checkpoint(args.preset, args.preset)
        if not (model / "tokenizer.json").exists():
            run_or_exit([args.python, "-m", "benchmarks.scoring.decoders", model])
        models = [model, workspace.linked_copy(model, f"{args.preset}-copy")]
        data = copy_examples(args.data, workspace.scratch("examples.json"), args.num_examples)
        if not can_drop_caches():
            print("page cache: as it is, only root may empty it")
        os.sync()
        print("\nBudgets\n")
        cases = [Case(args.preset, "shardmix", budget) for budget in (*args.budgets, 0)]
        cases.append(Case("too small a budget", "shardmix", TOO_SMALL, is_refused=True))
        rows = [measure(case, args.python, models, data) for case in cases]
        print_rows(rows)
        print(f"Beside accelerate, and inside a control group of {mib(args.group_size)} MiB\n")
        compared = [measure(case, args.python, models, data) for case in group_cases(args)]
        print_rows(compared)
    rows += compared
    write_csv(args.csv, rows)
    raise SystemExit(promises.exit_status([row for row in rows if row["tool"] == "shardmix"]))


if __name__ == "__main__":
    main()
