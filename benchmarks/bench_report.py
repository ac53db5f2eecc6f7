"""The Markdown report of bench.py's raw figures: tables, checks, plots' places. Measures nothing.

python benchmarks/bench_report.py docs/benchmarks
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import tools
from bench_checks import MODES, all_checks, mode_name
from harness import mib
from samples import Sample, Table, in_order, median_beyond_s, median_total_s, peak_bytes, where

PLOTS = {
    "memory-over-time.svg": "resident memory over time",
    "time-by-size.svg": "wall time by size of the models",
    "peak-by-models.svg": "peak memory by number of models",
    "peak-by-tensor.svg": "peak memory by size of the largest tensor",
    "peak-by-budget.svg": "peak memory by budget",
    "time-by-budget.svg": "wall time by budget",
}

NOTES = f"""\
- **Seconds** are the whole process, start-up included: median and range. In the columns *sync*
  files are forced to disk: shardmix and the floor do so themselves, and then, for every tool,
  comes `sync`, inside the time. In the others nobody does: shardmix and the floor run with
  `--no-fsync`; the others never force anything. **×** is over shardmix in the same column. A cold
  cache is cold for the checkpoints, not for the tools' libraries.
- **Beyond start-up** is what a tool's own report says, which leaves imports out; `{tools.COPY}` and
  `{tools.MERGEKIT}` report nothing.
