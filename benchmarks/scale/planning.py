"""Times what touches no weights: whole-process `shardmix plan` on large shapes, and `--help`."""

import argparse
import statistics
from pathlib import Path

from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import PLAN, command
from benchmarks.lib.tables import Row, column, mib, over, print_table, spread
from benchmarks.lib.workspace import Workspace, benchmark

# A program of its own, so that its start-up is counted as shardmix's is.
READ_HEADERS = """
import json, pathlib, struct, sys
for folder in sys.argv[1:]:
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            json.loads(file.read(*struct.unpack("<Q", file.read(8))))
"""
MANY = ("moe", "--num-tensors", 90000, "--hidden-size", 2048, "--moe-intermediate-size", 768)
PLANS = {
    "plan 3 x 70B": (3, "llama-3-70b-sparse", "llama-3-70b"),
    "plan 10 x 90,000 tensors": (10, "moe-90000-sparse", *MANY),
}


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure and print."""
    rows: list[Row] = []
    output = workspace.scratch("merged")
    jobs = {}
    for title, (count, name, *kind) in PLANS.items():
        first = workspace.checkpoint(name, *kind, "--sparse")
        models = [first, *workspace.linked_copies([first], name, count - 1)]
        reference = [args.python, "-c", READ_HEADERS, *models]
        planned = command(PLAN, args.python, models, output=output)
        jobs[title] = (planned, "python: read the headers", reference)
    click = [args.python, "-c", "import click"]
    jobs["--help"] = ([args.python, "-m", "shardmix", "--help"], "python: import click", click)
    for number in range(args.rounds + 1):
        for title, (words, _, reference) in jobs.items():
            beside, finished = run_or_exit(reference), run_or_exit(words)
            row = {
                "job": title,
                "round": number,
                "wall_s": finished.wall_s,
                "peak_bytes": finished.peak_bytes,
                "reference_wall_s": beside.wall_s,
                "reference_peak_bytes": beside.peak_bytes,
            }
            if number:  # round 0 brings files into the cache
                rows.append(row)
            elif title in PLANS:
                plan = finished.report()
                print(f"{title}: {plan['num_tensors']} tensors, {plan['num_models']} models")
    table = []
    for title, (_, reference_title, _) in jobs.items():
        names = ("wall_s", "reference_wall_s", "peak_bytes")
        wall, beside_it, peaks = (column(rows, name, job=title) for name in names)
        ratio = over(*map(statistics.median, (wall, beside_it)))
        table.append(
            [title, spread(wall), mib(max(peaks)), reference_title, spread(beside_it), ratio]
        )
    print()
    print_table(("", "wall s", "peak MiB", "beside", "wall s", "ratio"), table)
    return rows, True


if __name__ == "__main__":
    rounds, csv = (5, "measurements of each"), (Path("planning.csv"), "raw figures")
    benchmark(measure, rounds=rounds, csv=csv)
