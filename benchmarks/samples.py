"""The raw figures of bench.py: a row for each measurement, written, read back and selected from."""

import csv
import statistics
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: a row of the CSV."""

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
    """`--max-memory`; 0 where none was given."""
    wall_s: float
    """The whole process, start-up included."""
    sync_s: float
    """`sync` after it; 0 where there was none."""
    reported_s: float | None
    """Beyond start-up, as the tool reports it; None where it doesn't."""
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
        case = (self.tool, self.model_set, self.num_models, self.budget_bytes)
        return (*case, self.part, self.cache, self.synced, self.round)

    @property
    def total_s(self) -> float:
        """From the start of the process until the output is where it is to be."""
        return self.wall_s + self.sync_s

    @property
    def beyond_start_up_s(self) -> float | None:
        """The same without the start-up, where the tool reports what it took without."""
        return None if self.reported_s is None else self.reported_s + self.sync_s


@dataclass(frozen=True, slots=True)
class Look:
    """The resident memory of a tool at one moment: a row of the other CSV."""

    tool: str
    seconds: float
    """Since the start of the process."""
    resident_bytes: int


class Table:
    """A CSV file of dataclasses, appended to row by row, so that an interrupted run loses none."""

    def __init__(self, path: Path, kind: type) -> None:
        self.path = path
        self._kind = kind
        self._names = [field.name for field in fields(kind)]

    def append(self, rows: Iterable[Any]) -> None:
        """Add rows; the file and its first line are made where they aren't there."""
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self._names, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    def read(self) -> list[Any]:
        """All rows; none where there is no file."""
        if not self.path.exists():
            return []
        types = typing.get_type_hints(self._kind)
        with self.path.open(newline="") as file:
            return [
                self._kind(**{name: _parse(types[name], row[name]) for name in self._names})
                for row in csv.DictReader(file)
            ]


def _parse(kind: object, text: str) -> object:
    if kind is bool:
        return text == "True"
    if kind == float | None:
        return float(text) if text else None
    return kind(text)


def where(samples: Iterable[Sample], **wanted: object) -> list[Sample]:
    """The samples that have these values in these fields."""
    return [
        sample
        for sample in samples
        if all(getattr(sample, name) == value for name, value in wanted.items())
    ]


def median_total_s(samples: Sequence[Sample]) -> float | None:
    """Median of the whole process and the sync after it; None where there are no samples."""
    return statistics.median(sample.total_s for sample in samples) if samples else None


def median_beyond_s(samples: Sequence[Sample]) -> float | None:
    """Median without the start-up; None where there are no samples or none that tell."""
    found = [sample.beyond_start_up_s for sample in samples]
    told = [seconds for seconds in found if seconds is not None]
    return statistics.median(told) if told else None


def peak_bytes(samples: Sequence[Sample]) -> int | None:
    """The highest peak; None where there are no samples."""
    return max((sample.peak_bytes for sample in samples), default=None)


def in_order(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))
