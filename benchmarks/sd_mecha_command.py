"""Installs sd-mecha 1.1.8 beside the benchmark, where none is given, and runs its merge."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from harness import BENCHMARKS, Workspace

REQUIREMENTS = ("torch==2.13.0", "sd-mecha==1.1.8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option that says which sd-mecha to run."""
    parser.add_argument(
        "--sd-mecha-python",
        default=os.environ.get("SD_MECHA_PYTHON"),
        help="python that has it; also $SD_MECHA_PYTHON; default: a venv in the work folder",
    )


def sd_mecha_python(given: str | None, workspace: Workspace) -> str:
    """The python that has sd-mecha: the given one, or a new virtual environment's."""
    return given or workspace.environment("sd-mecha-venv", REQUIREMENTS)


def merge_command(python: str, models: Sequence[Path], output: Path) -> list[str]:
    """A merge of two models of one file each."""
    script = str(BENCHMARKS / "merge_with_sd_mecha.py")
    return [python, script, *map(str, models), "-o", str(output)]
