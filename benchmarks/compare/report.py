"""The Markdown report of a comparison's raw figures: ratios, tables, plots' places.

    python -m benchmarks.compare.report docs/benchmarks

Measures nothing.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.compare.samples import Row, Rows, beyond_s, peak_bytes, read, total_s, totals
from benchmarks.lib.programs import MERGES
from benchmarks.lib.tables import mib, spread, where

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
Measure = Callable[[Rows], float | None]
MEDIANS: dict[str, Measure] = {"whole process": total_s, "beyond start-up": beyond_s}


def checks(rows: Rows) -> Iterator[tuple[str, str, str]]:
    """Yield what, the ratio, and both sides of each comparison whose measurements are there."""

    def ratio(
        what: str, measure: Measure, one: Rows, other: Rows
    ) -> Iterator[tuple[str, str, str]]:
        first, second = measure(one), measure(other)
        if first is not None and second is not None:
            sides = f"{first:.2f} / {second:.2f} s"
            if measure is peak_bytes:
                sides = f"{mib(first)} / {mib(second)} MiB"
            yield what, f"{first / second:.2f}", sides

    def pair(what: str, median: Measure, part: str, *tools: str) -> Iterator[tuple[str, str, str]]:
        for name, mode in MODES.items():
            one, other = (where(rows, part=part, tool=tool, **mode) for tool in tools)
            yield from ratio(f"{name}: {what}", median, one, other)

    what = "shardmix beyond start-up / floor"
    yield from pair(what, beyond_s, "tools", "shardmix", "floor")
    peers = ("cp", "naive", "mergekit", "mix_models", "mix_models_by_layers")
    for part, tools in (("tools", peers), ("pairs", ("sd-mecha",))):
        for name, mode in MODES.items():
            for tool in tools:
                theirs, ours = (where(rows, part=part, tool=t, **mode) for t in (tool, "shardmix"))
                what = f"{name}: {tool} / shardmix, whole process"
                yield from ratio(what, total_s, theirs, ours)
    for tool in MERGES:
        warm = where(rows, part="pairs" if tool == "sd-mecha" else "tools", cache="warm")
        if tool != "shardmix":
            mine, ours = where(warm, tool=tool), where(warm, tool="shardmix")
            yield from ratio(f"peak: {tool} / shardmix", peak_bytes, mine, ours)
    what = "--io mmap / pread, beyond start-up"
    yield from pair(what, beyond_s, "tools", "shardmix-mmap", "shardmix")
    three = where(rows, part="shapes", num_models=3)
    count = max((row["num_tensors"] for row in three), default=0)
    for tool in ("shardmix", "floor", "naive"):
        mine = where(three, tool=tool)
        few = [row for row in mine if row["num_tensors"] != count]
        for name, median in MEDIANS.items():
            what = f"{tool}: {count} tensors / the same bytes as large ones, {name}"
            yield from ratio(what, median, where(mine, num_tensors=count), few)
    budgets = where(rows, part="budgets", tool="shardmix")
    if given := [row["budget_bytes"] for row in budgets if row["budget_bytes"]]:
        least, free = where(budgets, budget_bytes=min(given)), where(budgets, budget_bytes=0)
        what = f"--max-memory {mib(min(given))}MiB, the least that works / no budget"
        for name, median in MEDIANS.items():
            yield from ratio(f"{what}, {name}", median, least, free)
        peak = peak_bytes(least) or 0
        sides = f"{mib(peak)} / {mib(min(given))} MiB"
        yield "peak / the least budget", f"{peak / min(given):.2f}", sides


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
            total, ours = total_s(found), total_s(where(rows, tool="shardmix", **mode))
            times += [_spread(found), f"{total / ours:.2f}" if total and ours else ""]
            counts.add(len(found))
        beyond = beyond_s(where(mine, **modes[first]))
        told = "" if beyond is None else f"{beyond:.1f}"
        rounds = "-".join(map(str, sorted(counts - {0})))
        lines.append([tool, rounds, *times, told, mib(peak_bytes(mine) or 0)])
    columns = [title for name in modes for title in (f"{name}, s", "×")]
    return markdown(
        ["tool", "rounds", *columns, f"{first}, beyond start-up, s", "peak, MiB"], lines
    )


def peak_table(rows: Rows, column: str) -> list[str]:
    """Return peaks in MiB: a line for each tool, a column for each value of `column`."""
    values = sorted({row[column] for row in rows})
    lines = []
    for tool in tools_of(rows):
        peaks = (peak_bytes(where(rows, tool=tool, **{column: value})) for value in values)
        lines.append([tool, *("" if peak is None else mib(peak) for peak in peaks)])
    names = [mib(value) + " MiB" if column.endswith("_bytes") else str(value) for value in values]
    return markdown(["tool", *names], lines)


def budget_table(rows: Rows) -> list[str]:
    """Return a line for each budget, the least first and none last."""
    free = total_s(where(rows, budget_bytes=0))
    lines = []
    for budget in sorted({row["budget_bytes"] for row in rows}, key=lambda size: size or 1e30):
        found = where(rows, budget_bytes=budget)
        total, peak = total_s(found), peak_bytes(found) or 0
        ratio = f"{total / free:.2f}" if total and free else ""
        name, share = "none", ""
        if budget:
            name, share = f"{mib(budget)} MiB", f"{peak / budget:.2f}"
        lines.append([name, str(len(found)), _spread(found), ratio, mib(peak), share])
    return markdown(["budget", "rounds", "s", "/ none", "peak, MiB", "peak / budget"], lines)


def tools_of(rows: Iterable[Row]) -> list[str]:
    """Return the tools that there are rows of, in the order of the tables."""
    there = {row["tool"] for row in rows}
    return [tool for tool in MERGES if tool in there]


def _spread(rows: Rows) -> str:
    """Return the median, and the range if there is one; nothing without rows."""
    return spread(totals(rows), 1) if len(rows) > 1 else "".join(f"{s:.1f}" for s in totals(rows))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines; columns of numbers are to the right."""
    words = {"tool", "check", "budget", "both sides"}
    marks = ["---" if name in words else "---:" for name in header]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def sections(rows: Rows) -> dict[str, list[str]]:
    """Return title → lines of each table that there are rows for."""
    of = {part: where(rows, part=part) for part in dict.fromkeys(row["part"] for row in rows)}
    tables: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
        "Every tool": ("tools", merge_tables),
        "Two models of one file each": ("pairs", merge_tables),
        "Shapes: large tensors, many small ones, a giant one": ("shapes", merge_tables),
        "Sizes": ("sizes", merge_tables),
        "Peak memory by number of models, MiB": (
            "models",
            lambda found: peak_table(found, "num_models"),
        ),
        "Peak memory by size of the largest tensor, MiB": (
            "tensors",
            lambda found: peak_table(found, "largest_tensor_bytes"),
        ),
        "shardmix within a budget": ("budgets", budget_table),
    }
    ratios = list(checks(rows))
    first = {"Ratios": markdown(["check", "ratio", "both sides"], ratios)} if ratios else {}
    return first | {title: make(of[part]) for title, (part, make) in tables.items() if part in of}


