"""NaNs and infinities of a chunk, counted once a backend has found that there are some.

In numpy and on bit patterns, alike for every backend and dtype; in pieces, since the chunk's own
buffers take all planned memory. Knows arrays, not how they were merged.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shardmix.anomalies import NonfiniteCounts
from shardmix.dtypes import BY_NAME

_PIECE = 1 << 15  # elements; their temporaries stay below 1 MiB, even in float64


def count_nonfinite(
    out: memoryview,
    out_dtype: str,
    sums: Callable[[slice], npt.NDArray[np.floating]],
    start: int,
    stop: int,
) -> NonfiniteCounts:
    """Count among the elements from `start` to `stop` of a chunk.

    `out` has the whole chunk's bytes. `sums` returns a range of the unrounded values, and is called
    only if there are infinities.
    """
    dtype = BY_NAME[out_dtype]
    # Without the sign, which is shifted out. All larger values are NaN.
    infinity = np.dtype(dtype.numpy_name).type((dtype.infinity or 0) << 1)
    elements = np.frombuffer(out, dtype=infinity.dtype)
    num_nan = num_inf = num_overflowed = 0
    for first in range(start, stop, _PIECE):
        piece = slice(first, min(first + _PIECE, stop))
        magnitudes = elements[piece] << 1
        num_nan += int(np.count_nonzero(magnitudes > infinity))
        infinite = magnitudes == infinity
        if infinite.any():
            num_inf += int(np.count_nonzero(infinite))
            num_overflowed += int(np.count_nonzero(infinite & np.isfinite(sums(piece))))
    return NonfiniteCounts(num_nan=num_nan, num_inf=num_inf, num_overflowed=num_overflowed)


def as_float32(data: memoryview) -> npt.NDArray[np.float32]:
    """Return bytes as the float32 values that they are."""
    return np.frombuffer(data, dtype=np.float32)
