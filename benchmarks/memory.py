"""Holds shardmix's peak resident memory against `--max-memory` and against its own projection.

    python benchmarks/memory.py --work-dir WORK

Three tables: the llama of 1.1B at several budgets, with 2 and with 8 models, memory-mapped and
pread; tensors larger than the budget and very many small ones; and the same merge inside a memory
control group of 512 MiB beside one outside. Ends with status 1 if a promise was broken.
"""

import argparse
import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import shardmix_command
from checkpoints import parse_size
from control_group import NoMemoryGroupError, memory_group
from harness import (
    Finished,
    Workspace,
    mib,
    print_table,
    remove,
    run,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import can_drop_caches, drop_caches

NUM_MODELS = (2, 8)
IO_MODES = ("mmap", "pread")
TOO_SMALL = parse_size("32MiB")
"""Less than python with torch takes for itself."""


@dataclass(frozen=True, slots=True)
class Case:
    """One merge to measure."""

    title: str
    models: tuple[Path, ...]
    io: str
    budget_bytes: int | None
    """`--max-memory`; None leaves it to shardmix."""
    is_refused: bool = False
    """Whether the budget is too small for any merge, so that shardmix must say so and not start."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What one merge held at most: a row of the CSV."""

    case: str
    models: int
    io: str
    budget_bytes: int
    """0 where none was given."""
    projected_bytes: int
    """What the plan promised."""
    reported_bytes: int
    """What shardmix measured of itself: VmHWM."""
    measured_bytes: int
    """What the kernel said when the process had ended: ru_maxrss."""
    strip_bytes: int
    workers: int
    seconds: float
    failure: str
    """Why there are no figures; empty where there are."""
    promise: str
    """`kept`, `refused` as it should be, `FAILED` or `BROKEN`."""

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        budget = mib(self.budget_bytes) if self.budget_bytes else "-"
        start = (self.case, str(self.models), self.io, budget)
        if self.failure:
            return (*start, *[""] * 6, self.promise)
        return (
            *start,
            mib(self.projected_bytes),
            mib(self.measured_bytes),
            f"{self.measured_bytes / self.budget_bytes:.2f}" if self.budget_bytes else "",
            f"{self.measured_bytes / self.projected_bytes:.2f}",
            f"{self.workers} x {self.strip_bytes / 1024:.0f} KiB",
            f"{self.seconds:.2f}",
            self.promise,
        )


HEADER = (
    "case",
    "models",
    "io",
    "budget MiB",
    "projected",
    "measured",
    "/ budget",
    "/ projected",
    "chunks",
    "s",
    "promise",
)


def merge_command(case: Case, output: Path, args: argparse.Namespace) -> list[str]:
    """The command line of a case."""
    budget = [] if case.budget_bytes is None else ["--max-memory", f"{case.budget_bytes}B"]
    extra = [*budget, "--io", case.io, *shlex.split(args.shardmix_options)]
    return shardmix_command.merge_command(args.python, case.models, output, extra=extra)


def peak_of(case: Case, finished: Finished) -> Peak:
    """The figures of a finished merge, or its last words, and whether it did as promised."""
    failure = finished.last_words() if finished.returncode else ""
    report = {} if failure else shardmix_command.report_of(finished)
    projected = report.get("projected_peak_bytes", 0)
    if failure:
        # A signal is never a refusal: status 137 or -9 is the kernel's doing.
        refused = case.is_refused and 0 < finished.returncode < 128
        promise = "refused" if refused else "FAILED"
    else:
        bounds = [bound for bound in (case.budget_bytes, projected) if bound]
        kept = finished.peak_bytes <= min(bounds) and not case.is_refused
        promise = "kept" if kept else "BROKEN"
    return Peak(
        case=case.title,
        models=len(case.models),
        io=case.io,
        budget_bytes=case.budget_bytes or 0,
        projected_bytes=projected,
        reported_bytes=report.get("peak_rss_bytes", 0),
        measured_bytes=finished.peak_bytes,
        strip_bytes=report.get("strip_bytes", 0),
        workers=report.get("workers", 0),
        seconds=report.get("seconds", 0.0),
        failure=failure,
        promise=promise,
    )


def print_failures(peaks: Sequence[Peak]) -> None:
    """Below a table, what the merges without figures said; once where several said the same."""
    for failure in dict.fromkeys(peak.failure for peak in peaks if peak.failure):
        print(f"  {failure}")
    print()


def measure(
    title: str, cases: Sequence[Case], args: argparse.Namespace, output: Path
) -> list[Peak]:
    """Merge every case once and print them side by side."""
    peaks = []
    for case in cases:
        os.sync()
        remove(output)
        peaks.append(peak_of(case, run(merge_command(case, output, args))))
    remove(output)
    print(f"{title}\n")
    print_table(HEADER, [peak.row() for peak in peaks])
    print_failures(peaks)
    return peaks


def measure_in_group(case: Case, args: argparse.Namespace, output: Path) -> list[Peak]:
    """The merge inside a control group, which is charged for its page cache too, and outside."""
    limit = args.group_size
    print(f"Inside a memory control group of {mib(limit)} MiB, sources not in the page cache\n")
    if not can_drop_caches():
        print("skipped: only root may empty the page cache and make control groups\n")
        return []
    peaks, rows = [], []
    try:
        with memory_group(limit) as group:
            for where in ("outside", "inside"):
                remove(output)
                drop_caches()
                command = merge_command(case, output, args)
                finished = run(group.wrap(command) if where == "inside" else command)
                peak = peak_of(case, finished)
                peaks.append(peak)
                charged = (mib(group.peak_bytes()), str(group.oom_kills()))
                rows.append((where, *peak.row()[1:], *(charged if where == "inside" else "--")))
    except NoMemoryGroupError as error:
        print(f"skipped: {error}\n")
        return []
    finally:
        remove(output)
    print_table((*HEADER, "charged MiB", "OOM kills"), rows)
    print_failures(peaks)
    if not any(peak.failure for peak in peaks):
        print(f"inside / outside: {peaks[1].seconds / peaks[0].seconds:.2f} of the time")
    return peaks


def main() -> None:
    """Measure everything; exit with 1 where a peak was above what was promised."""
    parser = workspace_arguments("Hold shardmix's peak memory against what it promised.")
    parser.add_argument(
        "--budgets",
        type=parse_size,
        nargs="+",
        default=[parse_size(size) for size in ("350MiB", "400MiB", "600MiB", "1GiB")],
        help="values of --max-memory, in bytes or with a unit",
    )
    parser.add_argument("--preset", default="llama-1b", help="shape of the checkpoints")
    parser.add_argument("--tensor-size", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--num-tensors", type=int, default=20_000)
    parser.add_argument("--group-size", type=parse_size, default=parse_size("512MiB"))
    parser.add_argument("--shardmix-options", default="", help="as one string")
    parser.add_argument("--csv", type=Path, default=Path("memory.csv"), help="raw figures")
    args = parser.parse_args()
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        output = workspace.scratch("merged")
        originals = [
            workspace.checkpoint(
                f"{args.preset}-{name}", "llama", "--preset", args.preset, "--seed", str(seed)
            )
            for seed, name in enumerate("ab")
        ]
        copies = [
            workspace.linked_copy(originals[number % 2], f"{args.preset}-copy-{number}")
            for number in range(max(NUM_MODELS) - 2)
        ]
        llamas = (*originals, *copies)
        peaks = measure(
            "Budgets",
            [
                Case(args.preset, llamas[:models], io, budget)
                for budget, models, io in itertools.product(
                    (*args.budgets, None), NUM_MODELS, IO_MODES
                )
            ]
            + [Case("too small a budget", llamas[:2], "mmap", TOO_SMALL, is_refused=True)],
            args,
            output,
        )
        size = str(args.tensor_size)
        giant = workspace.checkpoint(f"giant-{size}", "giant", "--tensor-size", size)
        count = str(args.num_tensors)
        moe = workspace.checkpoint(f"moe-{count}", "moe", "--num-tensors", count)
        shapes = {
            "giant tensor": (giant, workspace.linked_copy(giant, "giant-copy")),
            f"{count} tensors": (moe, workspace.linked_copy(moe, "moe-copy")),
        }
        budget = parse_size("400MiB")
        peaks += measure(
            f"One tensor of {mib(args.tensor_size)} MiB; {count} small tensors",
            [
                Case(title, models, io, budget)
                for (title, models), io in itertools.product(shapes.items(), IO_MODES)
            ],
            args,
            output,
        )
        peaks += measure_in_group(Case(args.preset, llamas[:2], "mmap", budget), args, output)
    write_csv(args.csv, [asdict(peak) for peak in peaks])
    raise SystemExit(0 if all(peak.promise in ("kept", "refused") for peak in peaks) else 1)


if __name__ == "__main__":
    main()
