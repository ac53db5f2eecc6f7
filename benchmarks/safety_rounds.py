"""Merges the same models by turns with and without digests, journal and the look for NaN and Inf.

    python benchmarks/safety_rounds.py A B C -o OUT --backend llvm --rounds 11

All in one process, so that what differs is that work alone. What is left out is left out by
patching shardmix here: it has no switch for that. Prints a JSON list of {safe, seconds, cpu_s}; the
first round of each kind, which warms up, is not in it.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import shardmix
from shardmix.compute.backend import kernels
from shardmix.output import journal
from shardmix.system import digests


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
    """Return the kernels' loop as it would be if nobody asked for NaN and Inf."""
    loop = kernels._LOOP
    for guarded, unguarded in (
        (
            "i1> %is_larger, <{width} x i32> %magnitude,",
            "i1> %is_larger, <{width} x i32> %largest,",
        ),
        (
            "%is_nan = icmp ugt <{width} x i32> %magnitude, {infinity}",
            "%is_nan = icmp ne <{width} x i32> %bits, %bits",
        ),
    ):
        assert guarded in loop
        loop = loop.replace(guarded, unguarded)
    return loop


@contextlib.contextmanager
def nothing_safe(backend: str) -> Iterator[None]:
    """Leave the work out that is measured."""
    with contextlib.ExitStack() as stack:
        patches = [
            mock.patch.object(digests, "_leaf_hasher", return_value=NoHasher()),
            mock.patch.object(journal.Journal, "add", claim_nothing),
        ]
        if backend == "llvm":
            patches.append(mock.patch.object(kernels, "_LOOP", unguarded_loop()))
        for patch in patches:
            stack.enter_context(patch)
        yield


def main() -> None:
    """Run the rounds and print their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="bf16 checkpoints of one layout")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--backend", choices=["llvm", "torch"], default="llvm")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    models = [(model, 1 / len(args.models)) for model in args.models]
    rows = []
    order = random.Random(7)
    for number in range(args.rounds + 1):
        for safe in order.sample([True, False], 2):
            shutil.rmtree(args.output, ignore_errors=True)
            cpu_before = time.process_time()
            with contextlib.nullcontext() if safe else nothing_safe(args.backend):
                report = shardmix.merge(models, args.output, backend=args.backend, fsync=False)
            if number:
                cpu_s = round(time.process_time() - cpu_before, 4)
                rows.append({"safe": safe, "seconds": round(report.seconds, 4), "cpu_s": cpu_s})
    shutil.rmtree(args.output)
    json.dump(rows, sys.stdout)
    print()


if __name__ == "__main__":
    main()
