"""The command lines of all programs that are measured, by `programs.json`.

There, `{models}` and such stand for what a run is about (see `command`), and merges are in the
order of the tables.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Program:
    """One way to merge or to score."""

    words: str
    """Its command line."""
    environment: str = "shardmix"
    """Whose python it runs with; one that needs an environment of its own, or shardmix's."""
    reports: bool = True
    """Whether it prints one JSON object with its `seconds` beyond start-up."""
    is_slow: bool = False
    """Takes minutes: fewer rounds."""


_TABLE = json.loads(Path(__file__).with_name("programs.json").read_text())
MERGES = {name: Program(**entry) for name, entry in _TABLE["merges"].items()}
SCORINGS = {name: Program(**entry) for name, entry in _TABLE["scorings"].items()}
MERGE, PLAN = MERGES["shardmix"], Program(**_TABLE["plan"])
REQUIREMENTS: dict[str, list[str]] = _TABLE["requirements"]
"""Of each environment."""
PACKAGES: list[str] = _TABLE["packages"]
"""Whose versions are told."""


def command(
    program: Program,
    python: str,
    models: Sequence[Path],
    *,
    weights: Sequence[float] = (),
    fsync: bool = False,
    options: Iterable[str] = (),
    **paths: Path,
) -> list[str]:
    """Return a program's command line, with equal weights if none are given.

    `fsync`: whether a program that can is to put its output on the disk. `paths` are the `output`
    of a merge, the `data` of a scoring, mergekit's `recipe`.
    """
    weights = weights or [1 / len(models)] * len(models)
    values: dict[str, object] = {"models": list(models), "first": models[0], **paths}
    values["weighted"] = [f"{path}={share}" for path, share in zip(models, weights, strict=True)]
    values |= {"python": python, "bin": Path(python).parent}
    values["fsync"] = [] if fsync else ["--no-fsync"]
    words: list[str] = []
    for word in program.words.split():
        value = values.get(word[1:-1])
        # A list takes as many words as it has items.
        words += map(str, value) if isinstance(value, list) else [word.format(**values)]
    return [*words, *options]


def patched(words: Sequence[str], patch: str) -> list[str]:
    """Return a command line of shardmix that first runs `patch`, for what it has no switch for."""
    python, _, _, *rest = words
    return [python, "-c", f"{patch}\nfrom shardmix.cli import main\nmain()", *rest]
