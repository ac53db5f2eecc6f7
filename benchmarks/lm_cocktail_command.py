"""Installs LM-Cocktail 0.0.4 beside the benchmark, where none is given, and runs its functions."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from harness import BENCHMARKS, Workspace
from scoring_task import ScoringTask

# It names no versions and leaves out sentence-transformers, which it imports.
REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "sentence-transformers==6.2.0",
    "lm-cocktail==0.0.4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option that says which LM-Cocktail to run."""
    parser.add_argument(
        "--lm-cocktail-python",
        default=os.environ.get("LM_COCKTAIL_PYTHON"),
        help="python that has it; also $LM_COCKTAIL_PYTHON; default: a venv in the work folder",
    )


def lm_cocktail_python(given: str | None, workspace: Workspace) -> str:
    """The python that has LM-Cocktail: the given one, or a new virtual environment's."""
    return given or workspace.environment("lm-cocktail-venv", REQUIREMENTS)


def score_command(python: str, models: Sequence[Path], task: ScoringTask) -> list[str]:
    """Its scoring of the models, as `mix_models_with_data` calls it."""
    script = str(BENCHMARKS / "score_with_lm_cocktail.py")
    return [python, script, *map(str, models), *task.options()]


def merge_command(python: str, function: str, models: Sequence[Path], output: Path) -> list[str]:
    """A merge by `mix_models` or `mix_models_by_layers`, with equal weights."""
    script = str(BENCHMARKS / "merge_with_lm_cocktail.py")
    return [python, script, function, *map(str, models), "-o", str(output)]
