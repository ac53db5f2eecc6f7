"""Figures as columns on the screen, and as CSV."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    for number, row in enumerate(cells):
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([first, *rest]).rstrip())
        if not number:
            print("  ".join("-" * width for width in widths))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the raw figures; the columns are those of the first row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nraw figures: {path}")


def where(rows: Iterable[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    """Return the rows that have these values in these columns."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return `"2.31 (2.20-3.05)"`: the median and the range."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def mib(nbytes: float) -> str:
    """Return bytes as whole MiB, for a table's cell."""
    return f"{nbytes / 1024**2:.0f}"


def over(first: float, second: float, digits: int = 2) -> str:
    """Return a ratio for a table's cell; `-` if there is nothing to divide by."""
    return f"{first / second:.{digits}f}" if second else "-"
