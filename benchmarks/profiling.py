"""What `--profile` costs a merge: with and without, by turns; and one lap and one sample of it.

    python benchmarks/profiling.py --work-dir WORK

Warm, without fsync, all rounds in this one process, which must be a python that has shardmix. The
first round of each kind, which warms up, does not count.
"""

import argparse
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import Workspace, print_table, spread, wait_until_idle, write_csv
from machine import print_facts
from page_cache import read_into_cache

import shardmix
from shardmix.profiling.sampler import INTERVAL_SECONDS, memory_probe
from shardmix.system.timer import NO_CLOCK, READ, StageClock


def microseconds(call: Callable[[], object], *, count: int) -> float:
    """Mean time of a call."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count * 1e6


def print_parts() -> None:
    """Print what the parts of a recording take."""
    clock = StageClock()
    clock.start()
    with memory_probe() as probe:
        sample = microseconds(probe, count=5_000)
    rollup = Path("/proc/self/smaps_rollup")
    rows = [
        ("a lap, recorded", f"{microseconds(lambda: clock.lap(READ, 1), count=500_000):.2f}"),
        (
            "a lap, not recorded",
            f"{microseconds(lambda: NO_CLOCK.lap(READ, 1), count=500_000):.2f}",
        ),
        (f"a sample of memory, every {INTERVAL_SECONDS * 1000:.0f} ms", f"{sample:.1f}"),
    ]
    if rollup.exists():
        rows.append(
            ("/proc/self/smaps_rollup instead", f"{microseconds(rollup.read_bytes, count=50):.0f}")
        )
    print_table(["", "µs"], rows)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="data go here; local disk")
    parser.add_argument("--keep", action="store_true", help="leave the data for the next run")
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each")
    parser.add_argument("--preset", default="llama-1b", help="shape of the checkpoints")
    parser.add_argument("--output", type=Path, help="where to write to; default: in WORK")
    parser.add_argument("--csv", type=Path, default=Path("profiling.csv"), help="raw figures")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    order = random.Random(7)
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[sys.executable])
        folders = [
            workspace.checkpoint(
                f"{args.preset}-{name}", "llama", "--preset", args.preset, "--seed", str(seed)
            )
            for seed, name in enumerate("abc")
        ]
        models = [(str(folder), 1 / len(folders)) for folder in folders]
        output = args.output or workspace.scratch("merged")
        profile = workspace.scratch("profile.json")
        read_into_cache(folders)
        wait_until_idle()
        for number in range(args.rounds + 1):
            for recorded in order.sample([True, False], 2):
                shutil.rmtree(output, ignore_errors=True)
                cpu_before = time.process_time()
                report = shardmix.merge(
                    models, output, fsync=False, profile=profile if recorded else None
                )
                cpu_s = round(time.process_time() - cpu_before, 4)
                if number:
                    seconds = round(report.seconds, 4)
                    rows.append({"recorded": recorded, "seconds": seconds, "cpu_s": cpu_s})
        shutil.rmtree(output)
        print()
        print_parts()
    table = []
    for unit in ("seconds", "cpu_s"):
        with_it, without = (
            [float(str(row[unit])) for row in rows if row["recorded"] is kind]
            for kind in (True, False)
        )
        medians = statistics.median(with_it) / statistics.median(without)
        lowest = min(with_it) / min(without)
        row = [unit, spread(with_it), spread(without), f"{medians:.3f}", f"{lowest:.3f}"]
        table.append(row)
    print()
    header = ["merge", "with --profile", "without", "ratio of medians", "of the lowest"]
    print_table(header, table)
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
