"""Merges the same models by turns with and without digests, journal and the look for NaN and Inf.

    python benchmarks/safety_rounds.py A B C -o OUT --backend numba --rounds 11

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

import numpy as np

import shardmix
from shardmix import digests, journal


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


def round_only(stored, weight, total, out):  # type: ignore[no-untyped-def]
    """The last loop as it would be if nobody asked for NaN and Inf, but for NaNs' one pattern."""
    for index in range(total.size):
        bits = np.float32(total[index] + weight * widen(stored[index])).view(np.uint32)
        is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[index] = np.uint16(0x7FC0) if is_nan else rounded(bits, out)
    return np.uint32(0)


def widen(stored: object) -> float:
    """Stand for the library's own, which compiled code uses."""
    raise TypeError


rounded = widen


@contextlib.contextmanager
def nothing_safe(backend: str) -> Iterator[None]:
    """Leave the work out that is measured."""
    with contextlib.ExitStack() as stack:
        patches = [
            mock.patch.object(digests, "_leaf_hasher", return_value=NoHasher()),
            mock.patch.object(journal.Journal, "add", claim_nothing),
        ]
        if backend == "numba":
            from shardmix.reducer import numba_sum

            globals().update(widen=numba_sum._widen, rounded=numba_sum._rounded)
            patches.append(mock.patch.object(numba_sum, "_add_and_round", round_only))
            patches.append(mock.patch.object(numba_sum, "_compiled", compiled_once))
        for patch in patches:
            stack.enter_context(patch)
        yield


_COMPILED: dict[object, object] = {}


def compiled_once(function: object) -> object:
    """Compile a kernel once for all rounds; kernels from here have no cache on disk."""
    import numba

    if function not in _COMPILED:
        _COMPILED[function] = numba.njit(nogil=True)(function)
    return _COMPILED[function]


def main() -> None:
    """Run the rounds and print their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="bf16 checkpoints of one layout")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--backend", choices=["numba", "torch"], default="numba")
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
