"""The Markdown report of a comparison's raw figures: ratios, tables, plots' places.

    python -m benchmarks.compare.report docs/benchmarks

Measures nothing.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.compare.samples import Sample, Table, beyond_s, peak_bytes, total_s, where
from benchmarks.lib.programs import MERGES
from benchmarks.lib.tables import mib, over, spread

MODES = (("warm", False), ("warm", True), ("cold", False), ("cold", True))
PLOTS = {
    "memory-over-time.svg": "resident memory over time",
    "time-by-size.svg": "wall time by size of the models",
    "peak-by-models.svg": "peak memory by number of models",
    "peak-by-tensor.svg": "peak memory by size of the largest tensor",
    "peak-by-budget.svg": "peak memory by budget",
    "time-by-budget.svg": "wall time by budget",
}
NOTES = """\
- **Seconds** are the whole process, start-up included: median and range. In the columns *sync*
  files are forced to disk: shardmix and the floor do so themselves, and then, for every tool,
  comes `sync`, inside the time. In the others nobody does: shardmix and the floor run with
  `--no-fsync`; the others never force anything. **×** is over shardmix in the same column. A cold
  cache is cold for the checkpoints, not for the tools' libraries.
- **Beyond start-up** is what a tool's own report says, which leaves imports out; `cp` and
  `mergekit` report nothing.
