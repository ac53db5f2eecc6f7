"""Merges on GPU and CPU beside the floor and the GPU's own link, by turns, warm, without fsync.

    python -m benchmarks.gpu --work-dir WORK

Rates are GB of source bytes a second beyond start-up: of a merge by its report's `seconds`, of the
link by copies from pinned memory (`link`), measured anew in every round. Exits with 2 if there is
no CUDA device.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import print_facts, read_into_cache, wait_until_idle
from benchmarks.lib.processes import run, run_or_exit
from benchmarks.lib.programs import merge_command, split_options
from benchmarks.lib.tables import print_table, spread, write_csv
from benchmarks.lib.workspace import Workspace, parser, remove

# One GPU, since the link measured is one's.
MERGES = {"cuda:0": "shardmix", "cpu": "shardmix", "floor": "floor"}


def link(python: str) -> dict[str, Any]:
    """Return what the GPU's link moves; ends the benchmark if there is no GPU."""
    finished = run([python, "-m", "benchmarks.gpu.link"])
    if finished.returncode:
        print(f"gpu: {finished.last_words()}", file=sys.stderr)
        sys.exit(2)
    return finished.report()


def main() -> None:
    """Measure and report."""
    args = parser(
        "Merges on a GPU beside the CPU, the floor and the GPU's link.",
        rounds=(7, "measurements of each"),
        preset=("llama-2b", "shape of the checkpoints"),
        models=(3, "how many are merged"),
        output=(Path, "where to write to; default: in WORK"),
        shardmix_options=("", "as one string"),
        csv=(Path("gpu.csv"), "raw figures"),
    ).parse_args()
    gpu = link(args.python)["gpu"]
    rows: list[dict[str, Any]] = []
    with Workspace(args) as workspace:
        print_facts(args.work_dir, args.python)
        print(f"gpu      {gpu}\n")
        letters = "abcdefghij"[: args.models]
        models = workspace.checkpoints(args.preset, letters, "llama", "--preset", args.preset)
        output = args.output or workspace.scratch("merged")
        for number in range(args.rounds):
            for way, rate in link(args.python)["rates"].items():
                rows.append({"round": number, "what": f"link, {way}", "gb_per_s": rate})
            turn = list(MERGES)
            turn = turn[number % len(turn) :] + turn[: number % len(turn)]
            for what in turn:
                options = [*split_options(args, "shardmix"), "--device", what]
                options = [] if what == "floor" else options
                command = merge_command(MERGES[what], args.python, models, output, options=options)
                remove(output)
                read_into_cache(models)
                wait_until_idle()
                report = run_or_exit(command).report()
                rate = round(report["bytes_read"] / report["seconds"] / 1e9, 3)
                told = {name: report.get(name, "") for name in ("seconds", "peak_vram_bytes")}
                workers = report.get("workers", report.get("threads"))
                more = {"workers": workers, "peak_rss_bytes": report.get("peak_rss_bytes", "")}
                rows.append({"round": number, "what": what, "gb_per_s": rate, **told, **more})
        remove(output)
    names = dict.fromkeys(row["what"] for row in rows)
    rates = {name: [row["gb_per_s"] for row in rows if row["what"] == name] for name in names}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    beside = [medians["floor"], medians["link, to the GPU"]]
    print()
    print_table(
        ["", "GB/s of source bytes", "of the floor's", "of the link's to the GPU"],
        [
            [name, spread(rates[name]), *(f"{medians[name] / other:.3f}" for other in beside)]
            for name in names
        ],
    )
    print(f"\nGPU to CPU: {medians['cuda:0'] / medians['cpu']:.3f}")
    columns = max(rows, key=len)
    write_csv(args.csv, [dict.fromkeys(columns, "") | row for row in rows])


if __name__ == "__main__":
    main()
