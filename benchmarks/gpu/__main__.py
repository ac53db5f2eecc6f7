"""Merges on one GPU beside the CPU, the floor and the GPU's own link, by turns, warm, no fsync."""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.lib.machine import read_into_cache, wait_until_idle
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import MERGE, MERGES, command, patched
from benchmarks.lib.tables import Row, Size, column, mib, over, print_table, spread, where
from benchmarks.lib.workspace import Workspace, benchmark, remove

GPU, CPU, FLOOR = "cuda:0", "cpu", "floor"  # one GPU, since the link measured is one's
TO_GPU, TO_HOST, BOTH = LINK = ("link, to the GPU", "link, to the host", "link, both at once")
COPY_BYTES, NUM_COPIES = 256 * 1024**2, 16
REPORTED = ("seconds", "strip_bytes", "workers", "peak_rss_bytes", "peak_vram_bytes")
PEAK_VRAM = "report_peak_vram_bytes"
HEADER = (
    *("", "method", "GB/s of source bytes", "of the floor's", "of the link's", "workers"),
    *("chunk MiB", "budget MiB", "by torch MiB", "by the driver MiB"),
)
# shardmix with another size of a GPU's chunks: it has no switch for that.
WITH_CHUNK = """
from shardmix.plan.memory_budget import BEST_CHUNK_NBYTES
BEST_CHUNK_NBYTES["cuda"] = {} or BEST_CHUNK_NBYTES["cuda"]
"""


class Case(NamedTuple):
    """A merge to measure; 0 leaves a choice to shardmix."""

    device: str
    """Of the arithmetic; or the floor, which has none."""
    method: str = "linear"
    chunk_bytes: int = 0
    workers: int = 0
    max_vram_bytes: int = 0


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield what is measured: devices, chunks, workers, budgets of GPU memory, other methods."""
    yield from (Case(GPU), Case(CPU), Case(FLOOR))
    yield from (Case(GPU, chunk_bytes=nbytes) for nbytes in args.chunks)
    yield from (Case(GPU, workers=workers) for workers in args.workers)
    yield from (Case(GPU, max_vram_bytes=nbytes) for nbytes in args.budgets)
    yield from (Case(on, name) for name in ("task_arithmetic", "slerp") for on in (GPU, CPU))


def words_of(case: Case, python: str, models: list[Path], output: Path, recipe: Path) -> list[str]:
    """Return the command line of a merge; one by another method is told by a recipe."""
    if case.device == FLOOR:
        return command(MERGES["floor"], python, models, output=output)
    words = command(MERGE, python, models, output=output)
    if case.method != "linear":
        is_pair = case.method == "slerp"
        parameters = {"t": 0.3} if is_pair else {"weight": 0.4, "lambda": 0.9}
        sources = [{"model": str(model)} for model in (models[:2] if is_pair else models)]
        told = {"merge_method": case.method, "base_model": str(models[0]), "models": sources}
        recipe.write_text(json.dumps(told | {"parameters": parameters}))
        words[4 : 4 + len(models)] = [str(recipe)]
    words += [f"--device={case.device}"]
    words += [f"--workers={case.workers}"] if case.workers else []
    words += [f"--max-vram={case.max_vram_bytes}B"] if case.max_vram_bytes else []
    return patched(words, WITH_CHUNK.format(case.chunk_bytes))


def link_rates() -> dict[str, float]:
    """Return GB/s between pinned memory and the GPU: each way, and the sum of both at once."""
    pinned = [torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_gpu = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device=GPU) for _ in range(2)]
    inward = torch.cuda.Stream(), on_gpu[0], pinned[0]
    outward = torch.cuda.Stream(), pinned[1], on_gpu[1]
    found = {}
    for way, copies in zip(LINK, ([inward], [outward], [inward, outward]), strict=True):
        for _ in range(2):  # the first one warms up
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for stream, target, source in copies:
                stream.wait_event(began)
                with torch.cuda.stream(stream):
                    for _ in range(NUM_COPIES):
                        target.copy_(source, non_blocking=True)
                torch.cuda.current_stream().wait_stream(stream)
            ended.record()
            ended.synchronize()
        nbytes = len(copies) * NUM_COPIES * COPY_BYTES
        found[way] = round(nbytes / began.elapsed_time(ended) / 1e6, 3)
    return found


def used_vram() -> int:
    """Return what of the GPU's memory is not free, as the driver has it, whoever holds it."""
    free, total = torch.cuda.mem_get_info(GPU)
    return total - free


