"""Merges two single-file checkpoints with sd-mecha. Runs in an environment that has it.

    python benchmarks/merge_with_sd_mecha.py A B -o OUT

Sums in float32, as by default; the output is bfloat16 as the sources are. Prints one JSON object;
`seconds` leaves the imports out.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import sd_mecha
import torch

WEIGHTS_FILE = "model.safetensors"


def main() -> None:
    """Merge half and half and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs=2, help="folders with one weight file each")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    args = parser.parse_args()
    start = time.perf_counter()
    args.output.mkdir(parents=True)
    with contextlib.redirect_stdout(sys.stderr):
        # Absolute paths: it looks for others in its own folders of models.
        first, second = (sd_mecha.model((model / WEIGHTS_FILE).resolve()) for model in args.models)
        sd_mecha.merge(
            sd_mecha.weighted_sum(first, second, alpha=0.5),
            output=(args.output / WEIGHTS_FILE).resolve(),
            output_dtype=torch.bfloat16,
        )
    print(json.dumps({"seconds": round(time.perf_counter() - start, 4)}))


if __name__ == "__main__":
    main()
