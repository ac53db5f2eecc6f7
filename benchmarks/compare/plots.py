"""Draws the plots of a comparison's raw figures as SVG. Measures nothing; needs matplotlib."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.compare.parts import FOR_A_GPU
from benchmarks.compare.report import PLOTS, Rows, figure, samples, tools_of
from benchmarks.lib.programs import MERGES
from benchmarks.lib.tables import Row, column, read_csv, where

MIB, GB = 1024**2, 1e9
PANELS_IN_A_ROW = 5
NAMES = [tool for tool in MERGES if tool not in FOR_A_GPU]
COLORS = dict(zip(NAMES, mpl.colormaps["tab10"].colors, strict=True))
COLORS |= dict.fromkeys(FOR_A_GPU, "black")
STYLE = Path(__file__).with_name("shardmix.mplstyle")


class Plot(NamedTuple):
    """A line for each tool: a figure of all its rows of one value."""

    part: str
    xlabel: str
    across: Callable[[Row], float]
    column: str
    """The figure."""
    log: str = "y"
    """Which axes are logarithmic."""

    def height(self, rows: Rows) -> float:
        """Return the figure of some rows, a peak in MiB."""
        return (figure(rows, self.column) or 0) / (MIB if self.column == "peak_bytes" else 1)

    def draw(self, axes: plt.Axes, rows: Rows) -> None:
        """Draw the lines; without a budget it is a line across."""
        is_budget, is_peak = self.part == "budgets", self.column == "peak_bytes"
        given = [row for row in rows if row["budget_bytes"] or not is_budget]
        for tool in tools_of(given):
            mine = where(given, tool=tool)
            values = sorted({self.across(row) for row in mine})
            heights = [self.height([one for one in mine if self.across(one) == x]) for x in values]
            width = 2.5 if tool == "shardmix" else 1.3
            axes.plot(values, heights, marker="o", label=tool, color=COLORS[tool], linewidth=width)
        if is_budget and (free := where(rows, budget_bytes=0)):
            label = "without a budget"
            axes.axhline(self.height(free), linestyle=":", color="gray", label=label)
        if is_budget and is_peak:
            axes.plot(values, values, color="black", linewidth=1, label="the budget")
        axes.set(xlabel=self.xlabel, ylabel="peak, MiB" if is_peak else "seconds")
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in self.log:
                axes.set(**{f"{name}scale": "log"})
                _readable(axis)
        if self.part == "models":
            axes.set_xticks(values)
        if not self.log:
            axes.set(ylim=(0, None))


ALL_GB = ("GB of all models together", lambda row: row["num_models"] * row["model_bytes"] / GB)
MODELS = ("models", lambda row: row["num_models"])
LARGEST = ("largest tensor, MiB", lambda row: row["largest_tensor_bytes"] / MIB)
BUDGETS = ("budgets", "--max-memory, MiB", lambda row: row["budget_bytes"] / MIB)
LINES = {
    "time-by-size.svg": Plot("sizes", *ALL_GB, "total_s"),
    "peak-by-models.svg": Plot("models", *MODELS, "peak_bytes"),
    "peak-by-tensor.svg": Plot("tensors", *LARGEST, "peak_bytes", log="xy"),
    "peak-by-budget.svg": Plot(*BUDGETS, "peak_bytes", log=""),
    "time-by-budget.svg": Plot(*BUDGETS, "total_s", log=""),
}


def memory_over_time(path: Path, looks: Rows) -> None:
    """Draw a panel for each tool, side by side: its own seconds, and one scale of memory."""
    names = tools_of(looks)
    top = 1.5 * max(column(looks, "resident_bytes")) / MIB
    columns = min(len(names), PANELS_IN_A_ROW)
    rows = math.ceil(len(names) / columns)
    size = {"figsize": (2 * columns + 0.5, 2 * rows + 0.5), "layout": "constrained"}
    panels, grid = plt.subplots(rows, columns, sharey=True, squeeze=False, **size)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, tool in zip(grid.flat, names, strict=False):
        seconds = column(looks, "seconds", tool=tool)
        resident = [nbytes / MIB for nbytes in column(looks, "resident_bytes", tool=tool)]
        axes.fill_between(seconds, resident, 1, color=COLORS[tool], alpha=0.6, linewidth=0)
        # From MiB to GiB: on a linear scale most would lie on the axis.
        axes.set(yscale="log", ylim=(1, top), xlim=(0, None))
        axes.set_title(f"{tool}\n{max(resident):.0f} MiB, {seconds[-1]:.1f} s", fontsize="small")
        axes.tick_params(labelsize="small")
        _readable(axes.yaxis, marks=(1,))
    panels.supylabel("resident, MiB", fontsize="small")
    panels.supxlabel("seconds since the start", fontsize="small")
    _save(panels, path)


def _readable(axis: mpl.axis.Axis, *, marks: tuple[int, ...] = (1, 2, 5)) -> None:
    """Mark a logarithmic axis at these digits, written out."""
    axis.set_major_locator(mpl.ticker.LogLocator(subs=marks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(mpl.ticker.NullLocator())


def _save(drawn: plt.Figure, path: Path) -> None:
    # Without a date the same figures give the same file.
    drawn.savefig(path, metadata={"Date": None})
    plt.close(drawn)


def main(folder: Path) -> None:
    """Draw all plots that there are figures for."""
    rows, looks = samples(folder), read_csv(folder / "bench-memory.csv")
    mpl.use("svg")
    plt.style.use(STYLE)
    if looks:
        memory_over_time(folder / "memory-over-time.svg", looks)
    for name, plot in LINES.items():
        if found := where(rows, part=plot.part):
            drawn, axes = plt.subplots(layout="constrained")
            plot.draw(axes, found)
            axes.set_title(PLOTS[name])
            place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
            axes.legend(fontsize="small", frameon=False, **place)
            _save(drawn, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
