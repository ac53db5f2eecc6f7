"""What is left of another program's file in the page cache after a merge larger than the cache.

    python -m benchmarks.memory.other_files --work-dir WORK

In a memory control group, which bounds the page cache of what runs in it: a program reads a file of
its own, once or twice (what is read twice counts as in use for Linux); then, from a cold disk, a
merge runs, or `cp`. Rounds go through all cases in a shuffled order. Needs root and `fincore` of
util-linux.
"""

import argparse
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.control_group import MemoryGroup, NoMemoryGroupError, memory_group
from benchmarks.lib.machine import BLOCK_BYTES, drop_caches
from benchmarks.lib.processes import run
from benchmarks.lib.programs import merge_command
from benchmarks.lib.tables import print_table, spread, where
from benchmarks.lib.workspace import Workspace, benchmark, parser, remove

# shardmix as it would be without its care for other files.
KEEPING = """
import shardmix.plan.planner
from shardmix.system.page_cache import CacheUse
shardmix.plan.planner.plan_cache_use = lambda **sizes: CacheUse(True, True)
from shardmix.cli import main
main()
"""
LEAST_SHARE_BEFORE = 0.95
"""Of the other program's file, in the cache when the merge starts."""


def cached_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache."""
    words = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure(
    command: Sequence[str | Path], times_read: int, other: Path, group: MemoryGroup
) -> tuple[float, float]:
    """Have the other program read its file, then run the command; return seconds, share left."""
    drop_caches()
    for _ in range(times_read):
        run(group.wrap(["dd", f"if={other}", "of=/dev/null", "bs=1M", "status=none"]))
    before = cached_bytes(other)
    if before < LEAST_SHARE_BEFORE * other.stat().st_size:
        raise SystemExit(f"{other}: only {before} bytes of it stay in the cache of the group")
    finished = run(group.wrap(command))
    if finished.returncode:
        raise SystemExit(f"{command[0]}: {finished.last_words()}")
    return round(finished.wall_s, 3), round(cached_bytes(other) / before, 4)


def measure_all(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Any], bool]:
    """Measure all cases by turns, and print."""
    rows: list[dict[str, Any]] = []
    group_bytes = args.group_size * 1024**3
    models = workspace.checkpoints(args.preset, "abc", args.preset)
    other, output = workspace.scratch("other-file"), workspace.scratch("merged")
    block = random.Random(1).randbytes(BLOCK_BYTES)
    with other.open("wb") as file:
        for _ in range(group_bytes // 3 // BLOCK_BYTES):
            file.write(block)
    merge = merge_command("shardmix", args.python, models, output, fsync=True)
    cases: dict[str, list[str | Path]] = {
        "shardmix": [*merge],
        "shardmix that keeps all": [args.python, "-c", KEEPING, *merge[3:]],
        "cp of two models": ["cp", "-r", *models[:2], output],
    }
    for number in range(1, args.rounds + 1):
        turn = [(case, times) for case in cases for times in (1, 2)]
        for case, times_read in random.sample(turn, len(turn)):
            remove(output)
            if case.startswith("cp"):
                output.mkdir()
            try:
                with memory_group(group_bytes) as group:
                    found = measure(cases[case], times_read, other, group)
            except NoMemoryGroupError as error:
                raise SystemExit(str(error)) from None
            row = {"case": case, "round": number, "times_read": times_read}
            rows.append({**row, "wall_s": found[0], "share_left": found[1]})
    print()
    print_table(
        ("", "other file read", "wall s", "share of it still cached"),
        [
            (
                case,
                times,
                *(spread([row[name] for row in mine]) for name in ("wall_s", "share_left")),
            )
            for case in cases
            for times in (1, 2)
            if (mine := where(rows, case=case, times_read=times))
        ],
    )
    return rows, True


if __name__ == "__main__":
    options = parser(
        "What is left of another program's file in the page cache after a merge.",
        rounds=(5, "measurements of each"),
        preset=("llama-1b", "shape of the checkpoints"),
        group_size=(3, "of the group, in GiB"),
        csv=(Path("other-files.csv"), "raw figures"),
    )
    benchmark(measure_all, options)
