"""The command line: thin. Parses, calls the library, renders."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Run the command line; exit with 0, 1 (something to mend), 2 (usage), 130 or 143 (stopped)."""
    with importing():
        from shardmix.cli.app import app

    app()


@contextmanager
def importing() -> Iterator[None]:
    """Surround imports, which make objects by the hundred thousand, and no garbage to look for."""
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
