"""The command line that all benchmarks share, and the folder for their data."""

import argparse
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.machine import print_facts
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.tables import write_csv


def parser(
    description: str, *, has_python: bool = True, **options: tuple[Any, ...]
) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes, and these options.

    Each is `name=(default, help)` or `name=(default, help, choices)`. The default gives the type:
    of a list, any number; of a bool, a switch. A type in its place means that there is no default,
    and None that it is a word without a name. `has_python` is for those that run shardmix in
    processes of their own.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--work-dir", type=Path, required=True, help="data go here; local disk")
    made.add_argument("--keep", action="store_true", help="leave the data for the next run")
    if has_python:
        made.add_argument("--python", default=sys.executable, help="python that has shardmix")
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
    measure: Callable[[argparse.Namespace, "Workspace"], tuple[Sequence[Any], bool]],
    made: argparse.ArgumentParser,
) -> None:
    """Run a benchmark from its command line to its exit: facts, what it measures, raw figures.

    `measure` returns the rows of the CSV, and whether all is as promised; else the status is 1.
    """
    args = made.parse_args()
    with Workspace(args) as workspace:
        print_facts(args.work_dir, getattr(args, "python", sys.executable))
        rows, is_as_promised = measure(args, workspace)
    write_csv(args.csv, rows)
    raise SystemExit(not is_as_promised)


class Workspace:
    """A folder for a benchmark's data, which is gone at the end unless it is to be kept.

    Checkpoints found there from an earlier run are used as they are, and stay.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.root: Path = args.work_dir
        self._keep: bool = args.keep
        self._scratch: list[Path] = []
        self._made: list[Path] = []
        self._is_new = not self.root.exists()

    def __enter__(self) -> "Workspace":
        # So that `kill` and `timeout` end the measured process and clear up, as an interrupt does.
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_exception: object) -> None:
        for path in self._scratch if self._keep else (*self._scratch, *self._made):
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

    def linked_copy(self, folder: Path, name: str) -> Path:
        """Return a folder of hard links to the files of another: a checkpoint of the same bytes."""
        copy = self.scratch(name)
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).hardlink_to(path)
        return copy

    def environment(self, name: str, requirements: Sequence[str]) -> str:
        """Return the python of a virtual environment with these packages; makes what is missing."""
        folder = self.lasting(name)
        python = folder / "bin" / "python"
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
