"""Whole processes measured by turns, warm: rounds of several ways to do something, and a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lib.machine import read_into_cache, wait_until_idle
from benchmarks.lib.processes import Finished, run
from benchmarks.lib.tables import Row, column, mib, over, print_table, spread
from benchmarks.lib.workspace import remove


class Way(NamedTuple):
    """A command, and what it reads."""

    words: Sequence[Any]
    """The command line."""
    models: Sequence[Path]
    """Folders that are brought into the page cache before."""


def by_turns(
    ways: Mapping[str, Way],
    output: Path,
    rounds: int,
    more: Callable[[Finished], Row] = lambda _: {},
) -> list[Row]:
    """Run every way in each round, from an empty output; return a row for each run.

    `more` gives further figures of a run. Ends the benchmark if a way fails.
    """
    rows: list[Row] = []
    for number in range(rounds):
        for name, way in ways.items():
            remove(output)
            read_into_cache(way.models)
            wait_until_idle(limit_s=5)
            done = run(way.words)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            rows.append(
                {
                    "way": name,
                    "round": number,
                    "seconds": done.wall_s,
                    "cpu_seconds": round(done.user_s + done.system_s, 3),
                    "peak_bytes": done.peak_bytes,
                    "read_bytes": done.read_calls_bytes,
                    **more(done),
                }
            )
    return rows


def print_ways(rows: Sequence[Row], ratio: str, more: Iterable[tuple[str, str]] = ()) -> None:
    """Print a row for each way: seconds, the ratio of best times to the first way's, and more.

    `ratio` is the title of that; `more` has titles and keys of further columns, in bytes.
    """
    columns = (("peak MiB", "peak_bytes"), ("MiB read", "read_bytes"), *more)
    names = list(dict.fromkeys(row["way"] for row in rows))
    first = min(column(rows, "seconds", way=names[0]))
    table = [
        (
            name,
            spread(column(rows, "seconds", way=name)),
            over(min(column(rows, "seconds", way=name)), first),
            spread(column(rows, "cpu_seconds", way=name)),
            *(mib(max(column(rows, key, way=name))) for _, key in columns),
        )
        for name in names
    ]
    print_table(("way", "s", ratio, "CPU s", *(title for title, _ in columns)), table)
