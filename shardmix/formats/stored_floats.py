"""Stored floats as arrays of numpy: their bits, and their values in float32 or float64."""

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import BY_NAME

Stored = npt.NDArray[np.generic]
"""Elements as they are stored; of bfloat16 and float16 the bits, in uint16."""
Floats = npt.NDArray[np.floating]
"""Elements in float32 or float64."""


def stored(raw: memoryview, dtype: str) -> Stored:
    """Return bytes as an array of elements of a dtype (a safetensors name)."""
    return np.frombuffer(raw, BY_NAME[dtype].numpy_name)


def widened(values: Stored, dtype: str, wide: npt.DTypeLike = np.float32) -> Floats:
    """Return stored elements as contiguous float32 or float64; exact, unless they are wider."""
    row = BY_NAME[dtype]
    own = np.dtype(row.numpy_float)
    num_lower_bits = own.itemsize * 8 - row.bits
    if num_lower_bits:
        bits = values.astype(f"u{own.itemsize}", order="C")
        bits <<= num_lower_bits
        found: Floats = bits.view(own)
    else:
        found = values.view(own)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(found, wide)
