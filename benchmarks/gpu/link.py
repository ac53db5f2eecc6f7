"""What a GPU's link moves between pinned memory and the device: in, out, and both at once.

    python -m benchmarks.gpu.link

Prints one JSON object: GB/s of each way, and of both together; the best of some rounds of copies.
Exits with 2 if torch finds no CUDA device.
"""

import json
import sys
import time

import torch

NBYTES = 256 * 1024**2
COPIES = 8
ROUNDS = 5


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no usable CUDA device", file=sys.stderr)
        sys.exit(2)
    pinned = [torch.zeros(NBYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    on_gpu = [torch.zeros(NBYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    inward = (torch.cuda.Stream(), on_gpu[0], pinned[0])
    outward = (torch.cuda.Stream(), pinned[1], on_gpu[1])

    def rate(*ways: tuple[torch.cuda.Stream, torch.Tensor, torch.Tensor]) -> float:
        best = float("inf")
        for _ in range(ROUNDS + 1):  # the first one warms up, and is never the best
            torch.cuda.synchronize()
            started = time.perf_counter()
            for stream, target, source in ways * COPIES:
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        return round(COPIES * len(ways) * NBYTES / best / 1e9, 2)

    rates = {"to the GPU": rate(inward), "to the host": rate(outward)}
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    print(json.dumps({"gpu": gpu, "rates": rates | {"both": rate(inward, outward)}}))


if __name__ == "__main__":
    main()
