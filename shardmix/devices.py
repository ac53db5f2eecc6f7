"""Which devices there are, judged without importing torch."""

import importlib.util
import os
import re
from pathlib import Path

from shardmix.errors import RecipeError


def resolve_device(asked: str) -> str:
    """Return cpu, cuda or cuda:N for what was asked for; `auto` takes a GPU where there is one.

    Raises `RecipeError` for anything else.
    """
    if asked == "auto":
        return "cuda" if cuda_device_present() and torch_has_cuda_build() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise RecipeError(f"device {asked!r}: must be auto, cpu, cuda or cuda:N")
    return asked


def torch_has_cuda_build() -> bool:
    """Tell whether the installed torch was built for CUDA, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def cuda_device_present() -> bool:
    """Tell whether an NVIDIA driver is loaded and devices are not hidden, without torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and Path("/proc/driver/nvidia/version").exists()
