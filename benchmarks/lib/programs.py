"""The command lines of all programs that are measured, and what they need installed.

`{models}` and such stand for what a run is about; see `merge_command` and `score_command`.
"""

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.processes import Finished, run
from benchmarks.lib.workspace import Workspace, remove

REQUIREMENTS = {
    "mergekit": ("torch==2.13.0", "mergekit==0.1.5"),
    # It names no versions and leaves out sentence-transformers, which it imports.
    "lm-cocktail": (
        *("torch==2.13.0", "transformers==5.23.0"),
        *("sentence-transformers==6.2.0", "lm-cocktail==0.0.4"),
    ),
    "sd-mecha": ("torch==2.13.0", "sd-mecha==1.1.8"),
}
"""Of programs with an environment of their own."""


@dataclass(frozen=True, slots=True)
class Program:
    """One way to merge or to score."""

    words: str
    """Its command line."""
    environment: str = "shardmix"
    """Whose python it runs with; a key of `REQUIREMENTS`, or shardmix's."""
    reports: bool = True
    """Whether it prints one JSON object with its `seconds` beyond start-up."""
    is_slow: bool = False
    """Takes minutes: fewer rounds."""


_SHARDMIX = "{python} -m shardmix merge {weighted} -o {output} {fsync}"
_OTHERS = "{python} -m benchmarks.compare.others"
MERGES = {
    # A reflink would move no bytes.
    "cp": Program("cp -r --reflink=never {first} {output}", reports=False),
    "floor": Program("{python} -m benchmarks.compare.floor {models} -o {output} {fsync}"),
    "shardmix": Program(f"{_SHARDMIX} --quiet --json"),
    "shardmix-mmap": Program(f"{_SHARDMIX} --io mmap --quiet --json"),
    "shardmix-torch": Program(f"{_SHARDMIX} --backend torch --quiet --json"),
    "shardmix-cpu": Program(f"{_SHARDMIX} --device cpu --quiet --json"),
    "shardmix-gpu": Program(f"{_SHARDMIX} --device cuda:0 --quiet --json"),
    "naive": Program(f"{_OTHERS} naive {{models}} -o {{output}}"),
    # The fastest of its plain options on two cores: threads and asynchronous writes gained nothing,
    # shards of the sources' size gained much over the default of one shard for everything.
    "mergekit": Program(
        "{bin}/mergekit-yaml {recipe} {output} --quiet --no-copy-tokenizer --no-write-model-card"
        " --out-shard-size 500M",
        "mergekit",
        reports=False,
    ),
    "mix_models": Program(f"{_OTHERS} mix_models {{models}} -o {{output}}", "lm-cocktail"),
    "mix_models_by_layers": Program(
        f"{_OTHERS} mix_models_by_layers {{models}} -o {{output}}", "lm-cocktail", is_slow=True
    ),
    "sd-mecha": Program(f"{_OTHERS} sd-mecha {{models}} -o {{output}}", "sd-mecha"),
}
"""In the order of the tables."""

_TASK = "--data {data} --temperature 5.0 --batch-size 2 --max-input-length 2048"
SCORINGS = {
    "shardmix": Program(
        "{python} -m shardmix score {models} --model-type decoder --device cpu --json " + _TASK
    ),
    "LM-Cocktail": Program(
        "{python} -m benchmarks.scoring.others lm-cocktail {models} " + _TASK, "lm-cocktail"
    ),
    "accelerate": Program("{python} -m benchmarks.scoring.others accelerate {models} " + _TASK),
}
"""With LM-Cocktail's defaults."""


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
        many = [value] if not isinstance(value, list) else value
        command += [str(item) for item in many] if value is not None else [word.format(**values)]
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

    `fsync` says whether a program that can is to put its output on the disk. A recipe is written
    for the program that reads one.
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


def plan_command(
    python: str,
    models: Sequence[Path],
    output: Path,
    *,
    weights: Iterable[float] = (),
    options: Iterable[str] = (),
) -> list[str]:
    """Return the command line of a plan, in JSON."""
    words = merge_command("shardmix", python, models, output, weights=weights)
    words[words.index("merge")] = "plan"
    return [word for word in words if word not in ("--no-fsync", "--quiet")] + list(options)


def score_command(
    name: str, python: str, models: Sequence[Path], data: Path, options: Iterable[str] = ()
) -> list[str]:
    """Return the command line of a scoring by a file of examples, which reports in JSON."""
    words = SCORINGS[name].words
    return [*fill_in(words, python=python, models=list(models), data=data), *options]


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
    given: Mapping[str, str] = vars(args)
    return shlex.split(given[f"{name}_options"])
