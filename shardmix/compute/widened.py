"""Stored floats as float64 arrays of numpy, for statistics. Needs no torch."""

import numpy as np
import numpy.typing as npt

_BFLOAT16_SHIFT = 16


def widened(raw: memoryview, dtype: str) -> npt.NDArray[np.float64]:
    """Return stored floats as float64, exactly. `dtype` is their safetensors dtype."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << _BFLOAT16_SHIFT
        return bits.view(np.float32).astype(np.float64)
    stored = {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]
    return np.frombuffer(raw, stored).astype(np.float64)
