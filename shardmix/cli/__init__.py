"""The command line: thin. Parses, calls the library, renders.

commands               the commands; each calls one function of the library
options, arguments     their options, and what words on the line mean
progress, render       a display while it works, and the result as text
pictures               a profile's picture, if it can be had
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
    except OSError as error:  # of what is printed: all else has a message of its own
        status = _cannot_print(error)
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except OSError as error:
        status = _cannot_print(error)
    # Without taking all modules apart, which takes 80 ms.
    os._exit(status)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let the garbage collector look less often, where nearly all that is made is kept.

    So it is with imports, and with plans of many tensors: a fifth of their time else.
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
