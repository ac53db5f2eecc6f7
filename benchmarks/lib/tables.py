"""Figures as columns on the screen, and as CSV."""

import ast
import contextlib
import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One measurement: a row of a CSV, by column."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(int):
    """Bytes, written as 500MB or 1.5GiB; raises ValueError for anything else."""

    def __new__(cls, text: str | float) -> "Size":
        """Read a size."""
        number = str(text).rstrip("KMGiBkmgb")
        unit = str(text)[len(number) :].upper()
        if unit not in UNITS:
            raise ValueError(f"{text!r} is no size; write it as 500MB or 2GiB")
        return super().__new__(cls, float(number) * UNITS[unit])


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows in columns, the first to the left and the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    for first, *others in cells:
        rest = map(str.rjust, others, widths[1:])
        print("  ".join([first.ljust(widths[0]), *rest]).rstrip())


def write_csv(path: Path, rows: Sequence[Mapping[str, object]], *, append: bool = False) -> None:
    """Write or append rows, whose columns are those of the first one."""
    if not rows:
        return
    is_new = not append or not path.exists()
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Return all rows, with numbers as such and None for nothing; no rows if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> object:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text or None


def where(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Return the rows that have these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def column(rows: Iterable[Row], name: str, **wanted: object) -> list[Any]:
    """Return a column of the rows that have these values; nothing for None."""
    return [row[name] for row in where(rows, **wanted) if row[name] is not None]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return `"2.31 (2.20-3.05)"`: the median, and the range if there is one."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def mib(nbytes: float) -> str:
    """Return bytes as whole MiB, for a table's cell."""
    return f"{nbytes / 1024**2:.0f}"


def over(first: float, second: float, digits: int = 2) -> str:
    """Return a ratio for a table's cell; `-` if there is nothing to divide by."""
    return f"{first / second:.{digits}f}" if second else "-"
