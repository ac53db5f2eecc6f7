"""What shardmix's work beyond merging costs: merges with it and without, by turns, warm, no fsync.

    python -m benchmarks.compare.own_work safety --work-dir WORK --rounds 15
    python -m benchmarks.compare.own_work profile --work-dir WORK

`safety` is digests, the journal and the look for NaN and Inf, on both backends; `profile` is
`--profile`, with one lap and one sample of it. All in this process, which must be a python that has
shardmix, so that what differs is that work only. The first round of each kind, which warms up, does
not count. What fsync costs beside a program that forces the same bytes is in `benchmarks.compare`.
"""

import contextlib
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import shardmix
from benchmarks.lib.machine import print_facts, read_into_cache, wait_until_idle
from benchmarks.lib.tables import print_table, spread, write_csv
from benchmarks.lib.workspace import Workspace, parser
from shardmix.compute import llvm_loops
from shardmix.output import journal
from shardmix.profiling.sampler import INTERVAL_SECONDS, memory_probe
from shardmix.system import digests
from shardmix.system.timer import NO_CLOCK, READ, StageClock

UNITS = ("seconds", "cpu_s")


class NoHasher:
    """Takes in bytes and forgets them."""

    def update(self, data: memoryview) -> None:
        """Do nothing."""

    def digest(self) -> bytes:
        """Return no digest."""
        return bytes(16)


def claim_nothing(
    self: journal.Journal, shard: int, leaf: int, digest: bytes, findings: object
) -> None:
    """Keep what ends a file, and write no line."""
    self.leaves[shard].put(leaf, digest)


def unguarded_loop() -> str:
    """Return the kernels' loop for bfloat16 as it would be if nobody asked for NaN and Inf."""
    loop = llvm_loops._LOOP_OF_PAIRS
    for guarded, unguarded in (
        ("%largest, <{lanes} x i32> %magnitude_low)", "%largest, <{lanes} x i32> %largest)"),
        (
            "%larger_low, <{lanes} x i32> %magnitude_high)",
            "%larger_low, <{lanes} x i32> %larger_low)",
        ),
    ):
        assert guarded in loop
        loop = loop.replace(guarded, unguarded)
    return loop


@contextlib.contextmanager
def nothing_safe() -> Iterator[None]:
    """Leave out what `safety` measures, by patching shardmix: it has no switch for that."""
    with (
        mock.patch.object(digests, "_leaf_hasher", return_value=NoHasher()),
        mock.patch.object(journal.Journal, "add", claim_nothing),
        mock.patch.object(llvm_loops, "_LOOP_OF_PAIRS", unguarded_loop()),
    ):
        yield


def rounds(
    merge: Callable[[bool], shardmix.MergeReport], output: Path, count: int
) -> Iterator[tuple[bool, dict[str, float]]]:
    """Merge with and without, `count` times each; yield which it was, and what it took."""
    order = random.Random(7)
    for number in range(count + 1):
        for with_it in order.sample([True, False], 2):
            shutil.rmtree(output, ignore_errors=True)
            cpu_before = time.process_time()
            report = merge(with_it)
            cpu_s = round(time.process_time() - cpu_before, 4)
            if number:
                yield with_it, {"seconds": round(report.seconds, 4), "cpu_s": cpu_s}
    shutil.rmtree(output)


def compare(title: str, measured: list[tuple[bool, dict[str, float]]]) -> list[list[str]]:
    """Return a row for each unit: with, without, and ratios."""
    table = []
    for unit in UNITS:
        with_it, without = (
            [times[unit] for is_with, times in measured if is_with is kind]
            for kind in (True, False)
        )
        medians = statistics.median(with_it) / statistics.median(without)
        lowest = min(with_it) / min(without)
        row = [f"{title}, {unit}", spread(with_it), spread(without)]
        table.append([*row, f"{medians:.3f}", f"{lowest:.3f}"])
    return table


def microseconds(call: Callable[[], object], *, count: int) -> str:
    """Return the mean time of a call."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return f"{(time.perf_counter() - started) / count * 1e6:.2f}"


def print_parts_of_a_recording() -> None:
    """Print what a lap and a sample take."""
    clock = StageClock()
    clock.start()
    rollup = Path("/proc/self/smaps_rollup")
    sample = f"a sample of memory, every {INTERVAL_SECONDS * 1000:.0f} ms"
    with memory_probe() as probe:
        rows = [
            ("a lap, recorded", microseconds(lambda: clock.lap(READ, 1), count=500_000)),
            ("a lap, not recorded", microseconds(lambda: NO_CLOCK.lap(READ, 1), count=500_000)),
            (sample, microseconds(probe, count=5_000)),
            ("/proc/self/smaps_rollup instead", microseconds(rollup.read_bytes, count=50)),
        ]
    print_table(["", "µs"], rows)
    print()


def main() -> None:
    """Measure and report."""
    options = parser(
        "What shardmix's work beyond merging costs.",
        has_python=False,
        rounds=(15, "measurements of each"),
        backends=(["llvm", "torch"], "of safety"),
        preset=("llama-1b", "shape of the checkpoints"),
        output=(Path, "where to write to; default: in WORK"),
        csv=(Path, "raw figures; default: safety.csv, profiling.csv"),
    )
    options.add_argument("work", choices=["safety", "profile"])
    args = options.parse_args()
    is_safety = args.work == "safety"
    rows: list[dict[str, object]] = []
    table = []
    with Workspace(args) as workspace:
        print_facts(args.work_dir, sys.executable)
        folders = workspace.checkpoints(args.preset, "abc", "llama", "--preset", args.preset)
        output = args.output or workspace.scratch("merged")
        profile = workspace.scratch("profile.json")
        for backend in args.backends if is_safety else ["auto"]:
            models = {str(folder): 1 / len(folders) for folder in folders}
            how: dict[str, Any] = {"fsync": False, "backend": backend}

            def merge(with_it: bool, models=models, how=how) -> shardmix.MergeReport:
                if is_safety:
                    with contextlib.nullcontext() if with_it else nothing_safe():
                        return shardmix.merge(models, output, **how)
                return shardmix.merge(models, output, **how, profile=profile if with_it else None)

            read_into_cache(folders)
            wait_until_idle()
            measured = list(rounds(merge, output, args.rounds))
            table += compare(backend if is_safety else "merge", measured)
            for with_it, times in measured:
                which = (
                    {"backend": backend, "safe": with_it} if is_safety else {"recorded": with_it}
                )
                rows.append(which | times)
        print()
        if not is_safety:
            print_parts_of_a_recording()
    print_table(["", "with", "without", "ratio of medians", "of the lowest"], table)
    write_csv(args.csv or Path("safety.csv" if is_safety else "profiling.csv"), rows)


if __name__ == "__main__":
    main()
