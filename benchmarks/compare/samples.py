"""The raw figures of a comparison: a row for each measurement, written, read and selected from.

README.md says what the columns of bench.csv mean.
"""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Rows = Sequence[Row]
IDENTITY = (
    *("part", "model_set", "tool", "cache", "synced", "round"),
    *("num_models", "budget_bytes"),
)
"""What tells a measurement from others."""


def append(path: Path, rows: Rows) -> None:
    """Add rows to a file, made if it isn't there: an interrupted run loses none."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        for row in rows:
            writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
            if is_new:
                writer.writeheader()
            is_new = False
            writer.writerow(row)


def read(path: Path) -> list[Row]:
    """Return all rows; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> object:
    known = {"True": True, "False": False, "": None}
    if text in known:
        return known[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def totals(rows: Rows) -> list[float]:
    """Return the seconds of each whole process, and of the sync after it."""
    return [row["wall_s"] + row["sync_s"] for row in rows]


def total_s(rows: Rows) -> float | None:
    """Return the median of the whole process and the sync after it; None without rows."""
    return statistics.median(totals(rows)) if rows else None


def beyond_s(rows: Rows) -> float | None:
    """Return the median without the start-up; None without rows that tell."""
    told = [row["reported_s"] + row["sync_s"] for row in rows if row["reported_s"] is not None]
    return statistics.median(told) if told else None


def peak_bytes(rows: Rows) -> int | None:
    """Return the highest peak; None without rows."""
    return max((row["peak_bytes"] for row in rows), default=None)
