"""Times what touches no weights: whole-process `shardmix plan` on large shapes, and `--help`.

    python benchmarks/planning.py --work-dir WORK

Beside each plan stands the least that any planner must do: a bare python that reads and decodes
the same headers. The checkpoints are sparse files: true headers, no data.
"""

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import shardmix_command
from harness import (
    Finished,
    Workspace,
    mib,
    print_table,
    run_or_exit,
    spread,
    workspace_arguments,
    write_csv,
)
from machine import print_facts

# A program of its own, so that its start-up is counted as shardmix's is.
READ_HEADERS = """
import json, pathlib, struct, sys
for folder in sys.argv[1:]:
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            json.loads(file.read(*struct.unpack("<Q", file.read(8))))
"""


@dataclass(frozen=True, slots=True)
class Job:
    """A command, and the one that it is compared with."""

    title: str
    command: Sequence[str]
    reference_title: str
    reference: Sequence[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: a row of the CSV."""

    job: str
    round: int
    wall_s: float
    peak_bytes: int
    reference_wall_s: float
    reference_peak_bytes: int


def measure(job: Job, number: int) -> tuple[Sample, Finished]:
    """Run the reference, then the command."""
    reference = run_or_exit(job.reference)
    finished = run_or_exit(job.command)
    sample = Sample(
        job=job.title,
        round=number,
        wall_s=round(finished.wall_s, 4),
        peak_bytes=finished.peak_bytes,
        reference_wall_s=round(reference.wall_s, 4),
        reference_peak_bytes=reference.peak_bytes,
    )
    return sample, finished


def summary(job: Job, samples: Sequence[Sample]) -> tuple[str, ...]:
    """The row of one job."""
    mine = [sample for sample in samples if sample.job == job.title]
    wall = [sample.wall_s for sample in mine]
    reference = [sample.reference_wall_s for sample in mine]
    return (
        job.title,
        spread(wall),
        mib(max(sample.peak_bytes for sample in mine)),
        job.reference_title,
        spread(reference),
        f"{statistics.median(wall) / statistics.median(reference):.2f}",
    )


def main() -> None:
    """Measure and report."""
    parser = workspace_arguments("Time shardmix plan and --help.")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--csv", type=Path, default=Path("planning.csv"), help="raw figures")
    args = parser.parse_args()
    with Workspace(args.work_dir, keep=args.keep) as workspace:
        print_facts(args.work_dir, pythons=[args.python])
        output = workspace.scratch("merged")
        large = workspace.checkpoint(
            "llama-3-70b-sparse", "llama", "--preset", "llama-3-70b", "--sparse"
        )
        sizes = ("--hidden-size", "2048", "--intermediate-size", "768")
        many = workspace.checkpoint(
            "moe-90000-sparse", "moe", "--num-tensors", "90000", *sizes, "--sparse"
        )
        groups = {
            "plan 3 x 70B": [large, *(workspace.linked_copy(large, f"70b-{n}") for n in (1, 2))],
            "plan 10 x 90,000 tensors": [
                many,
                *(workspace.linked_copy(many, f"moe-{n}") for n in range(1, 10)),
            ],
        }
        jobs = [
            Job(
                title,
                shardmix_command.plan_command(args.python, models, output),
                "python: read the headers",
                [args.python, "-c", READ_HEADERS, *map(str, models)],
            )
            for title, models in groups.items()
        ]
        shardmix = [args.python, "-m", "shardmix"]
        click = [args.python, "-c", "import click"]
        jobs.append(Job("--help", [*shardmix, "--help"], "python: import click", click))
        samples: list[Sample] = []
        for number, job in itertools.product(range(args.rounds + 1), jobs):
            sample, finished = measure(job, number)
            if number:  # round 0 brings files into the cache
                samples.append(sample)
            elif job.title in groups:
                plan = json.loads(finished.stdout)
                print(f"{job.title}: {plan['num_tensors']} tensors, {plan['num_models']} models")
    print()
    header = ("", "wall s", "peak MiB", "beside", "wall s", "ratio")
    print_table(header, [summary(job, samples) for job in jobs])
    write_csv(args.csv, [asdict(sample) for sample in samples])


if __name__ == "__main__":
    main()
