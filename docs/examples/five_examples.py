"""The demo's last part: weights that nobody chose, from five examples of the job.

For each of three jobs, `shardmix merge --weights-from` scores base and specialists on five examples
and merges them by what it finds; the result is measured beside the uniform mean of the same models.
Two jobs have a specialist among the models. For the third, no model was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from docs.examples.command_line import merge
from docs.examples.retrieval import Pair, read_pairs
from docs.examples.shorthand import make_pairs

DATA = Path(__file__).parent / "data"
JOBS = {"clinical": "clinical notes", "notam": "notices to pilots", "prescription": "prescriptions"}
"""What there are five examples of; none is in a training or test set."""
SPECIALTIES = ("clinical", "notam")
"""Jobs that one of the models was trained for; it bears the job's name."""
NUM_PRESCRIPTIONS = 100
TEMPERATURE = 1.0
"""Of the softmax over losses; see `docs/examples/README.md` for how it was chosen."""

MIN_LEAD_OVER_UNIFORM = 3.0
"""Points, on a job that one of the models was trained for."""
MIN_LEAD_OVER_BASE = 10.0
"""Points, on a job that none was trained for."""

Measure = Callable[[Path, list[Pair]], float]
"""`(model folder, pairs)` to accuracy in percent."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What five examples of a job led to. Accuracies in percent, on the job's test."""

    weights: dict[str, float]
    """By model, as computed from the examples."""
    base: float
    uniform: float
    by_data: float


def mix_for_jobs(
    folders: dict[str, Path], work_dir: Path, measure: Measure, console: Console
) -> dict[str, JobResult]:
    """Mix the models for each job in turn, and measure before and after."""
    names = list(folders)
    sources = [str(folder) for folder in folders.values()]
    uniform = merge(
        [f"{source}=1" for source in sources], work_dir / "uniform", ["--normalize"], console
    )
    results = {}
    for job in JOBS:
        examples = DATA / f"{job}_examples.jsonl"
        options = ["--weights-from", str(examples), "--model-type", "encoder"]
        options += ["--pooling", "mean", "--temperature", str(TEMPERATURE)]
        mixed = merge(sources, work_dir / f"for-{job}", options, console)
        pairs = read_test(job)
        results[job] = JobResult(
            weights=dict(zip(names, mixed.report["weights"], strict=True)),
            base=measure(folders["base"], pairs),
            uniform=measure(uniform.folder, pairs),
            by_data=measure(mixed.folder, pairs),
        )
    return results


def read_test(job: str) -> list[Pair]:
    """Return the pairs that the job is measured with."""
    if job in SPECIALTIES:
        return read_pairs(DATA / f"{job}_test.tsv")
    return make_pairs("prescriptions", NUM_PRESCRIPTIONS, seed=0)


def job_table(results: dict[str, JobResult]) -> Table:
    """Lay the results out, a job a row."""
    table = Table(title="Weights from five examples of a job, and held-out accuracy on it, in %")
    table.add_column("five examples of")
    for name in next(iter(results.values())).weights:
        table.add_column(f"share:\n{name}", justify="right")
    for column in ("base", "uniform\nweights", "weights\nby data"):
        table.add_column(column, justify="right")
    for job, result in results.items():
        weights = [f"{weight:.2f}" for weight in result.weights.values()]
        accuracies = [f"{value:.1f}" for value in (result.base, result.uniform, result.by_data)]
        table.add_row(JOBS[job], *weights, *accuracies)
    return table


def find_shortfalls(results: dict[str, JobResult]) -> list[str]:
    """Say where weights by data are not what the demo promises; nothing if they are."""
    shortfalls = []
    for job, result in results.items():
        if job in SPECIALTIES:
            lead, rival, expected = (
                result.by_data - result.uniform,
                "uniform weights",
                MIN_LEAD_OVER_UNIFORM,
            )
        else:
            lead, rival, expected = result.by_data - result.base, "the base", MIN_LEAD_OVER_BASE
        if lead < expected:
            shortfalls.append(
                f"{JOBS[job]}: weights by data lead {rival} by {lead:.1f} points; "
                f"at least {expected:.1f} were expected."
            )
    return shortfalls
