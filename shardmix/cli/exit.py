"""The end of a command: 0, or one message and 1 or 2, or stopped, with 130 or 143."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import click

from shardmix.errors import ShardmixError, printable


@contextmanager
def errors_reported(
    *, json: bool, quiet: bool = False, if_stopped: str = "nothing was written"
) -> Iterator[None]:
    """Turn a user's mistake into one message and an exit status, without a traceback.

    `if_stopped` is the message of an interrupt without one of its own.
    """
    signal.signal(signal.SIGTERM, _raise_once)
    signal.signal(signal.SIGINT, _raise_once)
    try:
        from shardmix.sources.located import SHOW_DOWNLOADS

        SHOW_DOWNLOADS.set(not quiet)
        yield
    except ShardmixError as error:
        from shardmix.cli import render

        render.error(str(error))
        if json:
            render.error_object(
                type(error).__name__,
                str(error),
                subject=error.subject,
                finding=error.finding,
                remedy=error.remedy,
                hints=error.hints,
            )
        raise click.exceptions.Exit(error.exit_status) from None
    except KeyboardInterrupt as error:
        is_terminated = isinstance(error, _Terminated)
        word, status = ("terminated", 143) if is_terminated else ("interrupted", 130)
        kept = printable(str(error) or if_stopped)
        message = f"{word}: {kept}"
        click.echo(message, err=True)
        if json:
            from shardmix.cli import render

            render.error_object(word.capitalize(), message, finding=word, hints=(kept,))
        raise click.exceptions.Exit(status) from None


class _Terminated(KeyboardInterrupt):
    """The exception of SIGTERM, which stops a merge as Ctrl-C does."""


def ignore_signals() -> None:
    """Ignore all further signals to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _raise_once(number: int, _frame: object) -> None:
    # A second signal must not interrupt the clean-up that the first one started.
    ignore_signals()
    raise _Terminated if number == signal.SIGTERM else KeyboardInterrupt
