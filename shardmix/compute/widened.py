"""Stored floats as float64 arrays of numpy, for statistics. Needs no torch."""

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import BY_NAME


def widened(raw: memoryview, dtype: str) -> npt.NDArray[np.float64]:
    """Return stored floats as float64, exactly. `dtype` is their safetensors dtype."""
    row = BY_NAME[dtype]
    wide = np.dtype(row.numpy_float)
    num_lower_bits = wide.itemsize * 8 - row.bits
    if num_lower_bits == 0:
        return np.frombuffer(raw, wide).astype(np.float64)
    upper = np.frombuffer(raw, row.numpy_name).astype(f"u{wide.itemsize}")
    floats: npt.NDArray[np.floating] = (upper << num_lower_bits).view(wide)
    return floats.astype(np.float64)
