"""Draws the profile of a merge: `python -m shardmix.profiling.plot FIGURES.json PICTURE.svg`.

Needs matplotlib (extra `profile`), without a display. Knows only the profile.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shardmix.profiling.profile import Profile, Samples
from shardmix.system.units import format_mib

# Equal figures give equal files: by default matplotlib adds random names and the time.
_REPRODUCIBLE: Any = {"svg.hashsalt": "shardmix"}
_NO_DATE: Any = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}

_GIB, _MIB = float(2**30), float(2**20)
_NUM_RATES = 60
"""Steps of the speed curves: enough to show stalls, few enough to read."""

_Values = npt.NDArray[np.float64]


def draw(profile: Profile, picture: Path) -> None:
    """Draw a profile into a file, whose suffix says its kind: svg, png or pdf."""
    panels = [_draw_memory, _draw_page_cache, _draw_speed]
    if profile.samples.vram_reserved_bytes is not None:
        panels.insert(1, _draw_vram)
    with rc_context(_REPRODUCIBLE):
        figure = Figure(figsize=(9, 1.2 + 2.3 * len(panels)), layout="constrained")
        figure.suptitle(_title(profile), fontsize="medium")
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for panel, on in zip(panels, axes, strict=True):
            panel(on, profile)
            on.set_ylim(bottom=0)
            on.grid(alpha=0.3)
            for moment in (profile.load_seconds, profile.load_seconds + profile.merge_seconds):
                on.axvline(moment, color="gray", linewidth=0.8)
            on.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
        axes[-1].set_xlabel("seconds; upright lines: workers start and end")
        axes[-1].set_xlim(0, profile.seconds)
        figure.savefig(picture, dpi=150, metadata=_NO_DATE[picture.suffix])


def _title(profile: Profile) -> str:
    plan, machine = profile.plan, profile.machine
    outcome = "" if profile.outcome == "complete" else f" ({profile.outcome})"
    return (
        f"shardmix {profile.shardmix}, merge of {plan.num_models} models{outcome}: "
        f"{plan.bytes_read / 1e9:.3g} GB to read, {plan.bytes_written / 1e9:.3g} GB to write, "
        f"{profile.seconds:.3g} s\n"
        f"{plan.workers} workers on {plan.device}, {plan.backend}, {plan.io}, chunks of "
        f"{format_mib(plan.strip_bytes)}; {machine.num_cores} cores, "
        f"{machine.memory_bytes / _GIB:.3g} GiB"
    )


def _draw_memory(on: Axes, profile: Profile) -> None:
    samples, plan = profile.samples, profile.plan
    top = max(plan.projected_peak_bytes, profile.peak_rss_bytes)
    # A budget far above would flatten all other curves; its figure is in the legend.
    budget = plan.max_memory_bytes
    top = max(top, budget if budget is not None and budget < 2 * top else 0)
    unit, name = (_MIB, "MiB") if top < 2 * _GIB else (_GIB, "GiB")
    times, rss = _known(samples, samples.rss_bytes)
    on.plot(times, rss / unit, color="black", label="resident")
    split_times, anon = _known(samples, samples.rss_anon_bytes)
    _, file = _known(samples, samples.rss_file_bytes)
    on.stackplot(
        split_times,
        anon / unit,
        file / unit,
        labels=["anonymous", "of files"],
        colors=["C0", "C2"],
        alpha=0.4,
    )
    _draw_bound(on, plan.projected_peak_bytes / unit, "projected", color="C1")
    if budget is not None:
        _draw_bound(on, budget / unit, "budget", color="C3")
    on.set_ylim(top=1.1 * top / unit)
    on.set_ylabel(f"process, {name}")


def _draw_bound(on: Axes, bound: float, label: str, *, color: str) -> None:
    on.axhline(bound, color=color, linestyle="--", label=f"{label}: {bound:.4g}")


def _draw_vram(on: Axes, profile: Profile) -> None:
    samples = profile.samples
    for label, column in (
        ("reserved by torch", samples.vram_reserved_bytes),
        ("used, whole device", samples.vram_device_used_bytes),
    ):
        times, values = _known(samples, column or [])
        on.plot(times, values / _GIB, label=label)
    _draw_bound(on, profile.plan.projected_vram_bytes / _GIB, "projected", color="C2")
    on.set_ylabel("GPU, GiB")


def _draw_page_cache(on: Axes, profile: Profile) -> None:
    samples = profile.samples
    for label, column in (
        ("Cached", samples.system_page_cache_bytes),
        ("Dirty", samples.system_dirty_bytes),
        ("Writeback", samples.system_writeback_bytes),
    ):
        times, values = _known(samples, column)
        on.plot(times, values / _GIB, label=label)
    on.set_ylabel("page cache,\nwhole system, GiB")


def _draw_speed(on: Axes, profile: Profile) -> None:
    samples = profile.samples
    for label, column in (("read", samples.read_bytes), ("write", samples.write_bytes)):
        times, done = _known(samples, column)
        if len(times) < 2:
            continue
        # Rates at evenly spaced moments; otherwise a late sample would look like a stall.
        edges = np.linspace(times[0], times[-1], min(_NUM_RATES, len(times)))
        rates = np.diff(np.interp(edges, times, done)) / np.diff(edges) / 1e9
        on.stairs(rates, edges, label=f"{label}, over time")
    for name, stage in profile.stages.items():
        speed = "" if stage.gb_per_second is None else f"{stage.gb_per_second:.3g} GB/s, "
        on.plot([], [], " ", label=f"{name}: {speed}{stage.worker_seconds:.2g} s")
    on.set_ylabel("GB/s")


def _known(samples: Samples, column: Sequence[int | None]) -> tuple[_Values, _Values]:
    """Return the moments at which a column's value is known, and the values."""
    known: list[Any] = [
        (seconds, value)
        for seconds, value in zip(samples.seconds, column, strict=False)
        if value is not None
    ]
    times_and_values = np.array(known, dtype=np.float64).reshape(-1, 2)
    return times_and_values[:, 0], times_and_values[:, 1]


if __name__ == "__main__":
    draw(Profile.from_json(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
