"""What digests, the journal and the look for NaN and Inf cost a merge: with and without, by turns.

    python benchmarks/safety.py --work-dir WORK --rounds 15

Warm, without fsync, both backends; all rounds of a backend in one process (`safety_rounds.py`).
What fsync costs beside a program that reads, writes and forces the same bytes is in `bench.py`.
"""

import json
import statistics
from pathlib import Path

from harness import (
    BENCHMARKS,
    OFFLINE,
    Workspace,
    print_table,
    run_or_exit,
    spread,
    wait_until_idle,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import read_into_cache


def main() -> None:
    """Measure and report."""
    parser = workspace_arguments("What digests, journal and the look for NaN and Inf cost.")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each")
    parser.add_argument("--backends", nargs="+", default=["llvm", "torch"])
    parser.add_argument("--preset", default="llama-1b", help="shape of the checkpoints")
    parser.add_argument("--output", type=Path, help="where to write to; default: in WORK")
    parser.add_argument("--csv", type=Path, default=Path("safety.csv"), help="raw figures")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    table = []
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        models = [
            workspace.checkpoint(
                f"{args.preset}-{name}", "llama", "--preset", args.preset, "--seed", str(seed)
            )
            for seed, name in enumerate("abc")
        ]
        output = args.output or workspace.scratch("merged")
        for backend in args.backends:
            read_into_cache(models)
            wait_until_idle()
            finished = run_or_exit(
                [
                    *(args.python, str(BENCHMARKS / "safety_rounds.py"), *map(str, models)),
                    *("-o", str(output), "--backend", backend, "--rounds", str(args.rounds)),
                ],
                environment=OFFLINE,
            )
            found = json.loads(finished.stdout)
            rows += [{"backend": backend, **row} for row in found]
            for unit in ("seconds", "cpu_s"):
                safe, bare = (
                    [row[unit] for row in found if row["safe"] is kind] for kind in (True, False)
                )
                ratio = statistics.median(safe) / statistics.median(bare)
                table.append([f"{backend}, {unit}", spread(safe), spread(bare), f"{ratio:.3f}"])
    print()
    print_table(["backend", "with", "without", "ratio of medians"], table)
    write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
