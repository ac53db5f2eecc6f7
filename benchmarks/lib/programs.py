"""The command lines of all programs that are measured, by `programs.json`, and their pythons.

There, `{models}` and such stand for what a run is about (see `merge_command`), and merges are in
the order of the tables. mergekit runs with the fastest of its plain options on two cores: threads
and asynchronous writes gained nothing, shards of the sources' size gained much over the default of
one shard for everything. LM-Cocktail names no versions and leaves out sentence-transformers, which
it imports. Scorings have LM-Cocktail's defaults. A copy by reflink would move no bytes.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.processes import Finished, run
from benchmarks.lib.workspace import Workspace, remove


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
REQUIREMENTS: dict[str, list[str]] = _TABLE["requirements"]
"""Of each environment."""


class Pythons:
    """The python of each environment: shardmix's, those that options name, and new ones."""

    def __init__(self, args: argparse.Namespace, workspace: Workspace) -> None:
        self._args = args
        self._workspace = workspace

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, *environments: str) -> None:
        """Add the options that name pythons."""
        for name in environments:
            variable = f"{name.replace('-', '_').upper()}_PYTHON"
            told = f"python that has it; also ${variable}; default: a venv in the work folder"
            parser.add_argument(f"--{name}-python", default=os.environ.get(variable), help=told)

    def __getitem__(self, environment: str) -> str:
        """Return a python, installed if it must be."""
        if environment == "shardmix":
            return str(self._args.python)
        given = vars(self._args)[f"{environment.replace('-', '_')}_python"]
        requirements = REQUIREMENTS[environment]
        return given or self._workspace.environment(f"{environment}-venv", requirements)


def fill_in(words: str, **values: object) -> list[str]:
    """Return the words of a command line; a list takes as many words as it has items."""
    command: list[str] = []
    for word in words.split():
        value = values.get(word[1:-1])
        many = value if isinstance(value, list) else [value]
        command += [word.format(**values)] if value is None else map(str, many)
    return command


def merge_command(
    name: str,
    python: str,
    models: Sequence[Path],
    output: Path,
    *,
    weights: Iterable[float] = (),
    fsync: bool = False,
    options: Iterable[str] = (),
    recipe: Path | None = None,
) -> list[str]:
    """Return a merge's command line, with equal weights if none are given.

    `fsync`: whether a program that can is to put its output on the disk. A recipe is written.
    """
    weights = list(weights) or [1 / len(models)] * len(models)
    weighted = [f"{model}={weight}" for model, weight in zip(models, weights, strict=True)]
    if recipe is not None:
        lines = ["merge_method: linear", "dtype: bfloat16", "parameters: {normalize: false}"]
        each = (f"  - {{model: {model}, parameters: {{weight: {weights[0]}}}}}" for model in models)
        recipe.write_text("\n".join([*lines, "models:", *each]) + "\n")
    values = {"python": python, "models": list(models), "weighted": weighted, "output": output}
    values |= {"first": models[0], "fsync": [] if fsync else ["--no-fsync"]}
    values |= {"recipe": recipe, "bin": Path(python).parent}
    return [*fill_in(MERGES[name].words, **values), *options]


def plan_command(*where: Any, **how: Any) -> list[str]:
    """Return the command line of a plan, in JSON; as `merge_command`, for shardmix."""
    words = merge_command("shardmix", *where, **how, fsync=True)
    words[words.index("merge")] = "plan"
    words.remove("--quiet")
    return words


def score_command(
    name: str, python: str, models: Sequence[Path], data: Path, options: Iterable[str] = ()
) -> list[str]:
    """Return the command line of a scoring by a file of examples, which reports in JSON."""
    values = {"python": python, "models": list(models), "data": data}
    return [*fill_in(SCORINGS[name].words, **values), *options]


def budget_option(nbytes: int) -> list[str]:
    """Return `--max-memory`; nothing for 0, which is no budget."""
    return [f"--max-memory={nbytes}B"] if nbytes else []


def least_budget(command: Sequence[str], output: Path, *, is_tried: bool = True) -> int:
    """Return the least `--max-memory` of a merge, found as a user finds it: by what refusals name.

    By the time that a merge starts it may hold a little more than when it planned, so what is named
    as the least is tried as well, if `is_tried`.
    """
    nbytes, is_least = 1, False
    while is_tried or not is_least:
        finished = run([*command, *budget_option(nbytes)])
        remove(output)
        if not finished.returncode:
            break
        named, is_least = named_budget(finished)
        if not named or (named <= nbytes and not is_tried):
            raise SystemExit(f"{nbytes} bytes: no larger budget is named: {finished.last_words()}")
        nbytes = max(named, nbytes + 1024**2 * (nbytes > 1))
    return nbytes


def named_budget(finished: Finished) -> tuple[int, bool]:
    """Return the budget that a refusal asks for, and whether it is the least that works.

    If already a header might not fit, more may be asked for after it. 0: not refused for that.
    """
    words = " ".join(finished.stderr.split())
    found = re.search(r"(may take|least that works here is) (\d+)MiB", words)
    if finished.returncode not in (1, 2) or found is None:
        return 0, False
    return int(found[2]) * 1024**2, found[1] != "may take"


def split_options(args: argparse.Namespace, name: str) -> list[str]:
    """Return the options of a program that were given as one string, `--NAME-options`."""
    return shlex.split(vars(args).get(f"{name}_options", ""))
