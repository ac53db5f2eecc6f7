"""Draws the plots of a comparison's raw figures as SVG. Measures nothing; needs matplotlib.

python -m benchmarks.compare.plots docs/benchmarks
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.compare.parts import FOR_A_GPU
from benchmarks.compare.report import PLOTS, tools_of
from benchmarks.compare.samples import Row, Rows, peak_bytes, read, total_s
from benchmarks.lib.programs import MERGES
from benchmarks.lib.tables import where

MIB, GB = 1024**2, 1e9
PANELS_IN_A_ROW = 5
NAMES = [tool for tool in MERGES if tool not in FOR_A_GPU]
COLORS = dict(zip(NAMES, mpl.colormaps["tab10"].colors, strict=True))
COLORS |= dict.fromkeys(FOR_A_GPU, "black")
STYLE = {
    "figure.figsize": (7, 4),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    # The same figures give the same file.
    "svg.hashsalt": "shardmix",
}


def memory_over_time(path: Path, looks: Rows) -> None:
    """Draw a panel for each tool, side by side: its own seconds, and one scale of memory."""
    names = tools_of(looks)
    top = 1.5 * max(look["resident_bytes"] for look in looks) / MIB
    columns = min(len(names), PANELS_IN_A_ROW)
    rows = math.ceil(len(names) / columns)
    size = {"figsize": (2 * columns + 0.5, 2 * rows + 0.5), "layout": "constrained"}
    figure, grid = plt.subplots(rows, columns, sharey=True, squeeze=False, **size)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, tool in zip(grid.flat, names, strict=False):
        mine = where(looks, tool=tool)
        seconds = [look["seconds"] for look in mine]
        resident = [look["resident_bytes"] / MIB for look in mine]
        axes.fill_between(seconds, resident, 1, color=COLORS[tool], alpha=0.6, linewidth=0)
        # From MiB to GiB: on a linear scale most would lie on the axis.
        axes.set(yscale="log", ylim=(1, top), xlim=(0, None))
        axes.set_title(f"{tool}\n{max(resident):.0f} MiB, {seconds[-1]:.1f} s", fontsize="small")
        axes.tick_params(labelsize="small")
        _readable(axes.yaxis, marks=(1,))
    figure.supylabel("resident, MiB", fontsize="small")
    figure.supxlabel("seconds since the start", fontsize="small")
    _save(figure, path)


def peak_mib(rows: Rows) -> float:
    """Return the highest peak."""
    return (peak_bytes(rows) or 0) / MIB


@dataclass(frozen=True, slots=True)
class Plot:
    """A line for each tool: a figure of all its rows of one value."""

    part: str
    across: Callable[[Row], float]
    xlabel: str
    up: Callable[[Rows], float | None]
    log: str = "y"
    """Which axes are logarithmic."""

    def draw(self, axes: Axes, rows: Rows) -> None:
        """Draw the lines; without a budget it is a line across."""
        is_budget = self.part == "budgets"
        given = [row for row in rows if row["budget_bytes"] or not is_budget]
        for tool in tools_of(given):
            mine = where(given, tool=tool)
            values = sorted({self.across(row) for row in mine})
            heights = [self.up([one for one in mine if self.across(one) == x]) for x in values]
            width = 2.5 if tool == "shardmix" else 1.3
            axes.plot(values, heights, marker="o", label=tool, color=COLORS[tool], linewidth=width)
        if is_budget and (free := where(rows, budget_bytes=0)):
            axes.axhline(self.up(free), linestyle=":", color="gray", label="without a budget")
        if is_budget and self.up is peak_mib:
            axes.plot(values, values, color="black", linewidth=1, label="the budget")
        axes.set(xlabel=self.xlabel, ylabel="peak, MiB" if self.up is peak_mib else "seconds")
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in self.log:
                axes.set(**{f"{name}scale": "log"})
                _readable(axis)
        if self.part == "models":
            axes.set_xticks(values)
        if not self.log:
            axes.set(ylim=(0, None))


def _in_mib(column: str) -> Callable[[Row], float]:
    return lambda row: row[column] / MIB


BUDGET = _in_mib("budget_bytes")
PARTS = {
    "time-by-size.svg": Plot(
        "sizes",
        lambda row: row["num_models"] * row["model_bytes"] / GB,
        "GB of all models together",
        total_s,
    ),
    "peak-by-models.svg": Plot("models", lambda row: row["num_models"], "models", peak_mib),
    "peak-by-tensor.svg": Plot(
        "tensors", _in_mib("largest_tensor_bytes"), "largest tensor, MiB", peak_mib, log="xy"
    ),
    "peak-by-budget.svg": Plot("budgets", BUDGET, "--max-memory, MiB", peak_mib, log=""),
    "time-by-budget.svg": Plot("budgets", BUDGET, "--max-memory, MiB", total_s, log=""),
}


def _readable(axis: Axis, *, marks: tuple[int, ...] = (1, 2, 5)) -> None:
    """Mark a logarithmic axis at these digits, written out."""
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path) -> None:
    # Without a date the same figures give the same file.
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(folder: Path) -> None:
    """Draw all plots that there are figures for."""
    rows, looks = read(folder / "bench.csv"), read(folder / "bench-memory.csv")
    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    if looks:
        memory_over_time(folder / "memory-over-time.svg", looks)
    for name, plot in PARTS.items():
        if found := where(rows, part=plot.part):
            figure, axes = plt.subplots(layout="constrained")
            plot.draw(axes, found)
            axes.set_title(PLOTS[name])
            place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            axes.legend(fontsize="small", frameon=False, **place)
            _save(figure, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