def write_report(folder: Path) -> None:
    """Write README.md from the figures that lie in the folder, and print the ratios."""
    rows = read(folder / "bench.csv")
    if not rows:
        raise SystemExit(f"{folder / 'bench.csv'}: no measurements to report")
    noisy = sum(row["busy_before"] > 0.2 for row in rows)
    busy = f"{noisy} of {len(rows)} measurements began with other processes on the cores."
    lines = ["# Measurements", "", "Made by `make bench`; `benchmarks/README.md` says how. " + busy]
    machine = (folder / "bench-machine.txt").read_text().rstrip()
    lines += ["", "```", machine, "```", "", *NOTES.read_text().splitlines()]
    for title, table in sections(rows).items():
        lines += ["", f"## {title}", "", *table]
    plots = [name for name in PLOTS if (folder / name).exists()]
    lines += ["", "## Plots"] if plots else []
    for name in plots:
        lines += ["", f"![{PLOTS[name]}]({name})"]
    raw = "Raw figures: [bench.csv](bench.csv), a line for each measurement"
    lines += ["", f"{raw}; [bench-memory.csv](bench-memory.csv), memory over time. Other CSV files"]
    lines += ["here are the raw figures of the other scripts in `benchmarks/`, by their names."]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    for what, ratio, sides in checks(rows):
        print(f"{what:72}{ratio:>8}   {sides}")
    print(f"\n{busy}\nreport: {folder / 'README.md'}")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
