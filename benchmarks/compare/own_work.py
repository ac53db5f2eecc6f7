"""What shardmix's work beyond merging costs: merges with it and without, by turns, warm, no fsync.

All in this process, so that what differs is that work only.
"""

import argparse
import contextlib
import random
import statistics
import timeit
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from unittest import mock

import shardmix
from benchmarks.lib.machine import read_into_cache, wait_until_idle
from benchmarks.lib.tables import Row, column, print_table, spread
from benchmarks.lib.workspace import Workspace, benchmark, remove
from shardmix.compute import llvm_loops
from shardmix.output import journal
from shardmix.profiling.sampler import INTERVAL_SECONDS, memory_probe
from shardmix.system import hashing
from shardmix.system.timer import NO_CLOCK, READ, StageClock

NO_HASHER = SimpleNamespace(update=lambda data: None, digest=lambda: bytes(16))
"""Takes in bytes and forgets them."""
# The kernels' loop for bfloat16 as it would be if nobody asked for NaN and Inf.
GUARDS = {
    "%largest, <{lanes} x i32> %magnitude_low)": "%largest, <{lanes} x i32> %largest)",
    "%larger_low, <{lanes} x i32> %magnitude_high)": "%larger_low, <{lanes} x i32> %larger_low)",
}


def claim_nothing(self, shard: int, leaf: int, digest: bytes, anomalies: object) -> None:
    """Keep what ends a file, and write no line."""
    self.leaves[shard].put(leaf, digest)


@contextlib.contextmanager
def nothing_safe() -> Iterator[None]:
    """Leave out what `safety` measures, by patching shardmix: it has no switch for that."""
    loop = llvm_loops._LOOP_OF_PAIRS
    for guarded, unguarded in GUARDS.items():
        assert guarded in loop
        loop = loop.replace(guarded, unguarded)
    with (
        mock.patch.object(hashing, "_leaf_hasher", return_value=NO_HASHER),
        mock.patch.object(journal.Journal, "add", claim_nothing),
        mock.patch.object(llvm_loops, "_LOOP_OF_PAIRS", loop),
    ):
        yield


def print_parts_of_a_recording() -> None:
    """Print what a lap and a sample take."""
    clock = StageClock()
    clock.start()
    rollup = Path("/proc/self/smaps_rollup")
    with memory_probe() as probe:
        calls = {
            "a lap, recorded": (lambda: clock.lap(READ, 1), 500_000),
            "a lap, not recorded": (lambda: NO_CLOCK.lap(READ, 1), 500_000),
            f"a sample of memory, every {INTERVAL_SECONDS * 1000:.0f} ms": (probe, 5_000),
            "/proc/self/smaps_rollup instead": (rollup.read_bytes, 50),
        }
        times = {what: timeit.timeit(call, number=n) / n for what, (call, n) in calls.items()}
    print_table(["", "µs"], [(what, f"{seconds * 1e6:.2f}") for what, seconds in times.items()])
    print()


def measure(args: argparse.Namespace, workspace: Workspace) -> tuple[list[Row], bool]:
    """Merge with the work and without, and print."""
    is_safety = args.work == "safety"
    switch, backends = ("safe", ("llvm", "torch")) if is_safety else ("recorded", ("auto",))
    args.csv = args.csv or Path(f"{args.work}.csv")
    rows: list[Row] = []
    order = random.Random(7)
    folders = workspace.checkpoints(args.preset, "abc", args.preset)
    models = {str(folder): 1 / len(folders) for folder in folders}
    output = args.output or workspace.scratch("merged")
    profile = workspace.scratch("profile.json")
    for backend in backends:
        read_into_cache(folders)
        wait_until_idle()
        for number in range(args.rounds + 1):
            for with_it in order.sample([True, False], 2):
                remove(output)
                path = profile if with_it and not is_safety else None
                how = {"fsync": False, "backend": backend, "profile": path}
                cpu_before = process_time()
                with nothing_safe() if is_safety and not with_it else contextlib.nullcontext():
                    seconds = shardmix.merge(models, output, **how).seconds
                row = {"backend": backend, switch: with_it, "seconds": round(seconds, 4)}
                row["cpu_s"] = round(process_time() - cpu_before, 4)
                rows += [row] if number else []
    remove(output)
    print()
    if not is_safety:
        print_parts_of_a_recording()
    table = []
    for backend in backends:
        for unit in ("seconds", "cpu_s"):
            which = ({"backend": backend, switch: is_on} for is_on in (True, False))
            both = [column(rows, unit, **each) for each in which]
            ratios = [f(both[0]) / f(both[1]) for f in (statistics.median, min)]
            cells = [*map(spread, both), *(f"{ratio:.3f}" for ratio in ratios)]
            table.append([f"{backend}, {unit}", *cells])
    print_table(["", "with", "without", "ratio of medians", "of the lowest"], table)
    return rows, True


if __name__ == "__main__":
    benchmark(
        measure,
        [],
        work=(None, "what is left out", ["safety", "profile"]),
        rounds=(15, "measurements of each"),
        preset=("llama-1b", "shape of the checkpoints"),
        output=(Path, "where to write to; default: in WORK"),
        csv=(Path, "raw figures; default: safety.csv, profile.csv"),
    )
