"""Quantised sources and outputs: decoding while merging, and FP8 written, beside plain merges.

Two models in bfloat16 and the same in FP8 (blocks of 128 × 128) are merged: each to bfloat16 and to
FP8. Warm, by turns, nobody forces files to disk; whole processes. Ratios are of the best times, to
the merge of bfloat16 to bfloat16; the parts say how much of each second is a byte read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.by_turns import Way, by_turns, print_ways
from benchmarks.lib.processes import Finished, run_or_exit
from benchmarks.lib.tables import Row
from benchmarks.lib.workspace import Workspace, benchmark

QUANTIZE = ("--quantize", "fp8-blocks")


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[Sequence[Row], bool]:
    """Measure everything, and print."""
    shardmix = [workspace.python("shardmix"), "-m", "shardmix"]
    plain = [workspace.checkpoint(f"{args.preset}-{each}", args.preset) for each in "ab"]
    coded = []
    for model in plain:
        folder = workspace.lasting(f"{model.name}-fp8")
        if not folder.exists():
            run_or_exit([*shardmix, "convert", model, folder, *QUANTIZE, "--no-fsync", "--quiet"])
        coded.append(folder)
    output = workspace.scratch("merged")
    rest = ["-o", str(output), "--no-fsync", "--json", "--quiet"]
    if args.max_memory:
        rest += ["--max-memory", args.max_memory]
    cases = {
        "bfloat16 to bfloat16": (plain, ()),
        "FP8 to bfloat16": (coded, ()),
        "bfloat16 to FP8": (plain, QUANTIZE),
        "FP8 to FP8": (coded, QUANTIZE),
    }
    ways = {
        name: Way([*shardmix, "merge", *(f"{each}=0.5" for each in models), *more, *rest], models)
        for name, (models, more) in cases.items()
    }
    rows = by_turns(ways, output, args.rounds, _figures)
    further = ("projected", "projected_bytes"), ("written", "written_bytes")
    print_ways(rows, "best / plain", further)
    is_kept = all(row["peak_bytes"] <= row["projected_bytes"] for row in rows)
    return rows, is_kept


def _figures(done: Finished) -> Row:
    report = done.report()
    return {
        "projected_bytes": report["projected_peak_bytes"],
        "written_bytes": report["bytes_written"],
    }


if __name__ == "__main__":
    benchmark(
        measure,
        preset=("llama-1b", "shape of the models"),
        max_memory=("", "budget of each merge"),
        rounds=(5, "of each"),
        csv=(Path("quantised.csv"), "raw figures"),
    )
