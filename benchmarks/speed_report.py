"""Medians, ranges and ratios of speed.py's measurements. Measures nothing itself."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness import mib, print_table, spread

TOOLS = ("floor", "shardmix", "mergekit", "import torch", "import mergekit")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: a row of the CSV."""

    cache: str
    fsync: bool
    tool: str
    round: int
    wall_s: float
    seconds: float | None
    """Beyond start-up, as the tool reports it."""
    user_s: float
    system_s: float
    peak_bytes: int
    written_bytes: int
    """Size of the output's safetensors files."""
    busy_before: float
    """Share of the cores that other processes kept busy just before."""


class Medians:
    """The samples by cache state, fsync and tool."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._groups: dict[tuple[str, bool, str], list[Sample]] = {}
        for sample in samples:
            key = (sample.cache, sample.fsync, sample.tool)
            self._groups.setdefault(key, []).append(sample)

    def in_order(self) -> list[tuple[str, bool, str]]:
        """Warm before cold, no fsync before fsync, the floor first."""
        return sorted(self._groups, key=lambda key: (key[0] == "cold", key[1], TOOLS.index(key[2])))

    def samples(self, key: tuple[str, bool, str]) -> list[Sample]:
        """The samples of one tool in one mode; none where it did not take part."""
        return self._groups.get(key, [])

    def wall(self, key: tuple[str, bool, str]) -> float | None:
        """Median wall time of the whole process."""
        values = [sample.wall_s for sample in self.samples(key)]
        return statistics.median(values) if values else None

    def beyond_start_up(self, key: tuple[str, bool, str]) -> list[float]:
        """Seconds beyond start-up: as reported, or for mergekit without its median import."""
        cache, _, tool = key
        start_up = self.wall((cache, False, "import mergekit"))
        if tool == "mergekit" and start_up is not None:
            return [sample.wall_s - start_up for sample in self.samples(key)]
        return [sample.seconds for sample in self.samples(key) if sample.seconds is not None]


def print_report(samples: Sequence[Sample]) -> None:
    """Print one line a tool and mode, each beside the floor and shardmix in the same mode."""
    medians = Medians(samples)
    rows = []
    for key in medians.in_order():
        cache, fsync, tool = key
        found, beyond = medians.samples(key), medians.beyond_start_up(key)
        floor = medians.beyond_start_up((cache, fsync, "floor"))
        shardmix, wall = medians.wall((cache, fsync, "shardmix")), medians.wall(key)
        rows.append(
            (
                f"{cache}, {'fsync' if fsync else 'no fsync'}: {tool}",
                spread([sample.wall_s for sample in found]),
                spread(beyond) if beyond else "",
                mib(max(sample.peak_bytes for sample in found)),
                f"{statistics.median(beyond) / statistics.median(floor):.2f}"
                if beyond and floor
                else "",
                f"{wall / shardmix:.2f}" if wall and shardmix else "",
            )
        )
    noisy = sum(sample.busy_before > 0.2 for sample in samples)
    print(f"\n{noisy} of {len(samples)} measurements began with other processes on the cores\n")
    header = ("", "wall s", "s beyond start-up", "peak MiB", "beyond / floor", "wall / shardmix")
    print_table(header, rows)
