"""The raw figures of a comparison: a row for each measurement, written, read and selected from."""

import csv
import statistics
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: a row of bench.csv."""

    part: str
    """What it was measured for; compared are samples of one part."""
    model_set: str
    """Which checkpoints were merged."""
    tool: str
    cache: str
    """warm or cold."""
    synced: bool
    """Whether the tool did its own fsync, if it has one, and `sync` came after it."""
    round: int
    num_models: int
    model_bytes: int
    """Size of one model's weight files."""
    num_tensors: int
    """Of one model."""
    largest_tensor_bytes: int
    budget_bytes: int
    """`--max-memory`; 0 if none was given."""
    wall_s: float
    """The whole process, start-up included."""
    sync_s: float
    """`sync` after it; 0 if there was none."""
    reported_s: float | None
    """Beyond start-up, as the tool reports it; None if it doesn't."""
    user_s: float
    system_s: float
    peak_bytes: int
    written_bytes: int
    """Size of the output's weight files."""
    busy_before: float
    """Share of the cores that other processes kept busy just before."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells this measurement from others."""
        case = (self.part, self.tool, self.model_set, self.num_models, self.budget_bytes)
        return (*case, self.cache, self.synced, self.round)

    @property
    def total_s(self) -> float:
        """From the start of the process until the output is where it is to be."""
        return self.wall_s + self.sync_s


@dataclass(frozen=True, slots=True)
class Look:
    """The resident memory of a tool at one moment: a row of bench-memory.csv."""

    tool: str
    seconds: float
    """Since the start of the process."""
    resident_bytes: int


class Table:
    """A CSV file of dataclasses, appended to row by row, so that an interrupted run loses none."""

    def __init__(self, path: Path, kind: type) -> None:
        self.path = path
        self._kind = kind

    def append(self, rows: Iterable[Any]) -> None:
        """Add rows; the file and its first line are made if they aren't there."""
        is_new = not self.path.exists()
        names = [field.name for field in fields(self._kind)]
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    def read(self) -> list[Any]:
        """Return all rows; none if there is no file."""
        if not self.path.exists():
            return []
        parsers = {bool: "True".__eq__, float | None: lambda text: float(text) if text else None}
        kinds = typing.get_type_hints(self._kind)
        with self.path.open(newline="") as file:
            return [
                self._kind(
                    **{name: parsers.get(kind, kind)(row[name]) for name, kind in kinds.items()}
                )
                for row in csv.DictReader(file)
            ]


def where(samples: Iterable[Sample], **wanted: object) -> list[Sample]:
    """Return the samples that have these values in these fields."""
    return [
        sample
        for sample in samples
        if all(getattr(sample, name) == value for name, value in wanted.items())
    ]


def total_s(samples: Sequence[Sample]) -> float | None:
    """Return the median of the whole process and the sync after it; None without samples."""
    return statistics.median(sample.total_s for sample in samples) if samples else None


def beyond_s(samples: Sequence[Sample]) -> float | None:
    """Return the median without the start-up; None without samples that tell."""
    told = [one.reported_s + one.sync_s for one in samples if one.reported_s]
    return statistics.median(told) if told else None


def peak_bytes(samples: Sequence[Sample]) -> int | None:
    """Return the highest peak; None without samples."""
    return max((sample.peak_bytes for sample in samples), default=None)
