"""LM-Cocktail's experiments on small models: `python -m benchmarks.study --work-dir DIR`.

Writes `measurements.csv` and `losses.csv`, and prints the tables of `docs/study.md`.
"""

import argparse
import itertools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Before the imports that read it: everything here works from local files.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.lib.tables import Row, write_csv
from benchmarks.study import mixing, tables
from benchmarks.study.decoder import prepare_decoders
from benchmarks.study.encoder import prepare_encoders

PREPARE = {"decoder": prepare_decoders, "encoder": prepare_encoders}


def main(arguments: list[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, work_dir = parser.add_argument, Path("study-output")
    add("--work-dir", type=Path, default=work_dir, help="models and figures, about 750 MB")
    add("--seed", type=int, default=0, help="of everything")
    add("--families", nargs="+", choices=PREPARE, default=list(PREPARE), help="which to study")
    options = parser.parse_args(arguments)

    started = time.perf_counter()
    # A process for each family, of one thread: matrices this small gain little from a second one,
    # and sums then come out the same whatever else runs.
    context = multiprocessing.get_context("spawn")
    names, work_dir = options.families, options.work_dir
    with ProcessPoolExecutor(max_workers=len(names), mp_context=context) as pool:
        folders, seeds = (work_dir / name for name in names), itertools.repeat(options.seed)
        results = list(pool.map(study_family, names, folders, seeds))
    rows, losses, texts = (list(itertools.chain(*each)) for each in zip(*results, strict=True))
    write_csv(work_dir / "measurements.csv", rows)
    write_csv(work_dir / "losses.csv", losses)
    text = "\n".join(texts)
    (work_dir / "tables.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{time.perf_counter() - started:.0f} s in all")


def study_family(name: str, work_dir: Path, seed: int) -> tuple[list[Row], list[Row], list[str]]:
    """Train a family and run the experiments; return measurements, losses and tables.

    Temperatures come from development tasks only.
    """
    transformers_logging.disable_progress_bar()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    started = time.perf_counter()
    family = PREPARE[name](work_dir, seed)
    print(f"{name}: models ready after {time.perf_counter() - started:.0f} s", flush=True)
    rows = mixing.measure_singles(family)
    losses = mixing.compute_all_losses(family)
    rows += mixing.measure_by_data(family, losses, "new")
    rows += mixing.measure_by_data(family, losses, "pool")
    temperature = mixing.choose_temperature(family, rows, "new")
    rows += mixing.measure_tuned_tasks(family, losses, temperature)
    print(f"{name}: measured after {time.perf_counter() - started:.0f} s", flush=True)
    told = [
        {"family": name, "task": task, "draw": draw, "model": model, "loss": f"{loss:.5f}"}
        for (task, draw), by_model in losses.items()
        for model, loss in by_model.items()
    ]
    figures = [row | {"accuracy": f"{row['accuracy']:.2f}"} for row in rows]
    return (
        figures,
        told,
        [
            tables.tuned_table(family, rows),
            tables.new_task_table(family, rows, losses),
            tables.pool_table(family, rows),
            tables.temperature_table(family, rows),
        ],
    )


if __name__ == "__main__":
    main()
