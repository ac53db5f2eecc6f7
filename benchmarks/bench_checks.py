"""The ratios that bench.py's measurements are made for, from its samples. Measures nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import tools
from samples import Sample, median_beyond_s, median_total_s, peak_bytes, where

PEERS = (tools.COPY, tools.NAIVE, tools.MERGEKIT, tools.MIX_MODELS, tools.MIX_MODELS_BY_LAYERS)
MEDIANS = ((median_total_s, "whole process"), (median_beyond_s, "beyond start-up"))
MODES = (("warm", False), ("warm", True), ("cold", False), ("cold", True))


@dataclass(frozen=True, slots=True)
class Check:
    """One ratio, with both sides."""

    what: str
    ratio: float
    sides: str

    def row(self) -> tuple[str, str, str]:
        """The cells of the table."""
        return (self.what, f"{self.ratio:.2f}", self.sides)


def mode_name(cache: str, synced: bool) -> str:
    """As the tables call a mode: `warm`, or `warm, sync`."""
    return f"{cache}, sync" if synced else cache


def all_checks(samples: Sequence[Sample]) -> list[Check]:
    """Every check whose measurements are there."""
    return [
        *_beside_the_floor(samples),
        *_beside_peers(samples),
        *_peaks(samples),
        *_ways_to_read(samples),
        *_many_small_tensors(samples),
        *_least_budget(samples),
    ]


def _ratio(
    what: str, first: float | None, second: float | None, unit: str = "s", scale: float = 1.0
) -> Iterator[Check]:
    """Nothing where a side was not measured."""
    if first is not None and second is not None:
        digits = 2 if unit == "s" else 0
        sides = f"{first / scale:.{digits}f} / {second / scale:.{digits}f} {unit}"
        yield Check(what, first / second, sides)


def _beside_the_floor(samples: Sequence[Sample]) -> Iterator[Check]:
    for cache, synced in MODES:
        mode = where(samples, part="tools", cache=cache, synced=synced)
        ours, floor = where(mode, tool=tools.SHARDMIX), where(mode, tool=tools.FLOOR)
        what = f"{mode_name(cache, synced)}: shardmix beyond start-up / floor"
        yield from _ratio(what, median_beyond_s(ours), median_beyond_s(floor))


def _beside_peers(samples: Sequence[Sample]) -> Iterator[Check]:
    for part, peers in (("tools", PEERS), ("pairs", (tools.SD_MECHA,))):
        for cache, synced in MODES:
            mode = where(samples, part=part, cache=cache, synced=synced)
            ours = median_total_s(where(mode, tool=tools.SHARDMIX))
            for peer in peers:
                theirs = median_total_s(where(mode, tool=peer))
                what = f"{mode_name(cache, synced)}: {peer} / shardmix, whole process"
                yield from _ratio(what, theirs, ours)


def _peaks(samples: Sequence[Sample]) -> Iterator[Check]:
    for part in ("tools", "pairs"):
        mode = where(samples, part=part, cache="warm")
        ours = peak_bytes(where(mode, tool=tools.SHARDMIX))
        for tool in tools.EVERYTHING:
            is_peer = tool in (tools.SD_MECHA,) if part == "pairs" else tool != tools.SHARDMIX
            if is_peer:
                theirs = peak_bytes(where(mode, tool=tool))
                yield from _ratio(f"peak: {tool} / shardmix", theirs, ours, "MiB", 1024**2)


def _ways_to_read(samples: Sequence[Sample]) -> Iterator[Check]:
    for cache, synced in MODES:
        mode = where(samples, part="tools", cache=cache, synced=synced)
        mmap, pread = where(mode, tool=tools.SHARDMIX_MMAP), where(mode, tool=tools.SHARDMIX)
        what = f"{mode_name(cache, synced)}: --io mmap / pread, beyond start-up"
        yield from _ratio(what, median_beyond_s(mmap), median_beyond_s(pread))


def _many_small_tensors(samples: Sequence[Sample]) -> Iterator[Check]:
    part = where(samples, part="shapes")
    small = max((sample.num_tensors for sample in part), default=0)
    few = [sample for sample in part if sample.num_models == 3 and sample.num_tensors != small]
    for tool in (tools.SHARDMIX, tools.FLOOR, tools.NAIVE):
        mine, theirs = where(part, tool=tool, num_tensors=small), where(few, tool=tool)
        what = f"{tool}: {small} tensors / the same bytes as large ones"
        yield from _ratio(f"{what}, whole process", median_total_s(mine), median_total_s(theirs))
        yield from _ratio(
            f"{what}, beyond start-up", median_beyond_s(mine), median_beyond_s(theirs)
        )


def _least_budget(samples: Sequence[Sample]) -> Iterator[Check]:
    part = where(samples, part="budgets", tool=tools.SHARDMIX)
    given = [sample.budget_bytes for sample in part if sample.budget_bytes]
    if given:
        least = where(part, budget_bytes=min(given))
        free = where(part, budget_bytes=0)
        what = f"--max-memory {min(given) // 1024**2}MiB, the least that works / no budget"
        for median, name in MEDIANS:
            yield from _ratio(f"{what}, {name}", median(least), median(free))
        peak = peak_bytes(least)
        yield from _ratio("peak / the least budget", peak, float(min(given)), "MiB", 1024**2)