def measure(
    args: argparse.Namespace,
    workspace: Workspace,
    link: Callable[[], dict[str, float]] = link_rates,
    used: Callable[[], int] = used_vram,
) -> tuple[list[Row], bool]:
    """Measure all cases by turns, in each round with the link anew; print a table."""
    models = workspace.checkpoints(args.preset, "abc", args.preset)
    output, recipe = args.output or workspace.scratch("merged"), workspace.scratch("recipe.yaml")
    rows: list[Row] = []
    shuffler, every = random.Random(7), list(dict.fromkeys(cases(args)))
    for number in range(args.rounds + 1):
        for way, rate in link().items():
            rows.append({"round": number, **Case(way)._asdict(), "gb_per_s": rate})
        for case in shuffler.sample(every, len(every)):
            remove(output)
            read_into_cache(models)
            wait_until_idle()
            before, seen = used(), []
            words = words_of(case, args.python, models, output, recipe)
            report = run_or_exit(words, watch=lambda _, seen=seen: seen.append(used())).report()
            rate = round(report["bytes_read"] / report["seconds"] / 1e9, 3)
            row = {"round": number, **case._asdict(), "gb_per_s": rate}
            row |= {f"report_{name}": report.get(name, 0) for name in REPORTED}
            rows.append(row | {"driver_bytes": max(seen, default=before) - before})
    # Round 0 brings libraries into the page cache. A row of the link has fewer columns.
    rows = [dict.fromkeys(rows[-1], 0) | row for row in rows if row["round"]]
    print_rates(rows)
    bounded = (row for row in rows if row["max_vram_bytes"])
    return rows, all(row[PEAK_VRAM] <= row["max_vram_bytes"] for row in bounded)


def print_rates(rows: list[Row]) -> None:
    """Print each case's rate, its share of the floor's and the link's, and the memory it took."""
    every = dict.fromkeys(Case(*(row[name] for name in Case._fields)) for row in rows)
    rates = {case: column(rows, "gb_per_s", **case._asdict()) for case in every}
    floor, link = (statistics.median(rates[Case(name)]) for name in (FLOOR, TO_GPU))
    table = []
    for case in every:
        mine, median = where(rows, **case._asdict()), statistics.median(rates[case])
        shares = over(median, floor, 3), over(median, link, 3)
        workers, chunk = mine[0]["report_workers"] or "-", mib(mine[0]["report_strip_bytes"])
        vram = (mib(max(column(mine, name))) for name in (PEAK_VRAM, "driver_bytes"))
        told = (workers, chunk, mib(case.max_vram_bytes), *vram)
        cells = [cell if mine[0]["report_seconds"] else "" for cell in told]
        table.append([case.device, case.method, spread(rates[case]), *shares, *cells])
    print_table(HEADER, table)


if __name__ == "__main__":
    if not torch.cuda.is_available() and "--help" not in sys.argv:
        print(f"gpu: torch {torch.__version__} finds no usable CUDA device", file=sys.stderr)
        raise SystemExit(2)
    benchmark(
        measure,
        rounds=(5, "measurements of each"),
        preset=("llama-2b", "shape of the checkpoints"),
        chunks=([Size(f"{mebibytes}MiB") for mebibytes in (4, 8, 16, 32, 64)], "sizes of chunks"),
        workers=([1, 2, 4, 8], "numbers of threads"),
        budgets=([Size("256MiB"), Size("1GiB")], "values of --max-vram"),
        output=(Path, "where to write to; default: in WORK"),
        csv=(Path("gpu.csv"), "raw figures"),
    )
