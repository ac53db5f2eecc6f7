"""Draws the plots of bench.py's raw figures as SVG. Measures nothing; needs matplotlib.

python benchmarks/bench_plots.py docs/benchmarks
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from bench_report import PLOTS
from matplotlib.axes import Axes
from samples import Look, Sample, Table, in_order, median_total_s, peak_bytes, where

import tools

MIB, GB = 1024**2, 1e9
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

Plot = Callable[[Axes], None]


def memory_over_time(axes: Axes, looks: Sequence[Look]) -> None:
    """A line for each tool, from its start to its end."""
    for tool in _tools_of(looks):
        mine = [look for look in looks if look.tool == tool]
        seconds = [look.seconds for look in mine]
        axes.plot(seconds, [look.resident_bytes / MIB for look in mine], **_line(tool))
    # From seconds to minutes, and from MiB to GiB.
    axes.set(xscale="log", yscale="log", xlabel="seconds since the start", ylabel="resident, MiB")


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


def peak_by_models(axes: Axes, samples: Sequence[Sample]) -> None:
    """Peaks by the number of models."""
    by_tool(axes, samples, across=lambda one: one.num_models, up=peak_mib)
    axes.set(yscale="log", xlabel="models", ylabel="peak, MiB")


def peak_by_tensor(axes: Axes, samples: Sequence[Sample]) -> None:
    """Peaks by the size of the largest tensor."""
    by_tool(axes, samples, across=lambda one: one.largest_tensor_bytes / MIB, up=peak_mib)
    axes.set(xscale="log", yscale="log", xlabel="largest tensor, MiB", ylabel="peak, MiB")


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


def _tools_of(rows: Sequence[Sample] | Sequence[Look]) -> list[str]:
    return [tool for tool in tools.EVERYTHING if tool in in_order(row.tool for row in rows)]


def _line(tool: str) -> dict[str, object]:
    is_ours = tool == tools.SHARDMIX
    return {"label": tool, "color": COLORS[tool], "linewidth": 2.5 if is_ours else 1.3}


def draw(path: Path, plot: Plot) -> None:
    """Draw one plot into a file."""
    figure, axes = plt.subplots(layout="constrained")
    plot(axes)
    axes.set_title(PLOTS[path.name])
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
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
    plots = (
        ("memory-over-time.svg", memory_over_time, looks),
        ("time-by-size.svg", time_by_size, where(samples, part="sizes")),
        ("peak-by-models.svg", peak_by_models, where(samples, part="models")),
        ("peak-by-tensor.svg", peak_by_tensor, where(samples, part="tensors")),
        ("peak-by-budget.svg", peak_by_budget, where(samples, part="budgets")),
        ("time-by-budget.svg", time_by_budget, where(samples, part="budgets")),
    )
    for name, plot, rows in plots:
        if rows:
            draw(folder / name, lambda axes, plot=plot, rows=rows: plot(axes, rows))


if __name__ == "__main__":
    main()
