"""The command line: thin. Parses, calls the library, renders.

commands               the commands; each calls one function of the library
options, arguments     their options, and the meaning of words on the line
progress, render       a display during the merge, and the result as text
pictures               a profile's picture, if it can be drawn
exit                   errors and signals → messages and an exit status
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    """Run the command line; exit with 0, 1 (something to mend), 2 (usage), 130 or 143 (stopped)."""
    with rare_collections():
        from shardmix.cli.commands import app

    status = 0
    try:
        app()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else status
    except OSError as error:  # from printing; all other errors have a message of their own
        status = _cannot_print(error)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except OSError as error:
        status = _cannot_print(error)
    # Skips the teardown of all modules, which takes 80 ms.
    os._exit(status)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Make the garbage collector run less often while nearly all new objects stay.

    This holds for imports, and for plans of many tensors: otherwise it takes a fifth of their time.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(50_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _cannot_print(error: OSError) -> int:
    print(f"error: standard output: cannot be written ({error.strerror})", file=sys.stderr)
    return 1
