"""Compares a merged model with what numpy makes of its sources: every byte that isn't a hole.

    python -m benchmarks.scale.expected_merge OUT A=0.5 B=0.3 C=0.2

Knows nothing of shardmix. If a tensor is a hole in the output and in all sources, nothing is read
there: zeros are the sum of zeros. bf16 and float32, and no negative weights (which make -0 of 0).
"""

import functools
import json
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.scale.holes import Range, data_ranges, union

CHUNK_BYTES = 4 * 1024**2
WIDEST = 4
"""Ranges are widened to whole elements of any dtype."""


class Tensor(NamedTuple):
    """Where one tensor lies."""

    descriptor: int
    dtype: str
    shape: list[int]
    start: int
    nbytes: int
    in_file: Sequence[Range]
    """What of the file is no hole."""

    def read(self, start: int, stop: int) -> bytes:
        """Return some of its bytes, counted from its own start."""
        return os.pread(self.descriptor, stop - start, self.start + start)

    def data_ranges(self) -> Iterator[Range]:
        """Yield what of it is no hole, counted from its own start, in whole elements."""
        for start, stop in self.in_file:
            first, last = start - self.start, stop - self.start
            if first < self.nbytes and last > 0:
                first, last = first // WIDEST * WIDEST, -(-last // WIDEST) * WIDEST
                yield max(first, 0), min(last, self.nbytes)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a model."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
        header = json.loads(os.pread(descriptor, length, 8))
        ranges = list(data_ranges(descriptor))
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = (8 + length + offset for offset in entry["data_offsets"])
                kind = entry["dtype"], entry["shape"]
                found[name] = Tensor(descriptor, *kind, first, last - first, ranges)
    return found


def widened(data: bytes, dtype: str) -> np.ndarray:
    """Return stored values as float32."""
    if dtype == "F32":
        return np.frombuffer(data, np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def stored(values: np.ndarray, dtype: str) -> bytes:
    """Return float32 values as they are stored, rounded to nearest even; none is NaN."""
    if dtype == "F32":
        return values.tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()


def main(output: str, *words: str) -> None:
    """Compare and report."""
    parts = [word.rpartition("=") for word in words]
    weights = [np.float32(weight) for _, _, weight in parts]
    models = [tensors_of(Path(folder)) for folder, _, _ in parts]
    merged = tensors_of(Path(output))
    problems = []
    if merged.keys() != models[0].keys():
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
                num_nonzero += int(np.count_nonzero(np.frombuffer(data, np.uint8)))
                values = [widened(each.read(start, stop), tensor.dtype) for each in sources]
                total = functools.reduce(np.add, map(np.multiply, weights, values))
                if data != stored(total, tensor.dtype):
                    problems.append(f"{name}: differs from numpy's sum in {start}-{stop}")
    found = {
        "num_tensors": len(merged),
        "num_bytes": sum(tensor.nbytes for tensor in merged.values()),
        "num_bytes_compared": num_bytes,
        "num_bytes_nonzero": num_nonzero,
        "num_problems": len(problems),
        "problems": problems[:10],
    }
    print(json.dumps(found))
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main(*sys.argv[1:])
