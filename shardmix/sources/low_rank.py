"""Low-rank changes of weights: W + scaling · left·right, the same bits whatever computes them.

The product is summed in the order of the rank, and each product and sum is rounded to the dtype of
the result by itself: no BLAS, whose order differs between machines, and no fused multiply-add. The
sum is then multiplied by the scaling, as PEFT does, and added to W. Knows arrays, not adapters.
"""

import numpy as np

from shardmix.formats.stored_floats import Floats, Stored, widened


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
