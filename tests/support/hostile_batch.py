"""Runs hostile inputs through the command line, in a process of their own, and tells what happened.

    python -m tests.support.hostile_batch FOLDER NUMBER...

One line of JSON a run. A run that hangs is ended by an alarm, and so told from one that fails.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from click.testing import CliRunner

from shardmix.cli.commands import app
from shardmix.system.memory import peak_resident_nbytes
from tests.support import (
    hostile_adapters,
    hostile_dcp,
    hostile_folders,
    hostile_headers,
    hostile_quantised,
    hostile_torch_files,
    hostile_vocabularies,
    hostile_words,
)
from tests.support.hostile_inputs import Words

CASES = (
    *hostile_headers.CASES,
    *hostile_folders.CASES,
    *hostile_words.CASES,
    *hostile_adapters.CASES,
    *hostile_torch_files.CASES,
    *hostile_dcp.CASES,
    *hostile_quantised.CASES,
    *hostile_vocabularies.CASES,
)
_LONGEST_SECONDS = 10
_WEIGHT = "=0.5"


def run(words: Words) -> dict[str, object]:
    """Run a command in this process; return how it ended, what it printed, what it took."""
    started = time.perf_counter()
    signal.alarm(_LONGEST_SECONDS)
    result = CliRunner().invoke(app, words)
    signal.alarm(0)
    error = result.exception
    return {
        "status": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "traceback": ""
        if error is None or isinstance(error, SystemExit)
        else "".join(traceback.format_exception(error)),
        "seconds": time.perf_counter() - started,
        "peak_nbytes": peak_resident_nbytes(),
    }


def listing(folder: Path) -> list[str]:
    """Return all that lies below a folder, following nothing."""
    return sorted(
        os.fsencode(os.path.join(path, name)).hex()
        for path, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def main() -> None:
    """Run some of the cases, each for people and for machines, and look at its model."""
    folder, numbers = Path(sys.argv[1]), map(int, sys.argv[2:])

    def hangs(*_: object) -> None:
        raise TimeoutError("the command hangs")

    signal.signal(signal.SIGALRM, hangs)
    for number in numbers:
        case, place = CASES[number], folder / f"{number}"
        place.mkdir()
        words = case.build(place)
        before = listing(place)
        runs = {"people": words, "machines": [*words, "--json"]}
        if words[1].endswith(_WEIGHT):
            runs["inspect"] = ["inspect", words[1].removesuffix(_WEIGHT)]
        for kind, command in runs.items():
            told = run(command) | {"name": case.name, "kind": kind}
            print(json.dumps(told | {"changed": listing(place) != before}), flush=True)


if __name__ == "__main__":
    main()
