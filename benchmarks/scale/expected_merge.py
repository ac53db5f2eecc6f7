"""Compares a merged model with what numpy makes of its sources: every byte that isn't a hole.

    python -m benchmarks.scale.expected_merge OUT A=0.5 B=0.3 C=0.2

Knows nothing of shardmix: the format is read with json, the sum is numpy's, in float32, rounded to
nearest even. If a tensor is a hole in the output and in all sources, nothing is read there: zeros
are the sum of zeros. bf16 and float32, and no negative weights (which make -0 of 0). Prints a JSON
object; ends with status 1 where a byte differs.
"""

import argparse
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.scale.holes import Range, data_ranges, union

CHUNK_BYTES = 4 * 1024**2
WIDEST = 4
"""Ranges are widened to whole elements of any dtype."""
MOST_NAMED = 10


class Shard:
    """An open safetensors file, its header and where it holds data."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        (length,) = struct.unpack("<Q", os.pread(self.descriptor, 8, 0))
        self.data_start = 8 + length
        header = json.loads(os.pread(self.descriptor, length, 8)) if length else {}
        header.pop("__metadata__", None)
        self.header: dict[str, dict] = header
        self.data = list(data_ranges(self.descriptor))


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies."""

    shard: Shard
    dtype: str
    shape: list[int]
    start: int
    nbytes: int

    def read(self, start: int, stop: int) -> bytes:
        """Return some of its bytes, counted from its own start."""
        return os.pread(self.shard.descriptor, stop - start, self.start + start)

    def data_ranges(self) -> Iterator[Range]:
        """Yield what of it is no hole, counted from its own start, in whole elements."""
        for start, stop in self.shard.data:
            first, last = start - self.start, stop - self.start
            if first < self.nbytes and last > 0:
                first, last = first // WIDEST * WIDEST, -(-last // WIDEST) * WIDEST
                yield max(first, 0), min(last, self.nbytes)


def tensors_of(folder: Path, *, finished_only: bool = False) -> dict[str, Tensor]:
    """Return every tensor of a model; of a staged one those of files that have a header."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = Shard(path)
        if finished_only and not shard.header:
            continue
        for name, entry in shard.header.items():
            first, last = entry["data_offsets"]
            start = shard.data_start + first
            found[name] = Tensor(shard, entry["dtype"], entry["shape"], start, last - first)
    return found


def widened(data: bytes, dtype: str) -> np.ndarray:
    """Return stored values as float32."""
    if dtype == "F32":
        return np.frombuffer(data, np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def stored(values: np.ndarray, dtype: str) -> bytes:
    """Return float32 values as they are stored; none is NaN."""
    if dtype == "F32":
        return values.tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def expected(sources: list[Tensor], weights: list[np.float32], start: int, stop: int) -> bytes:
    """Return what a range of the merged tensor must be."""
    dtype = sources[0].dtype
    total = weights[0] * widened(sources[0].read(start, stop), dtype)
    for tensor, weight in zip(sources[1:], weights[1:], strict=True):
        total += weight * widened(tensor.read(start, stop), dtype)
    return stored(total, dtype)


def main() -> None:
    """Compare and report."""
    parser = argparse.ArgumentParser(description="Compare a merged model with numpy's sum.")
    parser.add_argument("output", type=Path, help="the merged model")
    parser.add_argument("sources", nargs="+", help="FOLDER=WEIGHT, in the merge's order")
    parser.add_argument("--finished-files", action="store_true", help="of an unfinished merge")
    args = parser.parse_args()
    words = [word.rpartition("=") for word in args.sources]
    weights = [np.float32(weight) for _, _, weight in words]
    models = [tensors_of(Path(folder)) for folder, _, _ in words]
    merged = tensors_of(args.output, finished_only=args.finished_files)
    problems = []
    if not args.finished_files and merged.keys() != models[0].keys():
        problems.append("its tensors are not the first model's")
    num_bytes = num_nonzero = 0
    for name, tensor in merged.items():
        sources = [model[name] for model in models]
        if any((each.dtype, each.shape) != (tensor.dtype, tensor.shape) for each in sources):
            problems.append(f"{name}: has another dtype or shape than in the sources")
            continue
        for first, last in union(r for each in (tensor, *sources) for r in each.data_ranges()):
            for start in range(first, last, CHUNK_BYTES):
                stop = min(start + CHUNK_BYTES, last)
                data = tensor.read(start, stop)
                num_bytes += len(data)
                num_nonzero += np.count_nonzero(np.frombuffer(data, np.uint8))
                if data != expected(sources, weights, start, stop):
                    problems.append(f"{name}: differs from numpy's sum in {start}-{stop}")
    found = {
        "num_tensors": len(merged),
        "num_bytes": sum(tensor.nbytes for tensor in merged.values()),
        "num_bytes_compared": num_bytes,
        "num_bytes_nonzero": int(num_nonzero),
        "num_problems": len(problems),
        "problems": problems[:MOST_NAMED],
    }
    print(json.dumps(found))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
