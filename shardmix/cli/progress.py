"""Progress of a merge or of scoring: a bar on a terminal, else plain lines, on standard error.

Loads only the parts of rich that are shown.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shardmix.errors import printable
from shardmix.system.units import format_size

if TYPE_CHECKING:
    from rich.console import Console

    from shardmix.execute.progress import ProgressEvent
    from shardmix.scoring.report import OnScoreProgress, ScoreProgress

# Without a terminal, a line after this much progress or time keeps a log of hours short.
_LINE_FRACTION = 0.1
_LINE_SECONDS = 30.0

OnProgress = Callable[["ProgressEvent"], None]


@contextmanager
def progress_display(word: str = "merging", *, quiet: bool) -> Iterator[OnProgress | None]:
    """Yield a callback that shows progress, labelled `word`; None with `quiet`."""
    if quiet:
        yield None
    elif (console := _console()).is_terminal:
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        progress = Progress(
            TextColumn(word),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        task = progress.add_task(word, total=None, status="")

        def update(event: "ProgressEvent") -> None:
            progress.start()  # not before the first event: scoring may come before
            progress.update(task, total=1, completed=_fraction(event), status=_status(event))

        try:
            yield update
        finally:
            progress.stop()
    else:
        yield _LinePrinter(console, word)


@contextmanager
def score_display(*, quiet: bool) -> Iterator["OnScoreProgress | None"]:
    """Yield a callback that shows the scored model and its progress; None with `quiet`.

    The display ends with the last model, so that a merge can show its own.
    """
    if quiet:
        yield None
    elif (console := _console()).is_terminal:
        from rich.markup import escape

        status = console.status("scoring")

        def show(event: "ScoreProgress") -> None:
            status.update(escape(_score_status(event)))
            if event.is_end:
                status.stop()
            else:
                status.start()

        try:
            yield show
        finally:
            status.stop()
    else:
        seen: set[int] = set()

        def print_once(event: "ScoreProgress") -> None:
            if event.model not in seen and not event.is_end:
                seen.add(event.model)
                console.print(_score_status(event), soft_wrap=True, markup=False)

        yield print_once


class _LinePrinter:
    """Prints a line now and then, and one at the end."""

    def __init__(self, console: "Console", word: str) -> None:
        self._console = console
        self._word = word
        self._begin()

    def _begin(self) -> None:
        self._fraction = -_LINE_FRACTION  # so that the start has a line, too
        self._seconds = 0.0

    def __call__(self, event: "ProgressEvent") -> None:
        if event.seconds < self._seconds:  # recomputing begins once all digests are compared
            self._begin()
        fraction = _fraction(event)
        moved_on = fraction >= self._fraction + _LINE_FRACTION
        if moved_on or event.is_end or event.seconds >= self._seconds + _LINE_SECONDS:
            self._fraction, self._seconds = fraction, event.seconds
            self._console.print(f"{self._word}: {fraction:4.0%}  {_status(event)}", soft_wrap=True)


def _fraction(event: "ProgressEvent") -> float:
    """Return the fraction done; it reaches 1 only once all files are finished and renamed."""
    if event.is_end:
        return 1.0
    return min(event.num_bytes_done / max(event.num_bytes_total, 1), 0.99)


def _console() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _score_status(event: "ScoreProgress") -> str:
    return (
        f"scoring model {event.model} of {event.num_models}: {event.fraction:4.0%}  "
        f"{printable(event.source)}  memory {format_size(event.resident_nbytes)}"
    )


def _status(event: "ProgressEvent") -> str:
    rate = (event.num_bytes_done - event.num_bytes_kept) / max(event.seconds, 1e-9)
    kept = f" ({format_size(event.num_bytes_kept)} by an earlier merge)" * bool(
        event.num_bytes_kept
    )
    return (
        f"{format_size(event.num_bytes_done)} of {format_size(event.num_bytes_total)}{kept}  "
        f"{format_size(rate)}/s  shards {event.num_shards_done}/{event.num_shards_total}  "
        f"memory {format_size(event.resident_nbytes)}"
    )
