"""Merges on GPU and CPU beside the floor and the GPU's own link, by turns, warm, without fsync.

    python benchmarks/gpu.py --work-dir WORK

Rates are GB of source bytes a second beyond start-up: of a merge by its report's `seconds`, of the
link by copies from pinned memory (`gpu_bandwidth.py`), measured anew in every round. Exits with 2
where there is no CUDA device.
"""

import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import (
    BENCHMARKS,
    OFFLINE,
    Workspace,
    print_table,
    remove,
    run,
    run_or_exit,
    spread,
    wait_until_idle,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import read_into_cache
from shardmix_command import merge_command

LINK = {"to_device": "link, to the GPU", "to_host": "link, to the host", "both": "link, both"}
"""What `gpu_bandwidth.py` measures; both is the sum of both ways at once."""
DEVICES = ("cuda:0", "cpu")  # one GPU, since the link measured is one's
FLOOR = "floor"


def bandwidth(python: str) -> dict[str, Any]:
    """What the GPU's link moves; ends the benchmark where there is no GPU."""
    finished = run([python, BENCHMARKS / "gpu_bandwidth.py"])
    if finished.returncode:
        print(f"gpu: {finished.last_words()}", file=sys.stderr)
        sys.exit(2)
    return dict(json.loads(finished.stdout))


def main() -> None:
    """Measure and report."""
    parser = workspace_arguments("Merges on a GPU beside the CPU, the floor and the GPU's link.")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each")
    parser.add_argument("--preset", default="llama-2b", help="shape of the checkpoints")
    parser.add_argument("--models", type=int, default=3, help="how many are merged")
    parser.add_argument("--output", type=Path, help="where to write to; default: in WORK")
    parser.add_argument("--shardmix-options", default="", help="as one string")
    parser.add_argument("--csv", type=Path, default=Path("gpu.csv"), help="raw figures")
    args = parser.parse_args()
    link = bandwidth(args.python)
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        print(f"gpu      {link['num_devices']} x {link['device']}\n")
        models = [
            workspace.checkpoint(
                f"{args.preset}-{number}", "llama", "--preset", args.preset, "--seed", str(number)
            )
            for number in range(args.models)
        ]
        output = args.output or workspace.scratch("merged")
        options = [*shlex.split(args.shardmix_options), "--no-fsync"]

        def merged(device: str) -> dict[str, Any]:
            extra = [*options, "--device", device]
            command = merge_command(args.python, models, output, extra=extra)
            return reported(command)

        def floor() -> dict[str, Any]:
            script = BENCHMARKS / "floor.py"
            return reported([args.python, script, *models, "-o", output, "--no-fsync"])

        def reported(command: list[str | Path]) -> dict[str, Any]:
            remove(output)
            read_into_cache(models)
            wait_until_idle()
            return dict(json.loads(run_or_exit(command, environment=OFFLINE).stdout))

        measured: dict[str, Callable[[], dict[str, Any]]] = {
            **{device: lambda device=device: merged(device) for device in DEVICES},
            FLOOR: floor,
        }
        rows: list[dict[str, object]] = []
        for number in range(args.rounds):
            for way, rate in bandwidth(args.python).items():
                if way in LINK:
                    rows.append(row(number, LINK[way], gb_per_s=rate))
            names = list(measured)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                report = measured[name]()
                rate = report["bytes_read"] / report["seconds"] / 1e9
                rows.append(row(number, name, gb_per_s=round(rate, 3), report=report))
        remove(output)
    print_rates(rows)
    write_csv(args.csv, rows)


def row(
    number: int, what: str, *, gb_per_s: float, report: dict[str, Any] | None = None
) -> dict[str, object]:
    """One measurement."""
    report = report or {}
    return {
        "round": number,
        "what": what,
        "gb_per_s": gb_per_s,
        "seconds": report.get("seconds", ""),
        "workers": report.get("workers", report.get("threads", "")),
        "peak_rss_bytes": report.get("peak_rss_bytes", ""),
        "peak_vram_bytes": report.get("peak_vram_bytes", ""),
    }


def print_rates(rows: list[dict[str, object]]) -> None:
    """Print medians and ranges, and each median as a share of the floor's and of the link's."""
    rates: dict[str, list[float]] = {}
    for one in rows:
        rates.setdefault(str(one["what"]), []).append(float(str(one["gb_per_s"])))
    medians = {what: statistics.median(values) for what, values in rates.items()}
    print()
    print_table(
        ["", "GB/s of source bytes", "of the floor's", "of the link's to the GPU"],
        [
            [
                what,
                spread(values),
                f"{medians[what] / medians[FLOOR]:.3f}",
                f"{medians[what] / medians[LINK['to_device']]:.3f}",
            ]
            for what, values in rates.items()
        ],
    )
    gpu, cpu = (medians[device] for device in DEVICES)
    print(f"\nGPU to CPU: {gpu / cpu:.3f}")


if __name__ == "__main__":
    main()