- **peak** is the largest resident set of the process (the kernel's `ru_maxrss`), mapped files
  included, over all measurements of the row.
- **rounds** of `{tools.MIX_MODELS_BY_LAYERS}` are fewer than of the others, since one takes
  minutes; it is not run cold.
- `{tools.FLOOR}` reads and writes the same bytes as shardmix with as many threads and computes
  nothing. `{tools.COPY}` copies one of the models: it writes the same bytes and reads only those.
  `{tools.NAIVE}` is `load_file`, a sum in float32 and `save_file`, shard by shard, in shardmix's
  environment; the other tools have one each.
- `{tools.SHARDMIX_MMAP}` and `{tools.SHARDMIX_TORCH}` are shardmix with `--io mmap` and
  `--backend torch`. `{tools.MIX_MODELS}` and `{tools.MIX_MODELS_BY_LAYERS}` are LM-Cocktail's, and
  the saving of what they return. `{tools.SD_MECHA}` takes single files, two in its plainest merge.
"""


def merge_tables(samples: Sequence[Sample]) -> list[str]:
    """For each set of models a table: a line for each tool, a pair of columns for each mode."""
    lines: list[str] = []
    by_size = sorted(samples, key=lambda sample: (sample.model_bytes, sample.num_tensors))
    for name in in_order(sample.model_set for sample in by_size):
        mine = where(samples, model_set=name)
        lines += ["", f"{describe(mine[0])}:", "", *merge_table(mine)]
    return lines[1:]


def merge_table(samples: Sequence[Sample]) -> list[str]:
    """The table of one set of models."""
    modes = [mode for mode in MODES if where(samples, cache=mode[0], synced=mode[1])]
    header = ["tool", "rounds"]
    for mode in modes:
        header += [f"{mode_name(*mode)}, s", "×"]
    rows = []
    for tool in tools_of(samples):
        mine = where(samples, tool=tool)
        cells = [tool, _rounds(mine, modes)]
        for cache, synced in modes:
            mode = where(samples, cache=cache, synced=synced)
            found = where(mode, tool=tool)
            total, ours = median_total_s(found), median_total_s(where(mode, tool=tools.SHARDMIX))
            cells.append(spread([sample.total_s for sample in found]) if found else "")
            cells.append(f"{total / ours:.2f}" if total and ours else "")
        cache, synced = modes[0]
        beyond = median_beyond_s(where(mine, cache=cache, synced=synced))
        cells.append("" if beyond is None else f"{beyond:.1f}")
        rows.append([*cells, mib(peak_bytes(mine) or 0)])
    start_up = f"{mode_name(*modes[0])}, beyond start-up, s"
    return markdown([*header, start_up, "peak, MiB"], rows)


def tools_of(samples: Sequence[Sample]) -> list[str]:
    """The tools that there are samples of, in the order of the tables."""
    return [tool for tool in tools.EVERYTHING if where(samples, tool=tool)]


def _rounds(samples: Sequence[Sample], modes: Iterable[tuple[str, bool]]) -> str:
    """How often a tool was measured in each mode; a range where that differs."""
    counts = [len(where(samples, cache=cache, synced=synced)) for cache, synced in modes]
    return "-".join(str(count) for count in sorted({count for count in counts if count}))


def peak_table(samples: Sequence[Sample], field: str) -> list[str]:
    """Peaks in MiB: a line for each tool, a column for each value of `field`."""
    values = sorted({getattr(sample, field) for sample in samples})
    rows = []
    for tool in tools_of(samples):
        found = (where(samples, tool=tool, **{field: value}) for value in values)
        rows.append([tool, *(mib(peak_bytes(some) or 0) if some else "" for some in found)])
    names = [mib(value) + " MiB" if field.endswith("_bytes") else str(value) for value in values]
    return markdown(["tool", *names], rows)


def budget_table(samples: Sequence[Sample]) -> list[str]:
    """A line for each budget, the least first and none last."""
    free = median_total_s(where(samples, budget_bytes=0))
    rows = []
    for budget in sorted(
        {sample.budget_bytes for sample in samples}, key=lambda size: size or 1e30
    ):
        found = where(samples, budget_bytes=budget)
        total, peak = median_total_s(found), peak_bytes(found) or 0
        rows.append(
            [
                f"{mib(budget)} MiB" if budget else "none",
                str(len(found)),
                spread([sample.total_s for sample in found]),
                f"{total / free:.2f}" if total and free else "",
                mib(peak),
                f"{peak / budget:.2f}" if budget else "",
            ]
        )
    header = ["budget", "rounds", "s", "/ none", "peak, MiB", "peak / budget"]
    return markdown(header, rows)


def describe(sample: Sample) -> str:
    """`"3 x llama-1b (2.2 GB, 201 tensors)"`."""
    size = f"{sample.model_bytes / 1e9:.1f} GB, {sample.num_tensors} tensors"
    return f"{sample.num_models} x {sample.model_set} ({size})"


def spread(values: Sequence[float]) -> str:
    """The median, and the range where there is one."""
    median = f"{statistics.median(values):.1f}"
    return f"{median} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else median


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines; columns of numbers are to the right."""
    words = {"tool", "check", "budget", "both sides"}
    marks = ["---" if name in words else "---:" for name in header]
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def sections(samples: Sequence[Sample]) -> list[tuple[str, list[str]]]:
    """Title and lines of each table that there are samples for."""

    def of(part: str) -> list[Sample]:
        return where(samples, part=part)

    checks = [check.row() for check in all_checks(samples)]
    found = [
        ("Ratios", markdown(["check", "ratio", "both sides"], checks) if checks else []),
        ("Every tool", merge_tables(of("tools"))),
        ("Two models of one file each", merge_tables(of("pairs"))),
        ("Shapes: large tensors, many small ones, a giant one", merge_tables(of("shapes"))),
        ("Sizes", merge_tables(of("sizes"))),
        ("Peak memory by number of models, MiB", peak_table(of("models"), "num_models")),
        (
            "Peak memory by size of the largest tensor, MiB",
            peak_table(of("tensors"), "largest_tensor_bytes"),
        ),
        ("shardmix within a budget", budget_table(of("budgets"))),
    ]
    # Two lines are a header without rows.
    return [(title, lines) for title, lines in found if len(lines) > 2]


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
    for title, table in sections(samples):
        lines += ["", f"## {title}", "", *table]
    plots = [name for name in PLOTS if (folder / name).exists()]
    if plots:
        lines += ["", "## Plots"]
    for name in plots:
        lines += ["", f"![{PLOTS[name]}]({name})"]
    raw = "Raw figures: [bench.csv](bench.csv), a line for each measurement"
    lines += ["", f"{raw}; [bench-memory.csv](bench-memory.csv), memory over time. Other CSV files"]
    lines += ["here are the raw figures of the other scripts in `benchmarks/`, by their names."]
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    for check in all_checks(samples):
        what, ratio, sides = check.row()
        print(f"{what:72}{ratio:>8}   {sides}")
    print(f"\n{busy}\nreport: {folder / 'README.md'}")


def main() -> None:
    """Report what a folder holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with bench.csv and bench-machine.txt")
    write_report(parser.parse_args().folder)


if __name__ == "__main__":
    main()
