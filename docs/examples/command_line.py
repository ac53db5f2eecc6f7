"""Run `shardmix merge` and `shardmix verify` the way a user does: by the command line.

Memory is that of a process, and the demo's own has just trained two models. Knows nothing of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console


class DemoError(Exception):
    """The merge failed, or its output is not a model."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged model's folder and what the merge reported of itself."""

    folder: Path
    """A sentence-transformers folder."""
    report: dict[str, Any]
    """The JSON that `shardmix merge --json` printed; sizes in bytes."""


def merge(sources: list[str], output: Path, options: list[str], console: Console) -> Merged:
    """Merge `sources`, as the command line takes them, show the command, return the report."""
    arguments = ["merge", *sources, *options, "-o", str(output), "--overwrite", "--json", "--quiet"]
    console.print(f"[bold]{output.name:9}[/] shardmix {' '.join(arguments)}", soft_wrap=True)
    return Merged(output, json.loads(_run(arguments)))


def verify(folder: Path, console: Console) -> None:
    """Read a merged model again, against the digests made at the merge, and show what is said."""
    console.print(f"          shardmix verify {folder}", soft_wrap=True)
    console.print(_run(["verify", str(folder)]).rstrip(), soft_wrap=True)


def _run(arguments: list[str]) -> str:
    process = subprocess.run(
        [sys.executable, "-m", "shardmix", *arguments], stdout=subprocess.PIPE, text=True
    )
    if process.returncode != 0:
        raise DemoError(
            f"shardmix {arguments[0]}: exit status {process.returncode}; its message is above."
        )
    return process.stdout
