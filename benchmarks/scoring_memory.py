"""Holds the peak memory and the reads of `shardmix score` against what it promises.

    python benchmarks/scoring_memory.py --work-dir WORK --data llm_examples.json

Two tables: a bf16 llama of 2.2B parameters (4.5 GB), scored as two models, at several budgets; and
the same inside a memory control group smaller than one model, beside transformers with accelerate's
disk offload. Ends with status 1 if a promise was broken.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate_command
import shardmix_command
from checkpoints import parse_size
from control_group import MemoryGroup, NoMemoryGroupError, memory_group
from harness import (
    BENCHMARKS,
    OFFLINE,
    Finished,
    Workspace,
    mib,
    print_table,
    run,
    run_or_exit,
    wait_until_idle,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import can_drop_caches, drop_caches
from scoring_task import ScoringTask, made_up_examples, read_examples, write_examples

MAX_READS = 1.1
"""Times the checkpoints' bytes that a scoring may read: each once, and a little."""
TOO_SMALL = parse_size("64MiB")
"""Less than python with torch takes for itself."""


@dataclass(frozen=True, slots=True)
class Case:
    """One scoring to measure."""

    title: str
    tool: str
    budget_bytes: int | None = None
    """`--max-memory`; None leaves it to shardmix."""
    group_bytes: int | None = None
    """Size of the memory control group that it runs in; None for none."""
    is_refused: bool = False
    """Whether the budget is too small for any scoring, so that shardmix must say so."""


@dataclass(frozen=True, slots=True)
class Peak:
    """What one scoring held and read: a row of the CSV."""

    case: str
    tool: str
    budget_bytes: int
    """0 where none was given."""
    group_bytes: int
    """0 where it ran in no control group."""
    projected_bytes: int
    """What shardmix promised."""
    reported_bytes: int
    """What shardmix measured of itself: VmHWM."""
    measured_bytes: int
    """What the kernel said when the process had ended: ru_maxrss."""
    charged_bytes: int
    """The most that was charged to the group, page cache included."""
    oom_kills: int
    checkpoint_bytes: int
    """Size of all models' shards."""
    bytes_read: int
    """Weights, all models together, as the tool counts them."""
    read_calls_bytes: int
    """What read calls returned to the process: rchar, libraries included."""
    disk_bytes: int
    """What came from disk: read_bytes, libraries included."""
    wall_s: float
    seconds: float
    """Scoring, as the tool reports it."""
    failure: str
    """Why there are no figures; empty where there are."""
    promise: str
    """`kept`, `refused` as it should be, `FAILED`, or `BROKEN` with what was; accelerate: none."""

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        budget = mib(self.budget_bytes) if self.budget_bytes else "-"
        if self.failure:
            return (self.case, budget, *[""] * 8, self.promise)
        return (
            self.case,
            budget,
            mib(self.projected_bytes) if self.projected_bytes else "-",
            mib(self.measured_bytes),
            f"{self.measured_bytes / self.budget_bytes:.2f}" if self.budget_bytes else "-",
            f"{self.measured_bytes / self.projected_bytes:.2f}" if self.projected_bytes else "-",
            *(
                f"{nbytes / self.checkpoint_bytes:.2f}"
                for nbytes in (self.bytes_read, self.read_calls_bytes, self.disk_bytes)
            ),
            f"{self.seconds:.1f}",
            self.promise,
        )


HEADER = (
    "case",
    "budget MiB",
    "projected",
    "measured",
    "/ budget",
    "/ projected",
    "weights read",
    "read calls",
    "from disk",
    "s",
    "promise",
)


def score_command(
    case: Case, args: argparse.Namespace, models: Sequence[Path], task: ScoringTask
) -> list[str]:
    """The command line of a case."""
    if case.tool == "accelerate":
        return accelerate_command.score_command(args.python, models, task)
    budget = [] if case.budget_bytes is None else ["--max-memory", f"{case.budget_bytes}B"]
    extra = ["--device", "cpu", *budget]
    return shardmix_command.score_command(args.python, models, task, extra=extra)


def promise_of(case: Case, finished: Finished, report: dict[str, Any], reads: float) -> str:
    """Whether the scoring did as promised; `reads` is in checkpoints."""
    if finished.returncode:
        # A signal is never a refusal: status 137 or -9 is the kernel's doing.
        return "refused" if case.is_refused and 0 < finished.returncode < 128 else "FAILED"
    if case.tool != "shardmix":
        return "-"
    bounds = [bound for bound in (case.budget_bytes, report["projected_peak_bytes"]) if bound]
    is_broken = {
        "not refused": case.is_refused,
        "memory": finished.peak_bytes > min(bounds),
        "reads": reads > MAX_READS,
    }
    broken = [name for name, is_so in is_broken.items() if is_so]
    return f"BROKEN: {', '.join(broken)}" if broken else "kept"


