"""Measures shardmix beside every other tool, and has it reported and plotted: `make bench`.

    python benchmarks/bench.py --work-dir WORK --keep
    python benchmarks/bench.py --work-dir WORK --rounds 1 --parts tools --tools floor shardmix

What is measured is in `parts.py`, how in `measurement.py`. The tools take turns, each round in a
shuffled order of its own.
"""

import argparse
import importlib.util
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import bench_report
import model_sets
import tools
from checkpoint_shapes import PRESETS
from checkpoints import parse_size
from harness import BENCHMARKS, Workspace, remove, workspace_arguments
from machine import facts
from measurement import Bench, Case, CaseFailedError
from page_cache import Filler, can_drop_caches
from parts import PARTS, Part
from resident_memory import ResidentMemory
from samples import Look, Sample, Table
from turns import Turns

SHUFFLE_SEED = 7
REPORT_FOLDER = BENCHMARKS.parent / "docs" / "benchmarks"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = workspace_arguments("Measure shardmix beside every other tool.")
    parser.add_argument("--output", type=Path, default=REPORT_FOLDER, help="report, figures, plots")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--slow-rounds", type=int, default=1, help="of what takes minutes")
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument("--resume", action="store_true", help="measure what the CSV lacks")
    parser.add_argument("--preset", choices=PRESETS, default="llama-1b", help="of the checkpoints")
    parser.add_argument("--num-tensors", type=int, default=30_000, help="of the MoE")
    parser.add_argument("--tensor-size", type=parse_size, default=parse_size("1GiB"))
    parser.add_argument("--lock", type=Path, help="file to lock while measuring; see turns.py")
    tools.add_arguments(parser)
    return parser


def schedule(
    part: Part, cases: Sequence[Case], args: argparse.Namespace
) -> Iterator[tuple[Case, str, bool, int]]:
    """Case, cache, synced and round of each measurement of a part, in order.

    Shuffled, not rotated: in a rotation each tool would have the same one before it every time.
    """
    shuffler = random.Random(SHUFFLE_SEED)
    for cache in part.caches:
        for number in range(1, min(args.rounds, part.max_rounds) + 1):
            for synced in part.synced:
                for case in shuffler.sample(cases, len(cases)):
                    is_too_much = number > args.slow_rounds or cache == "cold"
                    if cache in args.cache and not (case.tool.is_slow and is_too_much):
                        yield case, cache, synced, number


def measure_part(
    part: Part,
    cases: Sequence[Case],
    args: argparse.Namespace,
    bench: Bench,
    *,
    figures: Table,
    looks: Table,
    turns: Turns,
) -> list[str]:
    """Measure what the table lacks of a part, and add it; what failed, which is not tried again."""
    failures: dict[Case, str] = {}
    done = {sample.identity for sample in figures.read()}
    missing = [
        (case, cache, synced, number)
        for case, cache, synced, number in schedule(part, cases, args)
        if (*case.identity, part.name, cache, synced, number) not in done
    ]
    with turns.load():
        for tool in {case.tool.name: case.tool for case, *_ in missing}.values():
            bench.warm_up(tool)
    for case, cache, synced, number in missing:
        if case in failures:
            continue
        is_watched = part.name == "tools" and (cache, synced, number) == ("warm", False, 1)
        memory = ResidentMemory() if is_watched else None
        turns.measure(for_minutes=case.tool.is_slow)
        try:
            sample = bench.measure(
                case, part=part.name, cache=cache, synced=synced, number=number, memory=memory
            )
        except CaseFailedError as error:
            failures[case] = f"{part.name}: {error}"
            print(f"FAILED {failures[case]}", flush=True)
            continue
        figures.append([sample])
        if memory is not None:
            looks.append(Look(case.tool.name, *look) for look in memory.finish())
        mode = f"{cache}{', sync' if synced else ''}"
        print(f"{part.name}, {mode}, round {number}: {sample.total_s:7.2f} s  {case}", flush=True)
    return list(failures.values())


def write_facts(path: Path, lines: Sequence[str], *, keep: bool) -> None:
    """Write the machine's facts; `keep` the versions of tools that took part in earlier runs."""
    earlier = path.read_text().splitlines() if keep and path.exists() else []
    versions = [line for line in earlier if line.startswith("versions") and line not in lines]
    path.write_text("\n".join([*lines, *versions]) + "\n")


def main() -> None:
    """Measure, then report and plot."""
    args = build_parser().parse_args()
    if "cold" in args.cache and not can_drop_caches():
        print("cold cache: skipped, only root may write /proc/sys/vm/drop_caches\n")
        args.cache.remove("cold")
    args.output.mkdir(parents=True, exist_ok=True)
    figures = Table(args.output / "bench.csv", Sample)
    looks = Table(args.output / "bench-memory.csv", Look)
    if not args.resume:
        remove(figures.path)
        remove(looks.path)
    failures: list[str] = []
    chosen = [part for part in PARTS if part.name in args.parts]
    with Workspace(args.work_dir, keep=args.keep) as workspace, Turns(args.lock) as turns:
        with turns.load():
            pythons = tools.find_pythons(args, workspace)
            tiny = model_sets.tiny(workspace)
            if any(part.merges_preset for part in chosen):
                model_sets.llamas(workspace, args.preset)
        lines = facts(args.work_dir, pythons=pythons)
        print("\n".join(lines), end="\n\n")
        write_facts(args.output / "bench-machine.txt", lines, keep=args.resume)
        found = tools.all_tools(args, workspace.scratch("mergekit.yaml"))
        bench = Bench(
            output=workspace.scratch("merged"),
            temporary=workspace.scratch("temporary"),
            tiny=tiny,
            filler=Filler(workspace.scratch("filler")),
        )
        for part in chosen:
            # A part's own checkpoints go with the part.
            with Workspace(args.work_dir, keep=args.keep) as own:
                with turns.load():
                    cases = part.cases(args, found, own)
                failures += measure_part(
                    part, cases, args, bench, figures=figures, looks=looks, turns=turns
                )
    if importlib.util.find_spec("matplotlib"):
        # In a process of its own: this one must stay small.
        subprocess.run([sys.executable, BENCHMARKS / "bench_plots.py", args.output], check=True)
    else:
        print("plots: skipped, there is no matplotlib; pip install '.[bench]'")
    bench_report.write_report(args.output)
    if failures:
        raise SystemExit("\n".join(["failed, and not in the report:", *failures]))


if __name__ == "__main__":
    main()
