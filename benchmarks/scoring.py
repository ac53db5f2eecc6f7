"""Scores three small decoders with LM-Cocktail and with shardmix: time, peak memory, weights.

    python benchmarks/scoring.py --work-dir WORK --data llm_examples.json

Both get the same models, examples and settings, in processes of their own. Ends with status 1 if
their weights differ by more than 1e-4.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lm_cocktail_command
import shardmix_command
from harness import (
    BENCHMARKS,
    OFFLINE,
    Workspace,
    mib,
    print_table,
    run_or_exit,
    spread,
    wait_until_idle,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import read_into_cache
from scoring_task import ScoringTask, made_up_examples, read_examples, write_examples

MAX_WEIGHT_DIFFERENCE = 1e-4
NUM_MODELS = 3


@dataclass(frozen=True, slots=True)
class Contestant:
    """A tool: what to run how often, and what brings it into the page cache."""

    tool: str
    command: Sequence[str]
    rounds: int
    warm_up: Sequence[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: a row of the CSV."""

    tool: str
    round: int
    wall_s: float
    loading_s: float | None
    """Reading the models before scoring; None where reading is a part of scoring."""
    seconds: float
    """Scoring alone, as the tool's process reports it."""
    user_s: float
    system_s: float
    peak_bytes: int
    busy_before: float
    """Share of the cores that other processes kept busy just before."""
    losses: list[float]
    weights: list[float]


def contestants(
    args: argparse.Namespace, models: Sequence[Path], task: ScoringTask
) -> list[Contestant]:
    """Both tools, shardmix first: its rounds are short."""
    extra = ["--device", "cpu"]
    return [
        Contestant(
            "shardmix",
            shardmix_command.score_command(args.python, models, task, extra=extra),
            args.rounds,
            [args.python, "-c", "import torch, transformers"],
        ),
        Contestant(
            "LM-Cocktail",
            lm_cocktail_command.score_command(args.lm_cocktail_python, models, task),
            args.lm_cocktail_rounds,
            [args.lm_cocktail_python, "-c", "import LM_Cocktail"],
        ),
    ]


def measure(contestant: Contestant, number: int, models: Sequence[Path]) -> Sample:
    """Run one contestant once, its libraries and the models in the page cache."""
    run_or_exit(contestant.warm_up, environment=OFFLINE)
    read_into_cache(models)
    os.sync()
    busy = wait_until_idle()
    finished = run_or_exit(contestant.command, environment=OFFLINE)
    report = shardmix_command.report_of(finished)
    return Sample(
        tool=contestant.tool,
        round=number,
        wall_s=round(finished.wall_s, 3),
        loading_s=report.get("loading_seconds"),
        seconds=report["seconds"],
        user_s=round(finished.user_s, 3),
        system_s=round(finished.system_s, 3),
        peak_bytes=finished.peak_bytes,
        busy_before=busy,
        losses=report["losses"],
        weights=report["weights"],
    )


def largest_difference(
    samples: Sequence[Sample], figures: Callable[[Sample], list[float]]
) -> float:
    """The most by which two runs, of one tool or of both, differ in a figure of one model."""
    by_model = zip(*map(figures, samples), strict=True)
    return max(max(values) - min(values) for values in by_model)


def print_report(by_tool: dict[str, list[Sample]]) -> None:
    """Print what each took, LM-Cocktail over shardmix, and what both say of each model."""

    def medians(tool: str) -> tuple[float, float, float]:
        mine = by_tool[tool]
        return (
            statistics.median(sample.wall_s for sample in mine),
            statistics.median(sample.seconds for sample in mine),
            max(sample.peak_bytes for sample in mine),
        )

    rows: list[tuple[str, ...]] = []
    for tool, samples in by_tool.items():
        loading = [sample.loading_s for sample in samples if sample.loading_s is not None]
        rows.append(
            (
                f"{tool}, {len(samples)} rounds",
                spread([sample.wall_s for sample in samples]),
                spread(loading) if loading else "",
                spread([sample.seconds for sample in samples]),
                mib(medians(tool)[2]),
            )
        )
    pairs = zip(medians("LM-Cocktail"), medians("shardmix"), strict=True)
    wall, seconds, peak = (f"{theirs / ours:.1f}" for theirs, ours in pairs)
    rows.append(("LM-Cocktail / shardmix", wall, "", seconds, peak))
    print()
    print_table(("", "wall s", "loading s", "scoring s", "peak MiB"), rows)
    print()
    header = ("", *(f"{tool}: {figure}" for tool in by_tool for figure in ("loss", "weight")))
    print_table(
        header,
        [
            (
                f"model {number}",
                *(
                    f"{figures[number]:.7f}"
                    for samples in by_tool.values()
                    for figures in (samples[0].losses, samples[0].weights)
                ),
            )
            for number in range(NUM_MODELS)
        ],
    )


def main() -> None:
    """Measure and report; exit with 1 where the weights differ."""
    parser = workspace_arguments("Score with LM-Cocktail and with shardmix, side by side.")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of shardmix")
    parser.add_argument("--lm-cocktail-rounds", type=int, default=1, help="and of LM-Cocktail")
    parser.add_argument("--data", type=Path, help="file of examples; default: 45 made-up ones")
    parser.add_argument("--csv", type=Path, default=Path("scoring.csv"), help="raw figures")
    lm_cocktail_command.add_arguments(parser)
    args = parser.parse_args()
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        args.lm_cocktail_python = lm_cocktail_command.lm_cocktail_python(
            args.lm_cocktail_python, workspace
        )
        print_facts(args.work_dir, pythons=[args.python, args.lm_cocktail_python])
        examples = read_examples(args.data) if args.data else made_up_examples()
        path = write_examples(workspace.scratch("examples.json"), examples)
        models = [workspace.lasting(f"decoder-{seed}") for seed in range(NUM_MODELS)]
        for seed, model in enumerate(models):
            if not model.exists():
                script = BENCHMARKS / "small_decoders.py"
                words = ["decoder", model, "--seed", str(seed), "--texts", path]
                run_or_exit([args.python, script, *words])
        print(f"{len(examples)} examples: {args.data.name if args.data else 'made up'}")
        by_tool: dict[str, list[Sample]] = {}
        for contestant in contestants(args, models, ScoringTask(path)):
            samples = by_tool.setdefault(contestant.tool, [])
            for number in range(1, contestant.rounds + 1):
                samples.append(measure(contestant, number, models))
                print(f"round {number}: {contestant.tool:12}{samples[-1].wall_s:8.2f} s wall")
    everything = [sample for samples in by_tool.values() for sample in samples]
    print_report(by_tool)
    losses = largest_difference(everything, lambda sample: sample.losses)
    weights = largest_difference(everything, lambda sample: sample.weights)
    noisy = sum(sample.busy_before > 0.2 for sample in everything)
    print(f"\n{noisy} of {len(everything)} measurements began with other processes on the cores")
    print(f"largest difference: {losses:.2e} in a loss, {weights:.2e} in a weight")
    write_csv(args.csv, [asdict(sample) for sample in everything])
    raise SystemExit(0 if weights <= MAX_WEIGHT_DIFFERENCE else 1)


if __name__ == "__main__":
    main()