def measure(
    case: Case, args: argparse.Namespace, models: Sequence[Path], task: ScoringTask, counts: Path
) -> Peak:
    """Score once, with the models out of the page cache and the libraries in it."""
    print(f"scoring: {case.title} ...", file=sys.stderr)
    if can_drop_caches():
        drop_caches()
    run_or_exit([args.python, "-c", "import torch, transformers, accelerate"])
    wait_until_idle()
    python, *words = score_command(case, args, models, task)
    command = [python, str(BENCHMARKS / "with_io_counts.py"), str(counts), *words]
    counts.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        group: MemoryGroup | None = None
        if case.group_bytes:
            group = stack.enter_context(memory_group(case.group_bytes))
            command = group.wrap(command)
        finished = run(command, environment=OFFLINE)
        charged_bytes = group.peak_bytes() if group else 0
        oom_kills = group.oom_kills() if group else 0
    failure = finished.last_words() if finished.returncode else ""
    report = {} if failure else shardmix_command.report_of(finished)
    # A killed process writes no counts.
    read = json.loads(counts.read_text()) if counts.exists() else {}
    checkpoint_bytes = sum(
        path.stat().st_size for model in models for path in model.glob("*.safetensors")
    )
    bytes_read = report.get("bytes_read", 0)
    return Peak(
        case=case.title,
        tool=case.tool,
        budget_bytes=case.budget_bytes or 0,
        group_bytes=case.group_bytes or 0,
        projected_bytes=report.get("projected_peak_bytes", 0),
        reported_bytes=report.get("peak_rss_bytes", 0),
        measured_bytes=finished.peak_bytes,
        charged_bytes=charged_bytes,
        oom_kills=oom_kills,
        checkpoint_bytes=checkpoint_bytes,
        bytes_read=bytes_read,
        read_calls_bytes=read.get("rchar", 0),
        disk_bytes=read.get("read_bytes", 0),
        wall_s=round(finished.wall_s, 3),
        seconds=report.get("seconds", 0.0),
        failure=failure,
        promise=promise_of(case, finished, report, bytes_read / checkpoint_bytes),
    )


def print_peaks(peaks: Sequence[Peak], *, with_group: bool) -> None:
    """Print the scorings side by side and, below, what those without figures said."""
    header = (*HEADER, "charged MiB", "OOM kills") if with_group else HEADER
    rows = []
    for peak in peaks:
        charged = (mib(peak.charged_bytes), str(peak.oom_kills)) if peak.group_bytes else ("-", "-")
        rows.append((*peak.row(), *charged) if with_group else peak.row())
    print_table(header, rows)
    for failure in dict.fromkeys(peak.failure for peak in peaks if peak.failure):
        print(f"  {failure}")
    print()


def two_models(workspace: Workspace, args: argparse.Namespace) -> list[Path]:
    """The checkpoint with a tokenizer, and its double."""
    model = workspace.checkpoint(args.preset, "llama", "--preset", args.preset)
    if not (model / "tokenizer.json").exists():
        run_or_exit([args.python, BENCHMARKS / "small_decoders.py", "tokenizer", model])
    return [model, workspace.linked_copy(model, f"{args.preset}-copy")]


def group_cases(args: argparse.Namespace) -> list[Case]:
    """Both tools outside and inside a control group; without the right to make one, outside."""
    budget = min(args.budgets)
    cases = [
        Case("shardmix", "shardmix", budget),
        Case("shardmix, inside", "shardmix", budget, args.group_size),
    ]
    if args.accelerate:
        cases.append(Case("accelerate", "accelerate"))
        cases.append(Case("accelerate, inside", "accelerate", None, args.group_size))
    try:
        with memory_group(args.group_size):
            return cases
    except NoMemoryGroupError as error:
        print(f"inside a control group: skipped, {error}\n")
        return [case for case in cases if not case.group_bytes]


def main() -> None:
    """Measure everything; exit with 1 where more was held or read than promised."""
    parser = workspace_arguments("Hold the peak memory of shardmix score against its promise.")
    parser.add_argument(
        "--budgets",
        type=parse_size,
        nargs="+",
        default=[parse_size(size) for size in ("1.5GiB", "2GiB", "4GiB")],
        help="values of --max-memory, in bytes or with a unit",
    )
    parser.add_argument("--preset", default="llama-2b", help="shape of the checkpoint")
    parser.add_argument("--data", type=Path, help="file of examples; default: 45 made-up ones")
    parser.add_argument("--num-examples", type=int, default=8, help="the first so many")
    parser.add_argument("--group-size", type=parse_size, default=parse_size("2GiB"))
    parser.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--csv", type=Path, default=Path("scoring-memory.csv"), help="raw figures")
    args = parser.parse_args()
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        models = two_models(workspace, args)
        examples = read_examples(args.data) if args.data else made_up_examples()
        examples = examples[: args.num_examples]
        task = ScoringTask(write_examples(workspace.scratch("examples.json"), examples))
        counts = workspace.scratch("io-counts.json")
        print(f"{len(examples)} examples: {args.data.name if args.data else 'made up'}")
        if not can_drop_caches():
            print("page cache: as it is, only root may empty it")
        os.sync()
        print("\nBudgets\n")
        peaks = [
            measure(Case(args.preset, "shardmix", budget), args, models, task, counts)
            for budget in (*args.budgets, None)
        ]
        too_small = Case("too small a budget", "shardmix", TOO_SMALL, is_refused=True)
        peaks.append(measure(too_small, args, models, task, counts))
        print_peaks(peaks, with_group=False)
        print(f"Beside accelerate, and inside a control group of {mib(args.group_size)} MiB\n")
        compared = [measure(case, args, models, task, counts) for case in group_cases(args)]
        print_peaks(compared, with_group=True)
    peaks += compared
    write_csv(args.csv, [asdict(peak) for peak in peaks])
    promises = [peak.promise for peak in peaks if peak.tool == "shardmix"]
    raise SystemExit(0 if all(promise in ("kept", "refused") for promise in promises) else 1)


if __name__ == "__main__":
    main()
