"""Scores three small decoders with LM-Cocktail and with shardmix: time, peak memory, weights."""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.machine import read_into_cache, wait_until_idle
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import SCORINGS, command
from benchmarks.lib.tables import Row, column, mib, over, print_table, spread, where
from benchmarks.lib.workspace import MADE_UP, Workspace, benchmark

MAX_WEIGHT_DIFFERENCE = 1e-4
NUM_MODELS = 3
WARM_UPS = {"shardmix": "import torch, transformers", "LM-Cocktail": "import LM_Cocktail"}
"""What brings each tool into the page cache; shardmix first: its rounds are short."""


def measure_one(tool: str, python: str, models: Sequence[Path], data: Path) -> Row:
    """Run one tool once, its libraries and the models in the page cache."""
    run_or_exit([python, "-c", WARM_UPS[tool]])
    read_into_cache(models)
    os.sync()
    busy = wait_until_idle()
    finished = run_or_exit(command(SCORINGS[tool], python, models, data=data))
    report = finished.report()
    return {
        "wall_s": finished.wall_s,
        # Reading the models before scoring; None if reading is a part of scoring.
        "loading_s": report.get("loading_seconds"),
        # Scoring only, as the tool's process reports it.
        "seconds": report["seconds"],
        "user_s": finished.user_s,
        "system_s": finished.system_s,
        "peak_bytes": finished.peak_bytes,
        # Share of the cores that other processes kept busy just before.
        "busy_before": busy,
        "losses": report["losses"],
        "weights": report["weights"],
    }


def largest_difference(rows: Sequence[Row], figures: str) -> float:
    """Return the most by which two runs, of one tool or of both, differ for one model."""
    by_model = zip(*(row[figures] for row in rows), strict=True)
    return max(max(values) - min(values) for values in by_model)


def print_report(rows: Sequence[Row]) -> None:
    """Print what each took, LM-Cocktail over shardmix, and what both say of each model."""
    table: list[Sequence[object]] = []
    medians, told = {}, {}
    for tool in WARM_UPS:
        mine = where(rows, tool=tool)
        names = ("loading_s", "wall_s", "seconds", "peak_bytes")
        loading, wall, seconds, peaks = (column(mine, name) for name in names)
        medians[tool] = statistics.median(wall), statistics.median(seconds), max(peaks)
        cells = (spread(wall), spread(loading), spread(seconds))
        table.append((f"{tool}, {len(mine)} rounds", *cells, mib(max(peaks))))
        told |= {f"{tool}: loss": mine[0]["losses"], f"{tool}: weight": mine[0]["weights"]}
    pairs = zip(medians["LM-Cocktail"], medians["shardmix"], strict=True)
    wall_ratio, *ratios = (over(theirs, ours, 1) for theirs, ours in pairs)
    table.append(("LM-Cocktail / shardmix", wall_ratio, "", *ratios))
    print()
    print_table(("", "wall s", "loading s", "scoring s", "peak MiB"), table)
    print()
    figures = enumerate(zip(*told.values(), strict=True))
    print_table(("", *told), [(f"model {n}", *(f"{one:.7f}" for one in row)) for n, row in figures])
    noisy = sum(row["busy_before"] > 0.2 for row in rows)
    print(f"\n{noisy} of {len(rows)} measurements began with other processes on the cores")


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure and report."""
    rounds = {"shardmix": args.rounds, "LM-Cocktail": args.lm_cocktail_rounds}
    rows: list[Row] = []
    data = workspace.examples(args.data)
    models = [workspace.lasting(f"decoder-{seed}") for seed in range(NUM_MODELS)]
    for seed, model in enumerate(models):
        if not (model / "config.json").exists():
            words = [model, "--decoder-seed", str(seed), "--texts", data]
            run_or_exit([args.python, "-m", "benchmarks.scoring.decoders", *words])
    for tool in WARM_UPS:
        python = workspace.python(SCORINGS[tool].environment)
        for number in range(1, rounds[tool] + 1):
            figures = measure_one(tool, python, models, data)
            rows.append({"tool": tool, "round": number, **figures})
            print(f"round {number}: {tool:12}{rows[-1]['wall_s']:8.2f} s wall")
    print_report(rows)
    losses, weights = (largest_difference(rows, figures) for figures in ("losses", "weights"))
    print(f"largest difference: {losses:.2e} in a loss, {weights:.2e} in a weight")
    return rows, weights <= MAX_WEIGHT_DIFFERENCE


if __name__ == "__main__":
    benchmark(
        measure,
        ["shardmix", "lm-cocktail"],
        rounds=(3, "measurements of shardmix"),
        lm_cocktail_rounds=(1, "and of LM-Cocktail"),
        data=(MADE_UP, "file of examples"),
        csv=(Path("scoring.csv"), "raw figures"),
    )
