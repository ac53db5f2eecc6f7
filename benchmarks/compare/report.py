"""The Markdown report of a comparison's raw figures. Measures nothing."""

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.lib.programs import MERGES
from benchmarks.lib.tables import Row, column, mib, read_csv, spread, where

MODES = {
    "warm": {"cache": "warm", "synced": False},
    "warm, sync": {"cache": "warm", "synced": True},
    "cold": {"cache": "cold", "synced": False},
    "cold, sync": {"cache": "cold", "synced": True},
}
PLOTS = {
    "memory-over-time.svg": "resident memory over time",
    "time-by-size.svg": "wall time by size of the models",
    "peak-by-models.svg": "peak memory by number of models",
    "peak-by-tensor.svg": "peak memory by size of the largest tensor",
    "peak-by-budget.svg": "peak memory by budget",
    "time-by-budget.svg": "wall time by budget",
}
NOTES = Path(__file__).with_name("notes.md")
"""How to read the tables."""
PEERS = ("cp", "naive", "mergekit", "mix_models", "mix_models_by_layers")
TIMES = {"total_s": "whole process", "beyond_s": "beyond start-up"}
Rows = Sequence[Row]


def samples(folder: Path) -> list[Row]:
    """Return the measurements in a folder, each with its seconds and the sync's after it."""
    rows = read_csv(folder / "bench.csv")
    for row in rows:
        row["total_s"] = row["wall_s"] + row["sync_s"]
        told = row["reported_s"]
        row["beyond_s"] = None if told is None else told + row["sync_s"]
    return rows


def figure(rows: Rows, name: str, **wanted: object) -> float | None:
    """Return the highest peak or the median time; None without rows that tell."""
    told = column(rows, name, **wanted)
    return (max if name == "peak_bytes" else statistics.median)(told) if told else None


def checks(rows: Rows) -> Iterator[Sequence[str]]:
    """Yield what, the ratio, and both sides of each comparison whose measurements are there."""

    def ratio(what: str, name: str, one: Rows, other: Rows) -> Iterator[Sequence[str]]:
        first, second = figure(one, name), figure(other, name)
        if first is not None and second is not None:
            sides = f"{first:.2f} / {second:.2f} s"
            if name == "peak_bytes":
                sides = f"{mib(first)} / {mib(second)} MiB"
            yield what, f"{first / second:.2f}", sides

    def by_mode(
        what: str, name: str, part: str, tools: Sequence[str], beside: str
    ) -> Iterator[Sequence[str]]:
        for mode, how in MODES.items():
            mine = where(rows, part=part, **how)
            for tool in tools:
                both = where(mine, tool=tool), where(mine, tool=beside)
                yield from ratio(f"{mode}: {what.format(tool)}", name, *both)

    what = "shardmix beyond start-up / floor"
    yield from by_mode(what, "beyond_s", "tools", ["shardmix"], "floor")
    what = "{} / shardmix, whole process"
    yield from by_mode(what, "total_s", "tools", PEERS, "shardmix")
    yield from by_mode(what, "total_s", "pairs", ["sd-mecha"], "shardmix")
    for tool in MERGES:
        warm = where(rows, part="pairs" if tool == "sd-mecha" else "tools", cache="warm")
        if tool != "shardmix":
            both = where(warm, tool=tool), where(warm, tool="shardmix")
            yield from ratio(f"peak: {tool} / shardmix", "peak_bytes", *both)
    what = "--io mmap / pread, beyond start-up"
    yield from by_mode(what, "beyond_s", "tools", ["shardmix-mmap"], "shardmix")
    three = where(rows, part="shapes", num_models=3)
    count = max(column(three, "num_tensors"), default=0)
    for tool in ("shardmix", "floor", "naive"):
        many = where(three, tool=tool, num_tensors=count)
        few = [row for row in where(three, tool=tool) if row["num_tensors"] != count]
        what = f"{tool}: {count} tensors / the same bytes as large ones"
        for name, of_what in TIMES.items():
            yield from ratio(f"{what}, {of_what}", name, many, few)
    budgets = where(rows, part="budgets", tool="shardmix")
    if given := [nbytes for nbytes in column(budgets, "budget_bytes") if nbytes]:
        both = where(budgets, budget_bytes=min(given)), where(budgets, budget_bytes=0)
        what = f"--max-memory {mib(min(given))}MiB, the least that works / no budget"
        for name, of_what in TIMES.items():
            yield from ratio(f"{what}, {of_what}", name, *both)
        one = [{"peak_bytes": min(given)}]
        yield from ratio("peak / the least budget", "peak_bytes", both[0], one)


def merge_tables(rows: Rows) -> list[str]:
    """Return for each set of models a table: a line for each tool, columns for each mode."""
    lines: list[str] = []
    by_size = sorted(rows, key=lambda row: (row["model_bytes"], row["num_tensors"]))
    for name in dict.fromkeys(row["model_set"] for row in by_size):
        mine = where(rows, model_set=name)
        one = mine[0]
        size = f"{one['model_bytes'] / 1e9:.1f} GB, {one['num_tensors']} tensors"
        lines += ["", f"{one['num_models']} x {name} ({size}):", "", *_merge_table(mine)]
    return lines[1:]


