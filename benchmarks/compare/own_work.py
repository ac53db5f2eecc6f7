"""What shardmix's work beyond merging costs: merges with it and without, by turns, warm, no fsync.

    python -m benchmarks.compare.own_work safety --work-dir WORK --rounds 15
    python -m benchmarks.compare.own_work profile --work-dir WORK

`safety` is digests, the journal and the look for NaN and Inf, on both backends; `profile` is
`--profile`, with one lap and one sample of it. All in this process, which must be a python that has
shardmix, so that what differs is that work only. The first round of each kind, which warms up, does
not count. What fsync costs beside a program that forces the same bytes is in `benchmarks.compare`.
"""

import contextlib
import functools
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
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


def compare(title: str, measured: list[tuple[bool, dict[str, float]]]) -> Iterator[list[str]]:
    """Yield a row for each unit: with, without, and ratios."""
    for unit in ("seconds", "cpu_s"):
        times = {True: [], False: []}
        for with_it, taken in measured:
            times[with_it].append(taken[unit])
        ratios = [f(times[True]) / f(times[False]) for f in (statistics.median, min)]
        spreads = [spread(times[True]), spread(times[False])]
        yield [f"{title}, {unit}", *spreads, *(f"{ratio:.3f}" for ratio in ratios)]


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
        preset=("llama-1b", "shape of the checkpoints"),
        output=(Path, "where to write to; default: in WORK"),
        csv=(Path, "raw figures; default: safety.csv, profile.csv"),
    )
    options.add_argument("work", choices=["safety", "profile"])
    args = options.parse_args()
    rows: list[dict[str, object]] = []
    table = []
    with Workspace(args) as workspace:
        print_facts(args.work_dir, sys.executable)
        folders = workspace.checkpoints(args.preset, "abc", args.preset)
        models = {str(folder): 1 / len(folders) for folder in folders}
        output = args.output or workspace.scratch("merged")
        profile = workspace.scratch("profile.json")

        def without_safety(with_it: bool, backend: str) -> shardmix.MergeReport:
            with contextlib.nullcontext() if with_it else nothing_safe():
                return shardmix.merge(models, output, fsync=False, backend=backend)

        def without_profile(with_it: bool, backend: str) -> shardmix.MergeReport:
            path = profile if with_it else None
            return shardmix.merge(models, output, fsync=False, backend=backend, profile=path)

        if args.work == "safety":
            merge, column, backends = without_safety, "safe", ("llvm", "torch")
        else:
            merge, column, backends = without_profile, "recorded", ("auto",)
        for backend in backends:
            read_into_cache(folders)
            wait_until_idle()
            call = functools.partial(merge, backend=backend)
            measured = list(rounds(call, output, args.rounds))
            table += compare(backend, measured)
            rows += [{"backend": backend, column: is_with} | took for is_with, took in measured]
        print()
        if args.work == "profile":
            print_parts_of_a_recording()
    print_table(["", "with", "without", "ratio of medians", "of the lowest"], table)
    write_csv(args.csv or Path(f"{args.work}.csv"), rows)


if __name__ == "__main__":
    main()
