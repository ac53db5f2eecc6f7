"""Draws the plots of bench.py's raw figures as SVG. Measures nothing; needs matplotlib.

python benchmarks/bench_plots.py docs/benchmarks
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import tools
from bench_report import PLOTS
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from samples import Look, Sample, Table, in_order, median_total_s, peak_bytes, where

MIB, GB = 1024**2, 1e9
PANELS_IN_A_ROW = 5
COLORS = dict(zip(tools.EVERYTHING, mpl.colormaps["tab10"].colors, strict=True))
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

Plot = Callable[[Axes, Sequence[Sample]], None]


def memory_over_time(path: Path, looks: Sequence[Look]) -> None:
    """Side by side, a panel for each tool: its own seconds, and one scale of memory for all."""
    names = _tools_of(looks)
    top = 1.5 * max(look.resident_bytes for look in looks) / MIB
    columns = min(len(names), PANELS_IN_A_ROW)
    rows = math.ceil(len(names) / columns)
    size = (2 * columns + 0.5, 2 * rows + 0.5)
    figure, grid = plt.subplots(
        rows, columns, sharey=True, squeeze=False, figsize=size, layout="constrained"
    )
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, tool in zip(grid.flat, names, strict=False):
        mine = [look for look in looks if look.tool == tool]
        seconds = [look.seconds for look in mine]
        resident = [look.resident_bytes / MIB for look in mine]
        axes.fill_between(seconds, resident, 1, color=COLORS[tool], alpha=0.6, linewidth=0)
        # From MiB to GiB: on a linear scale most would lie on the axis.
        axes.set(yscale="log", ylim=(1, top), xlim=(0, None))
        axes.set_title(f"{tool}\n{max(resident):.0f} MiB, {seconds[-1]:.1f} s", fontsize="small")
        axes.tick_params(labelsize="small")
        _readable(axes.yaxis, marks=(1,))
    figure.supylabel("resident, MiB", fontsize="small")
    figure.supxlabel("seconds since the start", fontsize="small")
    _save(figure, path)


def by_tool(
    axes: Axes,
    samples: Sequence[Sample],
    *,
    across: Callable[[Sample], float],
    up: Callable[[Sequence[Sample]], float | None],
) -> None:
    """A line for each tool: `up` of all its samples of one value of `across`."""
    for tool in _tools_of(samples):
        mine = where(samples, tool=tool)
        values = sorted({across(sample) for sample in mine})
        heights = [up([one for one in mine if across(one) == value]) for value in values]
        axes.plot(values, heights, marker="o", **_line(tool))


def peak_mib(samples: Sequence[Sample]) -> float:
    """The highest peak."""
    return (peak_bytes(samples) or 0) / MIB


def time_by_size(axes: Axes, samples: Sequence[Sample]) -> None:
    """Medians by all the bytes that are merged."""
    by_tool(
        axes, samples, across=lambda one: one.num_models * one.model_bytes / GB, up=median_total_s
    )
    axes.set(yscale="log", xlabel="GB of all models together", ylabel="seconds")
    _readable(axes.yaxis)


def peak_by_models(axes: Axes, samples: Sequence[Sample]) -> None:
    """Peaks by the number of models."""
    by_tool(axes, samples, across=lambda one: one.num_models, up=peak_mib)
    axes.set(yscale="log", xlabel="models", ylabel="peak, MiB")
    axes.set_xticks(sorted({sample.num_models for sample in samples}))
    _readable(axes.yaxis)


def peak_by_tensor(axes: Axes, samples: Sequence[Sample]) -> None:
    """Peaks by the size of the largest tensor."""
    by_tool(axes, samples, across=lambda one: one.largest_tensor_bytes / MIB, up=peak_mib)
    axes.set(xscale="log", yscale="log", xlabel="largest tensor, MiB", ylabel="peak, MiB")
    for axis in (axes.xaxis, axes.yaxis):
        _readable(axis)


def _by_budget(
    axes: Axes, samples: Sequence[Sample], up: Callable[[Sequence[Sample]], float | None]
) -> None:
    given = [sample for sample in samples if sample.budget_bytes]
    by_tool(axes, given, across=lambda one: one.budget_bytes / MIB, up=up)
    free = where(samples, budget_bytes=0)
    if free:
        axes.axhline(up(free), linestyle=":", color="gray", label="without a budget")
    axes.set(xlabel="--max-memory, MiB")


def peak_by_budget(axes: Axes, samples: Sequence[Sample]) -> None:
    """Peaks below the line where both are equal."""
    _by_budget(axes, samples, peak_mib)
    budgets = sorted({sample.budget_bytes / MIB for sample in samples if sample.budget_bytes})
    axes.plot(budgets, budgets, color="black", linewidth=1, label="the budget")
    axes.set(ylabel="peak, MiB", ylim=(0, None))


def time_by_budget(axes: Axes, samples: Sequence[Sample]) -> None:
    """Medians of the whole process."""
    _by_budget(axes, samples, median_total_s)
    axes.set(ylabel="seconds", ylim=(0, None))


PLOTS_OF_PARTS: dict[str, tuple[str, Plot]] = {
    "time-by-size.svg": ("sizes", time_by_size),
    "peak-by-models.svg": ("models", peak_by_models),
    "peak-by-tensor.svg": ("tensors", peak_by_tensor),
    "peak-by-budget.svg": ("budgets", peak_by_budget),
    "time-by-budget.svg": ("budgets", time_by_budget),
}


def _tools_of(rows: Sequence[Sample] | Sequence[Look]) -> list[str]:
    return [tool for tool in tools.EVERYTHING if tool in in_order(row.tool for row in rows)]


def _line(tool: str) -> dict[str, object]:
    is_ours = tool == tools.SHARDMIX
    return {"label": tool, "color": COLORS[tool], "linewidth": 2.5 if is_ours else 1.3}


def draw(path: Path, plot: Plot, samples: Sequence[Sample]) -> None:
    """Draw one plot into a file, with its title and a legend."""
    figure, axes = plt.subplots(layout="constrained")
    plot(axes, samples)
    axes.set_title(PLOTS[path.name])
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def _readable(axis: Axis, *, marks: Sequence[int] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis at these digits, written out."""
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: Path) -> None:
    # Without a date the same figures give the same file.
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw all plots that there are figures for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with bench.csv and bench-memory.csv")
    folder = parser.parse_args().folder
    samples = Table(folder / "bench.csv", Sample).read()
    looks = Table(folder / "bench-memory.csv", Look).read()
    mpl.use("svg")
    mpl.rcParams.update(STYLE)
    if looks:
        memory_over_time(folder / "memory-over-time.svg", looks)
    for name, (part, plot) in PLOTS_OF_PARTS.items():
        if found := where(samples, part=part):
            draw(folder / name, plot, found)


if __name__ == "__main__":
    main()
