"""Times what touches no weights: whole-process `shardmix plan` on large shapes, and `--help`.

    python -m benchmarks.scale.planning --work-dir WORK

Beside each plan stands the least that any planner must do: a bare python that reads and decodes
the same headers. The checkpoints are sparse files: true headers, no data.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import plan_command
from benchmarks.lib.tables import mib, over, print_table, spread, where
from benchmarks.lib.workspace import Workspace, benchmark, parser

Row = dict[str, Any]
# A program of its own, so that its start-up is counted as shardmix's is.
READ_HEADERS = """
import json, pathlib, struct, sys
for folder in sys.argv[1:]:
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            json.loads(file.read(*struct.unpack("<Q", file.read(8))))
"""


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure and print."""
    rows: list[Row] = []
    output = workspace.scratch("merged")
    large = ("llama-3-70b", "--sparse")
    many = ("moe", "--num-tensors", 90000, "--hidden-size", 2048, "--intermediate-size", 768)
    jobs = {}
    for title, count, name, kind in (
        ("plan 3 x 70B", 3, "llama-3-70b-sparse", large),
        ("plan 10 x 90,000 tensors", 10, "moe-90000-sparse", (*many, "--sparse")),
    ):
        first = workspace.checkpoint(name, *kind)
        copies = [workspace.linked_copy(first, f"{name}-{n}") for n in range(1, count)]
        models = [first, *copies]
        reference = [args.python, "-c", READ_HEADERS, *map(str, models)]
        command = plan_command(args.python, models, output)
        jobs[title] = (command, "python: read the headers", reference)
    click = [args.python, "-c", "import click"]
    shardmix_help = [args.python, "-m", "shardmix", "--help"]
    jobs["--help"] = (shardmix_help, "python: import click", click)
    for number in range(args.rounds + 1):
        for title, (command, _, reference) in jobs.items():
            beside, finished = run_or_exit(reference), run_or_exit(command)
            row = {
                "job": title,
                "round": number,
                "wall_s": round(finished.wall_s, 4),
                "peak_bytes": finished.peak_bytes,
                "reference_wall_s": round(beside.wall_s, 4),
                "reference_peak_bytes": beside.peak_bytes,
            }
            if number:  # round 0 brings files into the cache
                rows.append(row)
            elif title.startswith("plan"):
                plan = finished.report()
                print(f"{title}: {plan['num_tensors']} tensors, {plan['num_models']} models")
    table = []
    for title, (_, reference_title, _) in jobs.items():
        mine = where(rows, job=title)
        wall, beside_it = ([row[name] for row in mine] for name in ("wall_s", "reference_wall_s"))
        peak = max(row["peak_bytes"] for row in mine)
        ratio = over(statistics.median(wall), statistics.median(beside_it))
        table.append([title, spread(wall), mib(peak), reference_title, spread(beside_it), ratio])
    print()
    print_table(("", "wall s", "peak MiB", "beside", "wall s", "ratio"), table)
    return rows, True


if __name__ == "__main__":
    options = {"rounds": (5, "measurements of each"), "csv": (Path("planning.csv"), "raw figures")}
    benchmark(measure, parser("Time shardmix plan and --help.", **options))
