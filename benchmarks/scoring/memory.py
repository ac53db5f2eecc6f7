"""Holds the peak memory and the reads of `shardmix score` against what it promises."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import promises
from benchmarks.lib.control_group import NoMemoryGroupError, memory_group
from benchmarks.lib.machine import can_drop_caches, drop_caches, wait_until_idle
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import SCORINGS, command
from benchmarks.lib.promises import BASIC, GROUP, Case
from benchmarks.lib.tables import Row, Size, mib, over, where
from benchmarks.lib.workspace import MADE_UP, Workspace, benchmark

MAX_READS = 1.1
"""Times the checkpoints' bytes that a scoring may read: each once, and a little."""
TOO_SMALL = Size("64MiB")
"""Less than python with torch takes for itself."""


READS = {
    # Weights, all models together, as the tool counts them.
    "weights read": "bytes_read",
    # What read calls returned to the process, and what came from disk; libraries included.
    "read calls": "read_calls_bytes",
    "from disk": "disk_bytes",
}
CELLS = {
    title: lambda row, name=name: over(row[name], row["checkpoint_bytes"])
    for title, name in READS.items()
}
TITLES = ("case", *BASIC, *READS, "s", "promise", *GROUP)


def measure_one(case: Case, python: str, checkpoint_bytes: int) -> Row:
    """Score once, with the models out of the page cache and the libraries in it."""
    print(f"scoring: {case.named['case']} ...", file=sys.stderr)
    if can_drop_caches():
        drop_caches()
    run_or_exit([python, "-c", "import torch, transformers, accelerate"])
    wait_until_idle()
    row, finished = promises.measure(case)
    bytes_read = 0 if row["failure"] else finished.report().get("bytes_read", 0)
    if row["tool"] != "shardmix" and not row["failure"]:
        row["promise"] = "-"
    elif bytes_read > MAX_READS * checkpoint_bytes:
        row["promise"] = "BROKEN: reads"
    return row | {
        "checkpoint_bytes": checkpoint_bytes,
        "bytes_read": bytes_read,
        "read_calls_bytes": finished.read_calls_bytes,
        "disk_bytes": finished.disk_bytes,
        "wall_s": finished.wall_s,
    }


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure everything, and print."""
    model = workspace.checkpoint(args.preset, args.preset)
    if not (model / "tokenizer.json").exists():
        run_or_exit([args.python, "-m", "benchmarks.scoring.decoders", model])
    models = [model, *workspace.linked_copies([model], args.preset, 1)]
    shards = [path for folder in models for path in folder.glob("*.safetensors")]
    checkpoint_bytes = sum(path.stat().st_size for path in shards)
    data = workspace.examples(args.data, args.num_examples)
    if not can_drop_caches():
        print("page cache: as it is, only root may empty it")
    os.sync()

    def case(title: str, *budget: int, tool: str = "shardmix", **how: Any) -> Case:
        words = command(SCORINGS[tool], args.python, models, data=data)
        return Case({"case": title, "tool": tool}, words, *budget, **how)

    def measure_all(title: str, cases: Sequence[Case]) -> list[Row]:
        print(title)
        rows = [measure_one(each, args.python, checkpoint_bytes) for each in cases]
        promises.print_rows(TITLES, rows, CELLS)
        return rows

    cases = [case(args.preset, budget) for budget in (*args.budgets, 0)]
    cases.append(case("too small a budget", TOO_SMALL, is_refused=True))
    rows = measure_all("\nBudgets\n", cases)
    groups = {"": 0, ", inside": args.group_size}
    try:
        with memory_group(args.group_size):
            pass
    except NoMemoryGroupError as error:
        print(f"inside a control group: skipped, {error}\n")
        del groups[", inside"]
    budgets = {"shardmix": min(args.budgets)} | ({"accelerate": 0} if args.accelerate else {})
    cases = [
        case(f"{tool}{place}", budget, tool=tool, group_bytes=nbytes)
        for tool, budget in budgets.items()
        for place, nbytes in groups.items()
    ]
    inside = f"inside a control group of {mib(args.group_size)} MiB"
    rows += measure_all(f"Beside accelerate, and {inside}\n", cases)
    return rows, promises.are_kept(where(rows, tool="shardmix"))


if __name__ == "__main__":
    benchmark(
        measure,
        budgets=([Size(size) for size in ("1.5GiB", "2GiB", "4GiB")], "values of --max-memory"),
        preset=("llama-2b", "shape of the checkpoint"),
        data=(MADE_UP, "file of examples"),
        num_examples=(8, "the first so many"),
        group_size=(Size("2GiB"), "of the control group"),
        accelerate=(True, "beside accelerate"),
        csv=(Path("scoring-memory.csv"), "raw figures"),
    )
