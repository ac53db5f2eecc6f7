"""Matrices as DeepSeek-V3 stores them: FP8 (E4M3), and a float32 scale for 128 × 128 elements.

    scale = largest magnitude / 448        code = E4M3, rounded to nearest even, of value / scale

The largest magnitude is that of the block's finite values, so NaN and infinities spoil no
neighbours: E4M3 has no infinity, and both become NaN. A block of zeros has the scale 1, as
transformers gives it; a scale that float32 would round to 0 becomes its least number instead. So no
value is divided by 0. https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md
"""

import numpy as np

from shardmix.formats.output_coding import Encode
from shardmix.formats.small_floats import E4M3_LARGEST, Bytes, Floats, encode_e4m3

_LEAST = np.float32(2.0**-149)


class Fp8Blocks:
    """The coding; see `OutputCoding`."""

    code_dtype = "F8_E4M3"
    scale_dtype = "F32"
    block = (128, 128)

    def scales(self, largest: Floats) -> Floats:
        """Return the scales of blocks, from the largest finite magnitude in each."""
        with np.errstate(under="ignore"):
            found: Floats = np.maximum(largest / np.float32(E4M3_LARGEST), _LEAST)
        found[largest == 0] = 1
        return found

    def encode(self, values: Floats, factors: Floats, out: Bytes, scratch: Floats) -> None:
        """Fill `out` with the codes of values (rows × columns) over the columns' scales."""
        scaled = scratch[0].reshape(values.shape)
        with np.errstate(all="ignore"):  # what is not finite was found before
            np.divide(values, factors, out=scaled)
        encode_e4m3(scratch[0], out, scratch[1:])

    def compiled(self) -> Encode:
        """Return `encode` as machine code."""
        from shardmix.formats.fp8_kernel import encoding_kernel

        return encoding_kernel().encode
