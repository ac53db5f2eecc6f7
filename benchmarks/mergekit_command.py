"""Installs mergekit 0.1.5 beside the benchmark, where none is given, and writes its recipe."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from harness import Workspace

REQUIREMENTS = ("torch==2.13.0", "mergekit==0.1.5")

# The fastest of its plain options on two cores: threads and asynchronous writes gained nothing,
# shards of the sources' size gained much over the default of one shard for everything.
DEFAULT_OPTIONS = "--quiet --no-copy-tokenizer --no-write-model-card --out-shard-size 500M"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which mergekit to run and how."""
    parser.add_argument(
        "--mergekit-python",
        default=os.environ.get("MERGEKIT_PYTHON"),
        help="python with mergekit; also $MERGEKIT_PYTHON; default: a venv in the work folder",
    )
    parser.add_argument("--mergekit-options", default=DEFAULT_OPTIONS, help="as one string")


def mergekit_python(given: str | None, workspace: Workspace) -> str:
    """The python that has mergekit: the given one, or a new virtual environment's."""
    return given or workspace.environment("mergekit-venv", REQUIREMENTS)


def write_recipe(path: Path, models: Sequence[Path]) -> None:
    """A linear merge to bfloat16, with equal weights."""
    lines = ["merge_method: linear", "dtype: bfloat16", "parameters: {normalize: false}", "models:"]
    for model in models:
        lines += [f"  - model: {model}", f"    parameters: {{weight: {1 / len(models)}}}"]
    path.write_text("\n".join(lines) + "\n")


def merge_command(python: str, recipe: Path, output: Path, options: Sequence[str]) -> list[str]:
    """The `mergekit-yaml` of the environment that `python` is in."""
    return [str(Path(python).parent / "mergekit-yaml"), str(recipe), str(output), *options]
