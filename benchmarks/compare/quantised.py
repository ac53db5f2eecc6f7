"""Quantised sources and outputs: decoding while merging, and FP8 written, beside plain merges.

Two models in bfloat16 and the same in FP8 (blocks of 128 × 128) are merged: each to bfloat16 and to
FP8. Warm, by turns, nobody forces files to disk; whole processes. Ratios are of the best times, to
the merge of bfloat16 to bfloat16; the parts say how much of each second is a byte read.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.machine import read_into_cache, wait_until_idle
from benchmarks.lib.processes import run, run_or_exit
from benchmarks.lib.tables import Row, column, mib, over, print_table, spread
from benchmarks.lib.workspace import Workspace, benchmark, remove

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
    ways = {
        "bfloat16 to bfloat16": (plain, ()),
        "FP8 to bfloat16": (coded, ()),
        "bfloat16 to FP8": (plain, QUANTIZE),
        "FP8 to FP8": (coded, QUANTIZE),
    }
    rows: list[Row] = []
    for number in range(args.rounds):
        for name, (models, more) in ways.items():
            remove(output)
            read_into_cache(models)
            wait_until_idle(limit_s=5)
            done = run([*shardmix, "merge", *(f"{model}=0.5" for model in models), *more, *rest])
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            report = done.report()
            rows.append(
                {
                    "way": name,
                    "round": number,
                    "seconds": done.wall_s,
                    "cpu_seconds": round(done.user_s + done.system_s, 3),
                    "peak_bytes": done.peak_bytes,
                    "projected_bytes": report["projected_peak_bytes"],
                    "read_bytes": done.read_calls_bytes,
                    "written_bytes": report["bytes_written"],
                }
            )
    first = min(column(rows, "seconds", way="bfloat16 to bfloat16"))
    table = [
        (
            name,
            spread(column(rows, "seconds", way=name)),
            over(min(column(rows, "seconds", way=name)), first),
            spread(column(rows, "cpu_seconds", way=name)),
            mib(max(column(rows, "peak_bytes", way=name))),
            mib(max(column(rows, "projected_bytes", way=name))),
            mib(max(column(rows, "read_bytes", way=name))),
            mib(max(column(rows, "written_bytes", way=name))),
        )
        for name in ways
    ]
    header = ("way", "s", "best / plain", "CPU s", "peak MiB", "projected", "MiB read", "written")
    print_table(header, table)
    is_kept = all(row["peak_bytes"] <= row["projected_bytes"] for row in rows)
    return rows, is_kept


if __name__ == "__main__":
    benchmark(
        measure,
        preset=("llama-1b", "shape of the models"),
        max_memory=("", "budget of each merge"),
        rounds=(5, "of each"),
        csv=(Path("quantised.csv"), "raw figures"),
    )
