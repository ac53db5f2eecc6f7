"""Which devices there are, judged without importing torch."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from shardmix.errors import RecipeError


def resolve_device(asked: str) -> str:
    """Return cpu, cuda or cuda:N for what was asked for; `auto` takes a GPU where there is one.

    Raises `RecipeError` for anything else.
    """
    if asked == "auto":
        return "cuda" if cuda_device_count() and torch_has_cuda_build() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise RecipeError(f"device {asked!r}: must be auto, cpu, cuda or cuda:N")
    return asked


def torch_has_cuda_build() -> bool:
    """Tell whether the installed torch was built for CUDA, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def cuda_device_count(
    driver: Path = Path("/proc/driver/nvidia"), visible: str | None = None
) -> int:
    """Return how many NVIDIA GPUs the process may use.

    As torch counts them once it uses them; before, by what the driver tells in /proc and by
    CUDA_VISIBLE_DEVICES, for which `visible` can stand in.
    """
    cuda = cuda_in_use()
    if cuda is not None:
        return int(cuda.device_count())
    if not (driver / "version").exists():
        return 0
    gpus = driver / "gpus"
    # Without a list there is at least one, since there is a driver.
    count = len(list(gpus.iterdir())) if gpus.is_dir() else 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    if visible is None:
        return count
    named = 0
    for name in map(str.strip, visible.split(",")):
        # Numbers or UUIDs; CUDA leaves out what comes after one that there is not.
        if not name or name.startswith("-") or (name.isdecimal() and int(name) >= count):
            break
        named += 1
    return named


def cuda_in_use() -> Any:
    """Return `torch.cuda` where the process uses GPUs already, so that it can be asked; or None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def num_devices(device: str) -> int:
    """Return how many GPUs share the work on cpu, cuda or cuda:N; as many as the plan counts on."""
    if device == "cpu":
        return 0
    return max(1, cuda_device_count()) if device == "cuda" else 1


def gpu_names(cuda: Any, device: str) -> list[str]:
    """Return torch's names of what cuda (all GPUs) or cuda:N stands for, of the GPUs there are."""
    names = [f"cuda:{number}" for number in range(cuda.device_count())]
    return [name for name in names if device in ("cuda", name)]
