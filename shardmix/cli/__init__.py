"""The command line: thin. Parses, calls the library, renders."""

import gc
import os


def main() -> None:
    """Run the command line; exit with 0, 1 (something to mend), 2 (usage), 130 or 143 (stopped)."""
    # Imports make objects by the hundred thousand, and no garbage to look for among them.
    gc.set_threshold(50_000)
    # numpy's linear algebra, of which nothing is used, would start a thread for each core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from shardmix.cli.app import app

    app()
