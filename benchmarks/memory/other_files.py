"""What is left of another program's file in the page cache after a merge larger than the cache.

All in a memory control group, which bounds the page cache of what runs in it. What is read twice
counts as in use for Linux.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.lib.control_group import NoMemoryGroupError, memory_group
from benchmarks.lib.machine import BLOCK_BYTES, drop_caches
from benchmarks.lib.processes import run_or_exit
from benchmarks.lib.programs import MERGE, command, patched
from benchmarks.lib.tables import Row, column, print_table, spread
from benchmarks.lib.workspace import Workspace, benchmark, remove

# shardmix as it would be without its care for other files.
KEEPING = """
import shardmix.plan.planner
from shardmix.system.page_cache import CacheUse
shardmix.plan.planner.plan_cache_use = lambda **sizes: CacheUse(True, True)
"""
LEAST_SHARE_BEFORE = 0.95
"""Of the other program's file, in the cache when the merge starts."""


def cached_bytes(path: Path) -> int:
    """Return how much of a file is in the page cache."""
    return int(run_or_exit(["fincore", "--bytes", "--noheadings", "--output=RES", path]).stdout)


def measure_one(
    words: Sequence[str | Path], times_read: int, other: Path, group_bytes: int
) -> tuple[float, float]:
    """Have the other program read its file, then run the command; return seconds, share left."""
    drop_caches()
    with memory_group(group_bytes) as group:
        for _ in range(times_read):
            run_or_exit(group.wrap(["dd", f"if={other}", "of=/dev/null", "bs=1M", "status=none"]))
        before = cached_bytes(other)
        if before < LEAST_SHARE_BEFORE * other.stat().st_size:
            raise SystemExit(f"{other}: only {before} bytes of it stay in the cache of the group")
        finished = run_or_exit(group.wrap(words))
        return round(finished.wall_s, 3), round(cached_bytes(other) / before, 4)


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Measure all cases by turns, and print."""
    rows: list[Row] = []
    group_bytes = args.group_size * 1024**3
    models = workspace.checkpoints(args.preset, "abc", args.preset)
    other, output = workspace.scratch("other-file"), workspace.scratch("merged")
    block = random.Random(1).randbytes(BLOCK_BYTES)
    with other.open("wb") as file:
        for _ in range(group_bytes // 3 // BLOCK_BYTES):
            file.write(block)
    merge = command(MERGE, args.python, models, output=output, fsync=True)
    cases: dict[str, list[str | Path]] = {
        "shardmix": [*merge],
        "shardmix that keeps all": [*patched(merge, KEEPING)],
        "cp of two models": ["cp", "-r", *models[:2], output],
    }
    turn = [(case, times) for case in cases for times in (1, 2)]
    for number in range(1, args.rounds + 1):
        for case, times_read in random.sample(turn, len(turn)):
            remove(output)
            if case.startswith("cp"):
                output.mkdir()
            try:
                wall_s, share = measure_one(cases[case], times_read, other, group_bytes)
            except NoMemoryGroupError as error:
                raise SystemExit(str(error)) from None
            row = {"case": case, "round": number, "times_read": times_read}
            rows.append({**row, "wall_s": wall_s, "share_left": share})
    table = []
    for case, times in turn:
        which = {"case": case, "times_read": times}
        figures = (column(rows, name, **which) for name in ("wall_s", "share_left"))
        table.append((case, times, *map(spread, figures)))
    print_table(("", "other file read", "wall s", "share of it still cached"), table)
    return rows, True


if __name__ == "__main__":
    benchmark(
        measure,
        rounds=(5, "measurements of each"),
        preset=("llama-1b", "shape of the checkpoints"),
        group_size=(3, "of the group, in GiB"),
        csv=(Path("other-files.csv"), "raw figures"),
    )
