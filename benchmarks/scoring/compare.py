"""Scores three small decoders with LM-Cocktail and with shardmix: time, peak memory, weights.

    python -m benchmarks.scoring.compare --work-dir WORK --data llm_examples.json

Both get the same models, examples and settings, in processes of their own. Ends with status 1 if
their weights differ by more than 1e-4.
"""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import print_facts, read_into_cache, wait_until_idle
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import SCORINGS, Pythons, score_command
from benchmarks.lib.tables import mib, over, print_table, spread, write_csv
from benchmarks.lib.workspace import Workspace, parser
from benchmarks.scoring.task import copy_examples

MAX_WEIGHT_DIFFERENCE = 1e-4
NUM_MODELS = 3
WARM_UPS = {"shardmix": "import torch, transformers", "LM-Cocktail": "import LM_Cocktail"}
"""What brings each tool into the page cache; shardmix first: its rounds are short."""


Sample = dict[str, Any]
"""One measurement: a row of the CSV."""


def measure(tool: str, number: int, python: str, models: Sequence[Path], data: Path) -> Sample:
    """Run one tool once, its libraries and the models in the page cache."""
    run_or_exit([python, "-c", WARM_UPS[tool]])
    read_into_cache(models)
    os.sync()
    busy = wait_until_idle()
    finished = run_or_exit(score_command(tool, python, models, data))
    report = finished.report()
    return {
        "tool": tool,
        "round": number,
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


def largest_difference(samples: Sequence[Sample], figures: str) -> float:
    """Return the most by which two runs, of one tool or of both, differ for one model."""
    by_model = zip(*(sample[figures] for sample in samples), strict=True)
    return max(max(values) - min(values) for values in by_model)


def print_report(by_tool: dict[str, list[Sample]]) -> None:
    """Print what each took, LM-Cocktail over shardmix, and what both say of each model."""
    rows: list[Sequence[object]] = []
    medians = {}
    for tool, samples in by_tool.items():
        loading, wall, seconds, peaks = (
            [one[name] for one in samples if one[name] is not None]
            for name in ("loading_s", "wall_s", "seconds", "peak_bytes")
        )
        peak = max(peaks)
        medians[tool] = statistics.median(wall), statistics.median(seconds), peak
        told = spread(loading) if loading else ""
        name = f"{tool}, {len(samples)} rounds"
        rows.append((name, spread(wall), told, spread(seconds), mib(peak)))
    pairs = zip(medians["LM-Cocktail"], medians["shardmix"], strict=True)
    wall_ratio, *ratios = (over(theirs, ours, 1) for theirs, ours in pairs)
    rows.append(("LM-Cocktail / shardmix", wall_ratio, "", *ratios))
    print()
    print_table(("", "wall s", "loading s", "scoring s", "peak MiB"), rows)
    print()
    firsts = [samples[0] for samples in by_tool.values()]
    header = ("", *(f"{tool}: {figure}" for tool in by_tool for figure in ("loss", "weight")))
    figures = [
        [values[number] for first in firsts for values in (first["losses"], first["weights"])]
        for number in range(NUM_MODELS)
    ]
    print_table(
        header,
        [(f"model {n}", *(f"{one:.7f}" for one in row)) for n, row in enumerate(figures)],
    )


def main() -> None:
    """Measure and report; exit with 1 if the weights differ."""
    options = parser(
        "Score with LM-Cocktail and with shardmix, side by side.",
        rounds=(3, "measurements of shardmix"),
        lm_cocktail_rounds=(1, "and of LM-Cocktail"),
        data=(Path, "file of examples; default: 45 made-up ones"),
        csv=(Path("scoring.csv"), "raw figures"),
    )
    Pythons.add_arguments(options, "lm-cocktail")
    args = options.parse_args()
    rounds = {"shardmix": args.rounds, "LM-Cocktail": args.lm_cocktail_rounds}
    by_tool: dict[str, list[Sample]] = {tool: [] for tool in WARM_UPS}
    with Workspace(args) as workspace:
        found = Pythons(args, workspace)
        pythons = {tool: found[SCORINGS[tool].environment] for tool in WARM_UPS}
        print_facts(args.work_dir, *pythons.values())
        data = copy_examples(args.data, workspace.scratch("examples.json"))
        models = [workspace.lasting(f"decoder-{seed}") for seed in range(NUM_MODELS)]
        for seed, model in enumerate(models):
            if not (model / "config.json").exists():
                words = [model, "--decoder-seed", str(seed), "--texts", data]
                run_or_exit([args.python, "-m", "benchmarks.scoring.decoders", *words])
        for tool, samples in by_tool.items():
            for number in range(1, rounds[tool] + 1):
                samples.append(measure(tool, number, pythons[tool], models, data))
                print(f"round {number}: {tool:12}{samples[-1]['wall_s']:8.2f} s wall")
    everything = [sample for samples in by_tool.values() for sample in samples]
    print_report(by_tool)
    losses = largest_difference(everything, "losses")
    weights = largest_difference(everything, "weights")
    noisy = sum(sample["busy_before"] > 0.2 for sample in everything)
    print(f"\n{noisy} of {len(everything)} measurements began with other processes on the cores")
    print(f"largest difference: {losses:.2e} in a loss, {weights:.2e} in a weight")
    write_csv(args.csv, everything)
    raise SystemExit(0 if weights <= MAX_WEIGHT_DIFFERENCE else 1)


if __name__ == "__main__":
    main()
