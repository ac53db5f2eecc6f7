"""The way of every benchmark from its command line to its exit, and the folder for its data."""

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import facts
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import REQUIREMENTS
from benchmarks.lib.tables import Row, write_csv

SHAPES: dict[str, Any] = json.loads(Path(__file__).with_name("shapes.json").read_text())
PRESETS: dict[str, Any] = SHAPES["presets"]
"""What checkpoints there are, by name; `checkpoints` makes them."""
MADE_UP = Path(__file__).with_name("examples.json")
"""45 examples of random words, as long as LM-Cocktail's own."""


def parser(
    told: str, environments: Sequence[str] = ("shardmix",), **options: tuple[Any, ...]
) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes, and these options.

    Each is `name=(default, help)` or `name=(default, help, choices)`. The default gives the type:
    of a list, any number; of a bool, a switch. A type in its place means that there is no default,
    and None that it is a word without a name. `environments` are those whose pythons it runs,
    `told` is what the module says of itself.
    """
    made = argparse.ArgumentParser(
        description=told.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--work-dir", type=Path, required=True, help="data go here; local disk")
    made.add_argument("--keep", action="store_true", help="leave the data for the next run")
    for name in environments:
        given = os.environ.get(f"{name.replace('-', '_').upper()}_PYTHON")
        how = {"default": sys.executable if name == "shardmix" else given}
        how["help"] = f"python that has {name}; if none is known, one is made in the work folder"
        made.add_argument(f"--{name}-python".replace("shardmix-", ""), **how)
    for name, (default, told, *choices) in options.items():
        how: dict[str, Any] = {"help": told}
        if choices:
            how["choices"] = list(choices[0])
        if isinstance(default, bool):
            how |= {"action": argparse.BooleanOptionalAction, "default": default}
        elif default is None or isinstance(default, type):
            how |= {"type": default}
        elif isinstance(default, list):
            how |= {"type": type(default[0]), "nargs": "+", "default": default}
        else:
            how |= {"type": type(default), "default": default}
        made.add_argument(name if default is None else f"--{name.replace('_', '-')}", **how)
    return made


def benchmark(
    measure: Callable[[argparse.Namespace, "Workspace"], tuple[Sequence[Row], bool]],
    environments: Sequence[str] = ("shardmix",),
    **options: tuple[Any, ...],
) -> None:
    """Run a benchmark from its command line to its exit: facts, what it measures, raw figures.

    `measure` returns the rows of `--csv`, and whether all is as promised; else the status is 1.
    """
    args = parser(measure.__globals__["__doc__"], environments, **options).parse_args()
    with Workspace(args) as workspace:
        print("\n".join(facts(workspace.root, map(workspace.python, environments))), end="\n\n")
        rows, is_as_promised = measure(args, workspace)
    write_csv(args.csv, rows)
    print(f"\nraw figures: {args.csv}")
    raise SystemExit(not is_as_promised)


class Workspace:
    """A folder for a benchmark's data, which is gone at the end unless it is to be kept.

    Checkpoints found there from an earlier run are used as they are, and stay.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.root: Path = args.work_dir
        self._args = args
        self._scratch: list[Path] = []
        self._made: list[Path] = []
        self._is_new = not self.root.exists()

    def __enter__(self) -> "Workspace":
        # So that `kill` and `timeout` end the measured process and clear up, as an interrupt does.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        for path in self._scratch if self._args.keep else (*self._scratch, *self._made):
            remove(path)
        if self._is_new and not any(self.root.iterdir()):
            self.root.rmdir()

    def scratch(self, name: str) -> Path:
        """Return a path for outputs: not there now, and gone at the end."""
        path = self.root / name
        remove(path)
        self._scratch.append(path)
        return path

    def lasting(self, name: str) -> Path:
        """Return a path for what another run can use again; gone at the end if this run made it."""
        path = self.root / name
        if not path.exists():
            self._made.append(path)
        return path

    def checkpoint(self, name: str, *words: object) -> Path:
        """Return the checkpoint `name`, written by `checkpoints` if it isn't there yet."""
        folder = self.lasting(name)
        # The generator writes config.json last: without it the checkpoint is half done.
        if not (folder / "config.json").exists():
            print(f"writing {name} ...", file=sys.stderr)
            kind, *options = map(str, words)
            module = ["-m", "benchmarks.lib.checkpoints"]
            run_or_exit([sys.executable, *module, kind, folder, *options])
        return folder

    def checkpoints(self, name: str, letters: str, *words: object) -> list[Path]:
        """Return one for each letter, `NAME-a` and so on, each with values of its own."""
        return [
            self.checkpoint(f"{name}-{letter}", *words, "--seed", seed)
            for seed, letter in enumerate(letters)
        ]

    def linked_copies(self, folders: Sequence[Path], name: str, count: int) -> list[Path]:
        """Return so many folders of hard links to the files of these in turn: the same bytes."""
        copies = [self.scratch(f"{name}-copy-{number}") for number in range(count)]
        for number, copy in enumerate(copies):
            copy.mkdir()
            for path in folders[number % len(folders)].iterdir():
                (copy / path.name).hardlink_to(path)
        return copies

    def examples(self, data: Path, count: int | None = None) -> Path:
        """Return a JSON list of the first examples in such a list, or in an object of lists."""
        value = json.loads(data.read_text())
        tasks = [value] if isinstance(value, list) else value.values()
        examples = [example for each in tasks for example in each][:count]
        print(f"{len(examples)} examples: {'made up' if data == MADE_UP else data.name}")
        path = self.scratch("examples.json")
        path.write_text(json.dumps(examples, indent=1) + "\n")
        return path

    def python(self, environment: str) -> str:
        """Return an environment's python: shardmix's, the one that is given, or a new one."""
        option = f"{environment}-python".replace("shardmix-", "").replace("-", "_")
        if given := vars(self._args)[option]:
            return str(given)
        folder = self.lasting(f"{environment}-venv")
        python, requirements = folder / "bin" / "python", REQUIREMENTS[environment]
        if not python.exists():
            print(f"installing {' '.join(requirements)} ...", file=sys.stderr)
            run_or_exit([sys.executable, "-m", "venv", folder])
            run_or_exit([python, "-m", "pip", "install", "--quiet", *requirements])
        return str(python)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
