"""The command line: thin. Parses, calls the library, renders."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Run the command line; exit with 0, 1 (something to mend), 2 (usage), 130 or 143 (stopped)."""
    with importing():
        from shardmix.cli.app import app

    try:
        app()
    except SystemExit as ended:
        _leave(ended)


@contextmanager
def importing() -> Iterator[None]:
    """Surround imports, which make objects by the hundred thousand, and no garbage to look for."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _leave(ended: SystemExit) -> None:
    """End the process without taking all modules apart, which takes 80 ms."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # a pipe that nobody reads any more: Python's own way to end knows
        raise ended from None
    os._exit(ended.code if isinstance(ended.code, int) else 0)
