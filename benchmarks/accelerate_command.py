"""The command line of the naive scoring: transformers with accelerate's disk offload."""

from collections.abc import Sequence
from pathlib import Path

from harness import BENCHMARKS
from scoring_task import ScoringTask


def score_command(python: str, models: Sequence[Path], task: ScoringTask) -> list[str]:
    """A scoring of the models that leaves on disk what doesn't fit into 500 MB."""
    script = str(BENCHMARKS / "score_with_accelerate.py")
    return [python, script, *map(str, models), *task.options()]
