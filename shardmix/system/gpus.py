"""The GPUs of the machine, counted without importing torch."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from shardmix.errors import RecipeError


def resolve_device(asked: str) -> str:
    """Return cpu, cuda or cuda:N for a user's choice; `auto` takes a GPU if there is one.

    Raises `RecipeError` for anything else.
    """
    if asked == "auto":
        return "cuda" if cuda_device_count() and torch_has_cuda_build() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise RecipeError("must be auto, cpu, cuda or cuda:N", subject=f"device {asked!r}")
    return asked


def torch_has_cuda_build() -> bool:
    """Return True if the installed torch was built for CUDA; does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def cuda_device_count(
    driver: Path = Path("/proc/driver/nvidia"), visible: str | None = None
) -> int:
    """Return the number of NVIDIA GPUs that the process may use.

    Asks torch if it uses GPUs already. Otherwise counts the driver's entries in /proc, limited by
    CUDA_VISIBLE_DEVICES, which `visible` can replace.
    """
    cuda = cuda_in_use()
    if cuda is not None:
        return int(cuda.device_count())
    if not (driver / "version").exists():
        return 0
    gpus = driver / "gpus"
    # A driver without a list means at least one GPU.
    count = len(list(gpus.iterdir())) if gpus.is_dir() else 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    if visible is None:
        return count
    named = 0
    for name in map(str.strip, visible.split(",")):
        # Numbers or UUIDs; CUDA ignores all entries after the first invalid one.
        if not name or name.startswith("-") or (name.isdecimal() and int(name) >= count):
            break
        named += 1
    return named


def cuda_in_use() -> Any:
    """Return `torch.cuda` if the process uses GPUs already, so that it can be asked; else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def num_devices(device: str) -> int:
    """Return the number of GPUs that share the tasks on cpu, cuda or cuda:N."""
    if device == "cpu":
        return 0
    return max(1, cuda_device_count()) if device == "cuda" else 1


def gpu_names(cuda: Any, device: str) -> list[str]:
    """Return torch's names of the present GPUs that cuda (all of them) or cuda:N stands for."""
    names = [f"cuda:{number}" for number in range(cuda.device_count())]
    return [name for name in names if device in ("cuda", name)]
