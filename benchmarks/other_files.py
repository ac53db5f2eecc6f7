"""What is left of another program's file in the page cache after a merge larger than the cache.

    python benchmarks/other_files.py --work-dir WORK

In a memory control group, which bounds the page cache of what runs in it: a program reads a file of
its own, once or twice (what is read twice counts as in use for Linux); then, from a cold disk, a
merge runs, or `cp`. Rounds go through all cases in a shuffled order. Needs root and `fincore` of
util-linux.
"""

import random
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import model_sets
import shardmix_command
from checkpoint_shapes import PRESETS
from control_group import MemoryGroup, NoMemoryGroupError, memory_group
from harness import (
    Workspace,
    print_table,
    remove,
    run,
    spread,
    workspace_arguments,
    write_csv,
)
from machine import print_facts
from page_cache import BLOCK_BYTES, drop_caches
from turns import Turns

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


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: a row of the CSV."""

    case: str
    round: int
    times_read: int
    wall_s: float
    share_left: float
    """Of the other program's file."""


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    words = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def write_file(path: Path, nbytes: int) -> None:
    """Write the other program's file."""
    block = random.Random(1).randbytes(BLOCK_BYTES)
    with path.open("wb") as file:
        for _ in range(nbytes // BLOCK_BYTES):
            file.write(block)


def measure(
    case: str, command: Sequence[str], number: int, times_read: int, other: Path, group: MemoryGroup
) -> Sample:
    """Have the other program read its file, then run the command."""
    drop_caches()
    for _ in range(times_read):
        run(group.wrap(["dd", f"if={other}", "of=/dev/null", "bs=1M", "status=none"]))
    before = cached_bytes(other)
    if before < LEAST_SHARE_BEFORE * other.stat().st_size:
        raise SystemExit(f"{other}: only {before} bytes of it stay in the cache of the group")
    finished = run(group.wrap(command))
    if finished.returncode:
        raise SystemExit(f"{case}: {finished.last_words()}")
    left = cached_bytes(other) / before
    return Sample(case, number, times_read, round(finished.wall_s, 3), round(left, 4))


def main() -> None:
    """Measure and report."""
    parser = workspace_arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each")
    parser.add_argument("--preset", choices=list(PRESETS), default="llama-1b")
    parser.add_argument("--group-size", type=int, default=3, help="of the group, in GiB")
    parser.add_argument("--lock", type=Path, help="file to lock while measuring; see turns.py")
    parser.add_argument("--csv", type=Path, default=Path("other-files.csv"), help="raw figures")
    args = parser.parse_args()
    samples: list[Sample] = []
    group_bytes = args.group_size * 1024**3
    with Workspace(args.work_dir, keep=args.keep) as workspace, Turns(args.lock) as turns:
        print_facts(args.work_dir, pythons=[args.python])
        models = model_sets.llamas(workspace, args.preset).models
        other, output = workspace.scratch("other-file"), workspace.scratch("merged")
        write_file(other, group_bytes // 3)
        merge = shardmix_command.merge_command(args.python, models, output)
        cases = {
            "shardmix": merge,
            "shardmix that keeps all": [args.python, "-c", KEEPING, *merge[3:]],
            "cp of two models": ["cp", "-r", *map(str, models[:2]), str(output)],
        }
        for number in range(1, args.rounds + 1):
            turn = [(case, times) for case in cases for times in (1, 2)]
            for case, times_read in random.sample(turn, len(turn)):
                turns.measure()
                remove(output)
                if case.startswith("cp"):
                    output.mkdir()
                try:
                    with memory_group(group_bytes) as group:
                        sample = measure(case, cases[case], number, times_read, other, group)
                except NoMemoryGroupError as error:
                    raise SystemExit(str(error)) from None
                samples.append(sample)
    rows = []
    for case in cases:
        for times_read in (1, 2):
            mine = [
                sample
                for sample in samples
                if (sample.case, sample.times_read) == (case, times_read)
            ]
            left = [sample.share_left for sample in mine]
            rows.append(
                (
                    case,
                    times_read,
                    spread([sample.wall_s for sample in mine]),
                    f"{statistics.median(left):.2f} ({min(left):.2f}-{max(left):.2f})",
                )
            )
    print()
    print_table(("", "other file read", "wall s", "share of it still cached"), rows)
    write_csv(args.csv, [asdict(sample) for sample in samples])


if __name__ == "__main__":
    main()
