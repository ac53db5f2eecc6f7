"""Measures shardmix beside every other tool, and has it reported and plotted: `make bench`.

    python -m benchmarks.compare --work-dir WORK --keep
    python -m benchmarks.compare --work-dir WORK --rounds 1 --parts tools --tools floor shardmix

The tools take turns, each round in a shuffled order of its own.
"""

import argparse
import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.measurement import Bench, CaseFailedError
from benchmarks.compare.parts import FOR_A_GPU, PARTS, Case, Part, llamas
from benchmarks.compare.samples import IDENTITY, Row, append, read
from benchmarks.lib.machine import can_drop_caches, facts
from benchmarks.lib.programs import MERGES, REQUIREMENTS, Pythons
from benchmarks.lib.shapes import PRESETS
from benchmarks.lib.tables import Size
from benchmarks.lib.workspace import Workspace, parser, remove

SHUFFLE_SEED = 7
PART_NAMES = [part.name for part in PARTS]


def schedule(
    part: Part, cases: Sequence[Case], args: argparse.Namespace
) -> Iterator[tuple[Case, Row]]:
    """Yield each measurement of a part, in order: a case, and what its row tells beforehand.

    Shuffled, not rotated: in a rotation each tool would have the same one before it every time.
    """
    shuffler = random.Random(SHUFFLE_SEED)
    for cache in part.caches:
        for number in range(1, min(args.rounds, part.max_rounds) + 1):
            for synced in part.synced:
                for case in shuffler.sample(cases, len(cases)):
                    is_too_much = number > args.slow_rounds or cache == "cold"
                    if cache in args.cache and not (MERGES[case.tool].is_slow and is_too_much):
                        which = {"part": part.name, "model_set": case.model_set.name}
                        how = {"tool": case.tool, "cache": cache, "synced": synced}
                        how |= {"round": number, **case.model_set.figures()}
                        yield case, which | how | {"budget_bytes": case.budget_bytes}


def measure_part(
    part: Part, cases: Sequence[Case], args: argparse.Namespace, bench: Bench
) -> list[str]:
    """Add to the files what they lack of a part; return what failed, which is not tried again."""
    failures: dict[str, str] = {}
    done = {tuple(row[name] for name in IDENTITY) for row in read(args.output / "bench.csv")}
    missing = [
        (case, row)
        for case, row in schedule(part, cases, args)
        if tuple(row[name] for name in IDENTITY) not in done
    ]
    for tool in dict.fromkeys(case.tool for case, _ in missing):
        bench.warm_up(tool)
    for case, row in missing:
        if str(case) in failures:
            continue
        how = {"cache": row["cache"], "synced": row["synced"]}
        is_watched = part.name == "tools" and row["round"] == 1 and how == report.MODES["warm"]
        try:
            measured, looks = bench.measure(row, case, **how, is_watched=is_watched)
        except CaseFailedError as error:
            failures[str(case)] = f"{part.name}: {error}"
            print(f"FAILED {failures[str(case)]}", flush=True)
            continue
        append(args.output / "bench.csv", [measured])
        append(args.output / "bench-memory.csv", looks)
        mode = next(name for name, mode in report.MODES.items() if mode == how)
        seconds = measured["wall_s"] + measured["sync_s"]
        print(f"{part.name}, {mode}, round {row['round']}: {seconds:7.2f} s  {case}", flush=True)
    return list(failures.values())


def write_facts(path: Path, lines: Sequence[str], *, keep: bool) -> None:
    """Write the machine's facts; `keep` the versions of tools that took part in earlier runs."""
    earlier = path.read_text().splitlines() if keep and path.exists() else []
    versions = [line for line in earlier if line.startswith("versions") and line not in lines]
    path.write_text("\n".join([*lines, *versions]) + "\n")


def main() -> None:
    """Measure, then report and plot."""
    options = parser(
        "Measure shardmix beside every other tool.",
        output=(Path("docs/benchmarks"), "report, figures, plots"),
        parts=(PART_NAMES, "what is measured", PART_NAMES),
        rounds=(5, "measurements of each"),
        slow_rounds=(1, "of what takes minutes"),
        cache=(["warm", "cold"], "state of the page cache", ("warm", "cold")),
        resume=(False, "measure what the CSV lacks"),
        preset=("llama-1b", "of the checkpoints", PRESETS),
        num_tensors=(30_000, "of the MoE"),
        tensor_size=(Size("1GiB"), "of the giant one"),
        tools=([tool for tool in MERGES if tool not in FOR_A_GPU], "who takes part", MERGES),
        shardmix_options=("", "as one string"),
        floor_options=("", "as one string"),
        mergekit_options=("", "as one string"),
    )
    Pythons.add_arguments(options, *REQUIREMENTS)
    args = options.parse_args()
    if "cold" in args.cache and not can_drop_caches():
        print("cold cache: skipped, only root may write /proc/sys/vm/drop_caches\n")
        args.cache.remove("cold")
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        remove(args.output / "bench.csv")
        remove(args.output / "bench-memory.csv")
    failures: list[str] = []
    chosen = [part for part in PARTS if part.name in args.parts]
    with Workspace(args) as workspace:
        pythons = Pythons(args, workspace)
        environments = (MERGES[tool].environment for tool in MERGES if tool in args.tools)
        if any(part.merges_preset for part in chosen):
            llamas(workspace, args.preset)
        lines = facts(args.work_dir, [args.python, *(pythons[name] for name in environments)])
        print("\n".join(lines), end="\n\n")
        write_facts(args.output / "bench-machine.txt", lines, keep=args.resume)
        bench = Bench(args, pythons, workspace)
        for part in chosen:
            # A part's own checkpoints go with the part.
            with Workspace(args) as own:
                failures += measure_part(part, part.cases(args, own), args, bench)
    if importlib.util.find_spec("matplotlib"):
        # In a process of its own: this one must stay small.
        plots = [sys.executable, "-m", "benchmarks.compare.plots", args.output]
        subprocess.run(plots, check=True)
    else:
        print("plots: skipped, there is no matplotlib; pip install '.[bench]'")
    report.write_report(args.output)
    if failures:
        raise SystemExit("\n".join(["failed, and not in the report:", *failures]))


if __name__ == "__main__":
    main()