- **peak** is the largest resident set of the process (the kernel's `ru_maxrss`), mapped files
  included, over all measurements of the row.
- **rounds** of `mix_models_by_layers` are fewer than of the others, since one takes
  minutes; it is not run cold.
- `floor` reads and writes the same bytes as shardmix with as many threads and computes
  nothing. `cp` copies one of the models: it writes the same bytes and reads only those.
  `naive` is `load_file`, a sum in float32 and `save_file`, shard by shard, in shardmix's
  environment; the other tools have one each.
- `shardmix-mmap` and `shardmix-torch` are shardmix with `--io mmap` and
  `--backend torch`. `mix_models` and `mix_models_by_layers` are LM-Cocktail's, and
  the saving of what they return. `sd-mecha` takes single files, two in its plainest merge.
"""

Samples = Sequence[Sample]
Measure = Callable[[Samples], float | None]
Check = tuple[str, str, str]
"""What, the ratio, and both sides: the cells of a row."""


def mode_name(cache: str, synced: bool) -> str:
    """Return what the tables call a mode: `warm`, or `warm, sync`."""
    return f"{cache}, sync" if synced else cache


def checks(samples: Samples) -> Iterator[Check]:
    """Yield every ratio whose measurements are there."""

    def ratio(what: str, measure: Measure, first: Samples, second: Samples) -> Iterator[Check]:
        one, other = measure(first), measure(second)
        if one is not None and other is not None:
            sides = f"{one:.2f} / {other:.2f} s"
            if measure is peak_bytes:
                sides = f"{mib(one)} / {mib(other)} MiB"
            yield what, f"{one / other:.2f}", sides

    def of(part: str, mode: tuple[str, bool], tool: str) -> Samples:
        return where(samples, part=part, cache=mode[0], synced=mode[1], tool=tool)

    for mode in MODES:
        what = f"{mode_name(*mode)}: shardmix beyond start-up / floor"
        yield from ratio(what, beyond_s, of("tools", mode, "shardmix"), of("tools", mode, "floor"))
    peers = ("cp", "naive", "mergekit", "mix_models", "mix_models_by_layers")
    for part, tools in (("tools", peers), ("pairs", ("sd-mecha",))):
        for mode in MODES:
            for tool in tools:
                what = f"{mode_name(*mode)}: {tool} / shardmix, whole process"
                yield from ratio(what, total_s, of(part, mode, tool), of(part, mode, "shardmix"))
    for tool in MERGES:
        warm = where(samples, part="pairs" if tool == "sd-mecha" else "tools", cache="warm")
        if tool != "shardmix":
            mine, ours = where(warm, tool=tool), where(warm, tool="shardmix")
            yield from ratio(f"peak: {tool} / shardmix", peak_bytes, mine, ours)
    for mode in MODES:
        what = f"{mode_name(*mode)}: --io mmap / pread, beyond start-up"
        mapped, plain = of("tools", mode, "shardmix-mmap"), of("tools", mode, "shardmix")
        yield from ratio(what, beyond_s, mapped, plain)
    medians = ((total_s, "whole process"), (beyond_s, "beyond start-up"))
    three = where(samples, part="shapes", num_models=3)
    count = max((sample.num_tensors for sample in three), default=0)
    for tool in ("shardmix", "floor", "naive"):
        mine = where(three, tool=tool)
        many = where(mine, num_tensors=count)
        few = [sample for sample in mine if sample not in many]
        for measure, name in medians:
            what = f"{tool}: {count} tensors / the same bytes as large ones, {name}"
            yield from ratio(what, measure, many, few)
    budgets = where(samples, part="budgets", tool="shardmix")
    if given := [sample.budget_bytes for sample in budgets if sample.budget_bytes]:
        least, free = where(budgets, budget_bytes=min(given)), where(budgets, budget_bytes=0)
        what = f"--max-memory {mib(min(given))}MiB, the least that works / no budget"
        for measure, name in medians:
            yield from ratio(f"{what}, {name}", measure, least, free)
        peak = peak_bytes(least) or 0
        sides = f"{mib(peak)} / {mib(min(given))} MiB"
        yield "peak / the least budget", f"{peak / min(given):.2f}", sides


def merge_tables(samples: Samples) -> list[str]:
    """Return for each set of models a table: a line for each tool, columns for each mode."""
    lines: list[str] = []
    by_size = sorted(samples, key=lambda sample: (sample.model_bytes, sample.num_tensors))
    for name in dict.fromkeys(sample.model_set for sample in by_size):
        mine = where(samples, model_set=name)
        one = mine[0]
        size = f"{one.model_bytes / 1e9:.1f} GB, {one.num_tensors} tensors"
        lines += ["", f"{one.num_models} x {one.model_set} ({size}):", "", *_merge_table(mine)]
    return lines[1:]


def _merge_table(samples: Samples) -> list[str]:
    modes = [mode for mode in MODES if where(samples, cache=mode[0], synced=mode[1])]
    header = ["tool", "rounds"]
    for mode in modes:
        header += [f"{mode_name(*mode)}, s", "×"]
    rows = []
    for tool in tools_of(samples):
        times, counts = [], set()
        for cache, synced in modes:
            found = where(samples, tool=tool, cache=cache, synced=synced)
            ours = total_s(where(samples, tool="shardmix", cache=cache, synced=synced))
            total = total_s(found)
            times.append(_spread(found))
            times.append(f"{total / ours:.2f}" if total and ours else "")
            counts.add(len(found))
        mine = where(samples, tool=tool)
        beyond = beyond_s(where(mine, cache=modes[0][0], synced=modes[0][1]))
        rounds = "-".join(map(str, sorted(counts - {0})))
        told = "" if beyond is None else f"{beyond:.1f}"
        rows.append([tool, rounds, *times, told, mib(peak_bytes(mine) or 0)])
    start_up = f"{mode_name(*modes[0])}, beyond start-up, s"
    return markdown([*header, start_up, "peak, MiB"], rows)


def peak_table(samples: Samples, field: str) -> list[str]:
    """Return peaks in MiB: a line for each tool, a column for each value of `field`."""
    values = sorted({getattr(sample, field) for sample in samples})
    rows = []
    for tool in tools_of(samples):
        peaks = (peak_bytes(where(samples, tool=tool, **{field: value})) for value in values)
        rows.append([tool, *("" if peak is None else mib(peak) for peak in peaks)])
    names = [mib(value) + " MiB" if field.endswith("_bytes") else str(value) for value in values]
    return markdown(["tool", *names], rows)


def budget_table(samples: Samples) -> list[str]:
    """Return a line for each budget, the least first and none last."""
    free = total_s(where(samples, budget_bytes=0))
    rows = []
    budgets = {sample.budget_bytes for sample in samples}
    for budget in sorted(budgets, key=lambda size: size or float("inf")):
        found = where(samples, budget_bytes=budget)
        total, peak = total_s(found), peak_bytes(found) or 0
        name = f"{mib(budget)} MiB" if budget else "none"
        ratio = f"{total / free:.2f}" if total and free else ""
        share = over(peak, budget) if budget else ""
        rows.append([name, str(len(found)), _spread(found), ratio, mib(peak), share])
    return markdown(["budget", "rounds", "s", "/ none", "peak, MiB", "peak / budget"], rows)


def tools_of(rows: Iterable[object]) -> list[str]:
    """Return the tools that there are rows of, in the order of the tables."""
    there = {row.tool for row in rows}  # type: ignore[attr-defined]
    return [tool for tool in MERGES if tool in there]


def _spread(samples: Samples) -> str:
    """Return the median, and the range if there is one; nothing without samples."""
    totals = [sample.total_s for sample in samples]
    return spread(totals, 1) if len(totals) > 1 else "".join(f"{each:.1f}" for each in totals)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines; columns of numbers are to the right."""
    words = {"tool", "check", "budget", "both sides"}
    marks = ["---" if name in words else "---:" for name in header]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def sections(samples: Samples) -> dict[str, list[str]]:
    """Return title → lines of each table that there are samples for."""

    def of(part: str) -> Samples:
        return where(samples, part=part)

    ratios = list(checks(samples))
    found = {
        "Ratios": markdown(["check", "ratio", "both sides"], ratios) if ratios else [],
        "Every tool": merge_tables(of("tools")),
        "Two models of one file each": merge_tables(of("pairs")),
        "Shapes: large tensors, many small ones, a giant one": merge_tables(of("shapes")),
        "Sizes": merge_tables(of("sizes")),
        "Peak memory by number of models, MiB": peak_table(of("models"), "num_models"),
        "Peak memory by size of the largest tensor, MiB": peak_table(
            of("tensors"), "largest_tensor_bytes"
        ),
        "shardmix within a budget": budget_table(of("budgets")),
    }
    return {title: lines for title, lines in found.items() if len(lines) > 2}


def write_report(folder: Path) -> None:
    """Write README.md from the figures that lie in the folder, and print the ratios."""
    samples = Table(folder / "bench.csv", Sample).read()
    if not samples:
        raise SystemExit(f"{folder / 'bench.csv'}: no measurements to report")
    noisy = sum(sample.busy_before > 0.2 for sample in samples)
    busy = f"{noisy} of {len(samples)} measurements began with other processes on the cores."
    lines = ["# Measurements", "", "Made by `make bench`; `benchmarks/README.md` says how. " + busy]
    machine = (folder / "bench-machine.txt").read_text().rstrip()
    lines += ["", "```", machine, "```", "", *NOTES.splitlines()]
    for title, table in sections(samples).items():
        lines += ["", f"## {title}", "", *table]
    plots = [name for name in PLOTS if (folder / name).exists()]
    lines += ["", "## Plots"] if plots else []
    for name in plots:
        lines += ["", f"![{PLOTS[name]}]({name})"]
    raw = "Raw figures: [bench.csv](bench.csv), a line for each measurement"
    lines += ["", f"{raw}; [bench-memory.csv](bench-memory.csv), memory over time. Other CSV files"]
    lines += ["here are the raw figures of the other scripts in `benchmarks/`, by their names."]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    for what, ratio, sides in checks(samples):
        print(f"{what:72}{ratio:>8}   {sides}")
    print(f"\n{busy}\nreport: {folder / 'README.md'}")


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
