"""LM-Cocktail's experiments on small models: `python -m benchmarks.study --work-dir DIR`.

Trains two families, a small Llama and all-MiniLM-L6-v2, each a base and fine-tunes of it; mixes
them by fixed weights and by weights from five examples; measures on what no training has seen.
Writes `measurements.csv` and `losses.csv`, and prints the tables of `docs/study.md`.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before the imports that read it: everything here works from local files.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.study.encoder import prepare_encoders
from benchmarks.study.mixing import (
    choose_temperature,
    compute_all_losses,
    measure_by_data,
    measure_singles,
    measure_tuned_tasks,
)
from benchmarks.study.rewriting import prepare_decoders
from benchmarks.study.tables import new_task_table, pool_table, temperature_table, tuned_table

PREPARE = {"decoder": prepare_decoders, "encoder": prepare_encoders}


def main(arguments: list[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("study-output"),
        help="folder for models and figures, about 750 MB (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    parser.add_argument(
        "--families", nargs="+", choices=PREPARE, default=list(PREPARE), help="default: both"
    )
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    # A process for each family, of one thread: matrices this small gain little from a second one,
    # and sums then come out the same whatever else runs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(options.families), mp_context=context) as pool:
        running = [
            pool.submit(study_family, name, options.work_dir / name, options.seed)
            for name in options.families
        ]
        results = [future.result() for future in running]

    write_csv(options.work_dir / "measurements.csv", [row for each in results for row in each.rows])
    write_csv(options.work_dir / "losses.csv", [row for each in results for row in each.losses])
    tables = "\n".join(table for each in results for table in each.tables)
    (options.work_dir / "tables.md").write_text(tables, encoding="utf-8")
    print(f"\n{tables}\n{time.perf_counter() - started:.0f} s in all")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one family."""

    rows: list[dict[str, Any]]
    """Measurements, by column."""
    losses: list[dict[str, Any]]
    """Losses on five examples, by column."""
    tables: list[str]
    """In Markdown."""


def study_family(name: str, work_dir: Path, seed: int) -> Result:
    """Train a family and run the experiments; temperatures come from development tasks alone."""
    transformers_logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)

    started = time.perf_counter()
    family = PREPARE[name](work_dir, seed)
    print(f"{name}: models ready after {time.perf_counter() - started:.0f} s", flush=True)
    rows = list(measure_singles(family))
    losses = compute_all_losses(family)
    rows += measure_by_data(family, losses, "new")
    rows += measure_by_data(family, losses, "pool")
    rows += measure_tuned_tasks(family, losses, choose_temperature(family, rows, "new"))
    print(f"{name}: measured after {time.perf_counter() - started:.0f} s", flush=True)
    return Result(
        rows=[{**asdict(row), "accuracy": f"{row.accuracy:.2f}"} for row in rows],
        losses=[
            {"family": name, "task": task, "draw": draw, "model": model, "loss": f"{loss:.5f}"}
            for (task, draw), by_model in losses.items()
            for model, loss in by_model.items()
        ],
        tables=[
            tuned_table(family, rows),
            new_task_table(family, rows, losses),
            pool_table(family, rows),
            temperature_table(family, rows),
        ],
    )


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write dictionaries of the same keys, a header first."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
