"""Low-rank changes of weights: W + scaling · left·right, the same bits whatever computes them.

The product is summed in the order of the rank, and each product and sum is rounded to the dtype of
the result by itself: no BLAS, whose order differs between machines, and no fused multiply-add. The
sum is then multiplied by the scaling, as PEFT does, and added to W. Knows arrays, not adapters.
"""

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
    if dtype == "BF16":
        bits = values.astype(np.uint32, order="C")
        bits <<= 16
        found: Floats = bits.view(np.float32)
    else:
        found = values.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(found, wide)


def add_product(
    dtype: str, values: Stored, out: Floats, left: Floats, right: Floats, scaling: float
) -> None:
    """Set `out` (rows, columns) to widened `values` (of a dtype) + scaling · left·right.

    `left` is (rows, rank), `right` (rank, columns), both in the dtype of `out`.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        total = left[:, :1] * right[:1]
        product = np.empty_like(total)
        for number in range(1, left.shape[1]):
            np.multiply(left[:, number, None], right[number], out=product)
            total += product
        total *= out.dtype.type(scaling)
        np.add(widened(values, dtype, out.dtype), total, out=out)