def _merge_table(rows: Rows) -> list[str]:
    modes = {name: mode for name, mode in MODES.items() if where(rows, **mode)}
    first = next(iter(modes))
    lines = []
    for tool in tools_of(rows):
        mine = where(rows, tool=tool)
        times, counts = [], set()
        for mode in modes.values():
            found = where(mine, **mode)
            total, ours = (figure(rows, "total_s", tool=t, **mode) for t in (tool, "shardmix"))
            ratio = f"{total / ours:.2f}" if total and ours else ""
            times += [spread(column(found, "total_s"), 1), ratio]
            counts.add(len(found))
        beyond = figure(mine, "beyond_s", **modes[first])
        told = "" if beyond is None else f"{beyond:.1f}"
        rounds = "-".join(map(str, sorted(counts - {0})))
        lines.append([tool, rounds, *times, told, mib(figure(mine, "peak_bytes") or 0)])
    titles = [title for name in modes for title in (f"{name}, s", "×")]
    return markdown(["tool", "rounds", *titles, f"{first}, beyond start-up, s", "peak, MiB"], lines)


def peak_table(rows: Rows) -> list[str]:
    """Return peaks in MiB: a line for each tool, a column for each number or size."""
    varied = "num_models" if rows[0]["part"] == "models" else "largest_tensor_bytes"
    values = sorted(set(column(rows, varied)))
    lines = []
    for tool in tools_of(rows):
        peaks = (figure(rows, "peak_bytes", tool=tool, **{varied: value}) for value in values)
        lines.append([tool, *("" if peak is None else mib(peak) for peak in peaks)])
    names = [mib(value) + " MiB" if varied.endswith("_bytes") else str(value) for value in values]
    return markdown(["tool", *names], lines)


def budget_table(rows: Rows) -> list[str]:
    """Return a line for each budget, the least first and none last."""
    free = figure(rows, "total_s", budget_bytes=0)
    lines = []
    for budget in sorted(set(column(rows, "budget_bytes")), key=lambda size: size or 1e30):
        found = where(rows, budget_bytes=budget)
        total, peak = figure(found, "total_s"), figure(found, "peak_bytes") or 0
        ratio = f"{total / free:.2f}" if total and free else ""
        name, share = (f"{mib(budget)} MiB", f"{peak / budget:.2f}") if budget else ("none", "")
        time = spread(column(found, "total_s"), 1)
        lines.append([name, str(len(found)), time, ratio, mib(peak), share])
    return markdown(["budget", "rounds", "s", "/ none", "peak, MiB", "peak / budget"], lines)


def tools_of(rows: Iterable[Row]) -> list[str]:
    """Return the tools that there are rows of, in the order of the tables."""
    there = {row["tool"] for row in rows}
    return [tool for tool in MERGES if tool in there]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines; columns of numbers are to the right."""
    words = {"tool", "check", "budget", "both sides"}
    marks = ["---" if name in words else "---:" for name in header]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


TABLES: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
    "Every tool": ("tools", merge_tables),
    "Two models of one file each": ("pairs", merge_tables),
    "Shapes: large tensors, many small ones, a giant one": ("shapes", merge_tables),
    "Sizes": ("sizes", merge_tables),
    "Peak memory by number of models, MiB": ("models", peak_table),
    "Peak memory by size of the largest tensor, MiB": ("tensors", peak_table),
    "shardmix within a budget": ("budgets", budget_table),
}
"""Title → part of the measurements, and what makes the table's lines."""


def write_report(folder: Path) -> None:
    """Write README.md from the figures that lie in the folder, and print the ratios."""
    rows = samples(folder)
    if not rows:
        raise SystemExit(f"{folder / 'bench.csv'}: no measurements to report")
    noisy = sum(row["busy_before"] > 0.2 for row in rows)
    busy = f"{noisy} of {len(rows)} measurements began with other processes on the cores."
    lines = ["# Measurements", "", "Made by `make bench`; `benchmarks/README.md` says how. " + busy]
    machine = (folder / "bench-machine.txt").read_text().rstrip()
    lines += ["", "```", machine, "```", "", *NOTES.read_text().splitlines()]
    if ratios := list(checks(rows)):
        lines += ["", "## Ratios", "", *markdown(["check", "ratio", "both sides"], ratios)]
    for title, (part, table) in TABLES.items():
        if found := where(rows, part=part):
            lines += ["", f"## {title}", "", *table(found)]
    plots = [name for name in PLOTS if (folder / name).exists()]
    lines += ["", "## Plots"] if plots else []
    for name in plots:
        lines += ["", f"![{PLOTS[name]}]({name})"]
    raw = "Raw figures: [bench.csv](bench.csv), a line for each measurement"
    lines += ["", f"{raw}; [bench-memory.csv](bench-memory.csv), memory over time. Other CSV files"]
    lines += ["here are the raw figures of the other scripts in `benchmarks/`, by their names."]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    for what, quotient, sides in ratios:
        print(f"{what:72}{quotient:>8}   {sides}")
    print(f"\n{busy}\nreport: {folder / 'README.md'}")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
