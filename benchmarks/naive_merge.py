"""What one writes by hand: load a shard of every model, add in float32, round, save.

    python benchmarks/naive_merge.py A B C -o OUT

Needs checkpoints of one layout. Prints one JSON object; `seconds` leaves the imports out.
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def merge_shard(sources: Sequence[Path], target: Path) -> None:
    """Write the mean of the sources' tensors, each rounded to its dtype in the first source."""
    loaded = [load_file(path) for path in sources]
    merged: dict[str, torch.Tensor] = {}
    for name, first in loaded[0].items():
        total = first.float() / len(loaded)
        for tensors in loaded[1:]:
            total += tensors[name].float() / len(loaded)
        merged[name] = total.to(first.dtype)
    save_file(merged, target, metadata={"format": "pt"})


def main() -> None:
    """Merge shard by shard and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="checkpoint folders of one layout")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    start = time.perf_counter()
    args.output.mkdir(parents=True)
    for path in sorted(args.models[0].glob("*.safetensors")):
        merge_shard([model / path.name for model in args.models], args.output / path.name)
    for path in args.models[0].glob("*.json"):
        shutil.copy(path, args.output)
    print(json.dumps({"seconds": round(time.perf_counter() - start, 4)}))


if __name__ == "__main__":
    main()
