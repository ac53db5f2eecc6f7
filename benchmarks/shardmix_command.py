"""The command lines of shardmix that the benchmarks run, and its report's figures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Finished
from scoring_task import ScoringTask


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
