"""Measures shardmix beside every other tool, and has it reported and plotted: `make bench`.

The tools take turns, each round in a shuffled order of its own.
"""

import argparse
import importlib.util
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from benchmarks.compare.measurement import Bench, CaseFailedError
from benchmarks.compare.parts import FOR_A_GPU, PARTS, Case, Part, llamas
from benchmarks.compare.report import MODES, write_report
from benchmarks.lib.machine import can_drop_caches, facts
from benchmarks.lib.programs import MERGES, REQUIREMENTS
from benchmarks.lib.tables import Row, Size, read_csv, write_csv
from benchmarks.lib.workspace import PRESETS, Workspace, parser, remove

SHUFFLE_SEED = 7
PART_NAMES = [part.name for part in PARTS]
IDENTITY = ("part", "model_set", "tool", "cache", "synced", "round", "num_models", "budget_bytes")
identity = itemgetter(*IDENTITY)
"""What tells a measurement from others."""


def schedule(
    part: Part, cases: Sequence[Case], args: argparse.Namespace
) -> Iterator[tuple[Case, Row]]:
    """Yield each measurement of a part, in order: a case, and what its row tells beforehand.

    Shuffled, not rotated: in a rotation each tool would have the same one before it every time.
    """
    shuffler = random.Random(SHUFFLE_SEED)
    rounds = range(1, min(args.rounds, part.max_rounds) + 1)
    for cache, number, synced in itertools.product(part.caches, rounds, part.synced):
        is_too_much = number > args.slow_rounds or cache == "cold"
        for case in shuffler.sample(cases, len(cases)):
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
    done = set(map(identity, read_csv(args.output / "bench.csv")))
    missing = [one for one in schedule(part, cases, args) if identity(one[1]) not in done]
    for tool in dict.fromkeys(case.tool for case, _ in missing):
        bench.warm_up(tool)
    for case, row in missing:
        if str(case) in failures:
            continue
        mode = next(name for name, how in MODES.items() if how.items() <= row.items())
        is_watched = (part.name, mode, row["round"]) == ("tools", "warm", 1)
        try:
            measured, looks = bench.measure(row, case, is_watched=is_watched)
        except CaseFailedError as error:
            failures[str(case)] = f"{part.name}: {error}"
            print(f"FAILED {failures[str(case)]}", flush=True)
            continue
        write_csv(args.output / "bench.csv", [measured], append=True)
        write_csv(args.output / "bench-memory.csv", looks, append=True)
        seconds = measured["wall_s"] + measured["sync_s"]
        print(f"{part.name}, {mode}, round {row['round']}: {seconds:7.2f} s  {case}", flush=True)
    return list(failures.values())


def main() -> None:
    """Measure, then report and plot."""
    args = parser(
        __doc__,
        ["shardmix", *REQUIREMENTS],
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
    ).parse_args()
    if "cold" in args.cache and not can_drop_caches():
        print("cold cache: skipped, only root may write /proc/sys/vm/drop_caches\n")
        args.cache.remove("cold")
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        remove(args.output / "bench.csv")
        remove(args.output / "bench-memory.csv")
    failures: list[str] = []
    with Workspace(args) as workspace:
        llamas(workspace, args.preset)  # several parts have them
        tools = (MERGES[tool].environment for tool in MERGES if tool in args.tools)
        lines = facts(args.work_dir, map(workspace.python, ("shardmix", *tools)))
        print("\n".join(lines), end="\n\n")
        # Tools that took part in what is resumed have their versions there.
        machine = args.output / "bench-machine.txt"
        earlier = machine.read_text().splitlines() if args.resume and machine.exists() else []
        lines += [line for line in earlier if line.startswith("versions") and line not in lines]
        machine.write_text("\n".join(lines) + "\n")
        bench = Bench(args, workspace)
        for part in (part for part in PARTS if part.name in args.parts):
            # A part's own checkpoints go with the part.
            with Workspace(args) as own:
                failures += measure_part(part, part.cases(args, own), args, bench)
    if importlib.util.find_spec("matplotlib"):
        # In a process of its own: this one must stay small.
        plots = [sys.executable, "-m", "benchmarks.compare.plots", args.output]
        subprocess.run(plots, check=True)
    else:
        print("plots: skipped, there is no matplotlib; pip install '.[bench]'")
    write_report(args.output)
    if failures:
        raise SystemExit("\n".join(["failed, and not in the report:", *failures]))


if __name__ == "__main__":
    main()
