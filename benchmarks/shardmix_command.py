"""The command lines of shardmix that the benchmarks run, and its report's figures."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import OFFLINE, Finished, remove, run
from scoring_task import ScoringTask

NO_BUDGET_AT_ALL = 1
"""MiB; less than any python takes."""
BUDGET_TRIALS = 8
LEAST_BUDGET = re.compile(r"the least that works here is ([0-9]+)MiB")


def merge_command(
    python: str,
    models: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """A quiet merge of the models that reports in JSON; equal weights where none are given."""
    command = [python, "-m", "shardmix", "merge", *_sources(models, weights), "-o", str(output)]
    return [*command, *extra, "--quiet", "--json"]


def plan_command(
    python: str,
    models: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """A plan of the merge of the models, in JSON."""
    command = [python, "-m", "shardmix", "plan", *_sources(models, weights), "-o", str(output)]
    return [*command, *extra, "--json"]


def _sources(models: Sequence[Path], weights: Sequence[float] | None) -> list[str]:
    weights = weights or [1 / len(models)] * len(models)
    return [f"{model}={weight}" for model, weight in zip(models, weights, strict=True)]


def least_budget(
    python: str, models: Sequence[Path], output: Path, *, extra: Sequence[str] = ()
) -> int:
    """The least `--max-memory` that the merge runs within, in bytes, found by trying.

    A refusal names the least that works by what the process held when it planned; by the time
    that it merges it may hold a little more, so what is named is tried as well.
    """
    named = NO_BUDGET_AT_ALL
    for _ in range(BUDGET_TRIALS):
        options = [*extra, "--max-memory", f"{named}MiB", "--no-fsync"]
        finished = run(merge_command(python, models, output, extra=options), environment=OFFLINE)
        remove(output)
        if not finished.returncode:
            return named * 1024**2
        found = LEAST_BUDGET.search(finished.stderr)
        if found is None:
            raise SystemExit(f"no least budget is named: {finished.last_words()}")
        named = max(int(found[1]), named + 1)
    raise SystemExit(f"no merge within {named} MiB, which a refusal named as the least")


def score_command(
    python: str, models: Sequence[Path], task: ScoringTask, *, extra: Sequence[str] = ()
) -> list[str]:
    """A scoring of the models, decoders, that reports in JSON."""
    command = [python, "-m", "shardmix", "score", *map(str, models), "--model-type", "decoder"]
    return [*command, *task.options(), *extra, "--json"]


def report_of(finished: Finished) -> dict[str, Any]:
    """The JSON object on standard output; raises SystemExit where there is none."""
    try:
        report = json.loads(finished.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"no JSON report; standard error says:\n{finished.stderr}") from None
    return dict(report)
