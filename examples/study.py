"""LM-Cocktail's experiments on small models: `python examples/study.py --work-dir DIR`.

Trains two families, a small Llama and all-MiniLM-L6-v2, each a base and fine-tunes of it; mixes
them by fixed weights and by weights from five examples; measures on what no training has seen.
Writes `measurements.csv` and `losses.csv`, and prints the tables of `docs/study.md`.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before the imports that read it: everything here works from local files.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from study_encoder import prepare_encoders
from study_mixing import (
    Family,
    Losses,
    Row,
    choose_temperature,
    compute_all_losses,
    measure_new_tasks,
    measure_singles,
    measure_tuned_tasks,
)
from study_rewriting import prepare_decoders
from study_tables import new_task_table, temperature_table, tuned_table
from transformers.utils import logging as transformers_logging

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

    transformers_logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    # Matrices this small gain little from a second thread, and one gives the same sums everywhere.
    torch.set_num_threads(1)

    all_rows: list[Row] = []
    all_losses: list[dict[str, Any]] = []
    tables: list[str] = []
    for name in options.families:
        started = time.perf_counter()
        family = PREPARE[name](options.work_dir / name, options.seed)
        print(f"{name}: models ready after {time.perf_counter() - started:.0f} s", flush=True)
        rows, losses, temperature = measure_family(family)
        print(f"{name}: measured after {time.perf_counter() - started:.0f} s", flush=True)
        all_rows += rows
        all_losses += [
            {"family": name, "task": task, "draw": draw, "model": model, "loss": f"{loss:.5f}"}
            for (task, draw), by_model in losses.items()
            for model, loss in by_model.items()
        ]
        tables += [
            tuned_table(family, rows, temperature),
            temperature_table(family, rows, temperature),
            new_task_table(family, rows, losses, temperature),
        ]
    write_csv(options.work_dir / "measurements.csv", [asdict(row) for row in all_rows])
    write_csv(options.work_dir / "losses.csv", all_losses)
    (options.work_dir / "tables.md").write_text("\n".join(tables), encoding="utf-8")
    print("\n" + "\n".join(tables))


def measure_family(family: Family) -> tuple[list[Row], Losses, float]:
    """Run both experiments; the temperature of the second comes from development tasks alone."""
    rows = list(measure_singles(family))
    losses = compute_all_losses(family)
    rows += measure_new_tasks(family, losses)
    temperature = choose_temperature(family, rows)
    rows += measure_tuned_tasks(family, losses, temperature)
    return rows, losses, temperature


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write dictionaries of the same keys, a header first."""
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
