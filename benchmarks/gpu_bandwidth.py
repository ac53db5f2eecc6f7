"""What a GPU's link moves between pinned memory and the device: in, out, and both at once.

    python benchmarks/gpu_bandwidth.py

Prints one JSON object: GB/s of each way, and of both together; the best of some copies of 256 MiB
each. Exits with 2 where torch finds no CUDA device.
"""

import json
import sys
import time
from collections.abc import Callable

import torch

NBYTES = 256 * 1024**2
COPIES = 8
ROUNDS = 5


def gb_per_second(copy: Callable[[], None], *, nbytes: int) -> float:
    """The rate of `COPIES` copies queued together, in the best of the rounds."""
    best = float("inf")
    for _ in range(ROUNDS + 1):  # the first one warms up, and is never the best
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(COPIES):
            copy()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return round(COPIES * nbytes / best / 1e9, 2)


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no usable CUDA device", file=sys.stderr)
        sys.exit(2)
    pinned = [torch.zeros(NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_gpu = [torch.zeros(NBYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    inward, outward = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()

    def copy_in() -> None:
        with torch.cuda.stream(inward):
            on_gpu[0].copy_(pinned[0], non_blocking=True)

    def copy_out() -> None:
        with torch.cuda.stream(outward):
            pinned[1].copy_(on_gpu[1], non_blocking=True)

    def copy_both() -> None:
        copy_in()
        copy_out()

    report = {
        "device": torch.cuda.get_device_name(),
        "num_devices": torch.cuda.device_count(),
        "to_device": gb_per_second(copy_in, nbytes=NBYTES),
        "to_host": gb_per_second(copy_out, nbytes=NBYTES),
        "both": gb_per_second(copy_both, nbytes=2 * NBYTES),
    }
    json.dump(report, sys.stdout)
    print()


if __name__ == "__main__":
    main()
