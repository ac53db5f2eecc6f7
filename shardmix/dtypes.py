"""The dtypes of safetensors: the one table of all that shardmix knows of them.

Names, widths and ranks are those of the safetensors library (0.8):
https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs

A new dtype is a row here. A FLOAT must be one that torch adds and rounds; others, such as FP8, are
a CODE, which a kind of source decodes. More is needed only by a float that compiled kernels shall
handle (how `compute.llvm_loops` widens it, rounds to it and writes its NaN), and by one that
`--dtype` shall name (`OUT_DTYPES` below, and its help in `cli.options`). Tests name what a row
lacks.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

FLOAT = "float"
"""Kind: floats that are averaged."""
INTEGER = "integer"
"""Kind: integers and booleans; the output has the first model's."""
CODE = "code"
"""Kind: floats of 4 to 8 bits, meaningless without their scales; not merged."""
COMPLEX = "complex"
"""Kind: complex numbers; not merged."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype."""

    name: str
    """Its name in a safetensors header."""
    bits: int
    """Width of one element; less than a byte for some."""
    kind: str
    """FLOAT, INTEGER, CODE or COMPLEX."""
    torch_name: str | None
    """Its attribute of the module torch; None if torch (2.2) has none."""
    numpy_name: str | None = None
    """The numpy dtype of its elements, or of their bits; None if nobody needs it."""
    infinity: int | None = None
    """The bits of positive infinity; None if it has none. Larger magnitudes are NaN."""
    numpy_float: str | None = None
    """The float of numpy whose upper bits are an element's; None if it is no float to merge."""
    llvm_name: str | None = None
    """The LLVM type that kernels load and store; None if there are no kernels for it."""

    @property
    def mantissa_bits(self) -> int:
        """Bits of a float's mantissa: those that are all zero in its infinity."""
        infinity = self.infinity or 0
        return (infinity & -infinity).bit_length() - 1

    @property
    def least_infinite(self) -> int:
        """Bits of the least float32 that rounding to this float makes infinite.

        Half a step beyond the largest finite value: a mantissa with one bit more, all of them set.
        """
        bits = self.mantissa_bits + 1
        if bits > _FLOAT32_MANTISSA:
            return self.infinity or 0
        exponent = (1 << (self.bits - 1 - bits)) - 1 + _FLOAT32_BIAS
        ones = (1 << bits) - 1
        return exponent << _FLOAT32_MANTISSA | ones << (_FLOAT32_MANTISSA - bits)


_FLOAT32_MANTISSA, _FLOAT32_BIAS = 23, 127

# In safetensors' order of rank: its writer lays tensors out by rank, highest first.
_TABLE = (
    Dtype("BOOL", 8, INTEGER, "bool", "uint8"),
    Dtype("F4", 4, CODE, None),
    Dtype("F6_E2M3", 6, CODE, None),
    Dtype("F6_E3M2", 6, CODE, None),
    Dtype("U8", 8, INTEGER, "uint8", "uint8"),
    Dtype("I8", 8, INTEGER, "int8", "int8"),
    Dtype("F8_E5M2", 8, CODE, "float8_e5m2"),
    Dtype("F8_E4M3", 8, CODE, "float8_e4m3fn"),
    Dtype("F8_E8M0", 8, CODE, None),
    Dtype("F8_E4M3FNUZ", 8, CODE, "float8_e4m3fnuz"),
    Dtype("F8_E5M2FNUZ", 8, CODE, "float8_e5m2fnuz"),
    Dtype("I16", 16, INTEGER, "int16", "int16"),
    Dtype("U16", 16, INTEGER, None, "uint16"),
    Dtype("F16", 16, FLOAT, "float16", "uint16", 0x7C00, "float16", "half"),
    Dtype("BF16", 16, FLOAT, "bfloat16", "uint16", 0x7F80, "float32", "i16"),
    Dtype("I32", 32, INTEGER, "int32", "int32"),
    Dtype("U32", 32, INTEGER, None, "uint32"),
    Dtype("F32", 32, FLOAT, "float32", "uint32", 0x7F800000, "float32", "float"),
    Dtype("C64", 64, COMPLEX, "complex64"),
    Dtype("F64", 64, FLOAT, "float64", "uint64", 0x7FF0000000000000, "float64"),
    Dtype("I64", 64, INTEGER, "int64", "int64"),
    Dtype("U64", 64, INTEGER, None, "uint64"),
)

BY_NAME = {dtype.name: dtype for dtype in _TABLE}
DTYPES = tuple(BY_NAME)
"""All names, by rank."""
DTYPE_RANK = {name: rank for rank, name in enumerate(DTYPES)}
FLOAT_DTYPES = frozenset(dtype.name for dtype in _TABLE if dtype.kind == FLOAT)
INTEGER_DTYPES = frozenset(dtype.name for dtype in _TABLE if dtype.kind == INTEGER)
WIDE_DTYPES = frozenset(name for name in FLOAT_DTYPES if BY_NAME[name].bits > 32)
"""Names of the floats that float32 cannot hold: they are summed in float64."""
WIDEST_NBYTES = max(dtype.bits for dtype in _TABLE) // 8
"""Bytes of the widest element."""
CODE_DTYPES = ("F8_E4M3", "F8_E5M2", "U8", "I8", "I32")
"""Names of the dtypes that quantised tensors store their codes in."""
LLVM_DTYPES = frozenset(dtype.name for dtype in _TABLE if dtype.llvm_name is not None)
"""Names of the dtypes that compiled kernels read and write."""
OUT_DTYPES = {BY_NAME[name].torch_name or "": name for name in ("F32", "F16", "BF16")}
"""Possible dtypes of an output: torch name → name."""


def torch_name(dtype: str) -> str:
    """Return a dtype's name in torch; raise KeyError if it has none there."""
    name = BY_NAME[dtype].torch_name
    if name is None:
        raise KeyError(dtype)
    return name


def dtype_bits(dtype: str) -> int:
    """Return the bits of one element of any dtype; some have fewer than a byte's."""
    return BY_NAME[dtype].bits


def element_nbytes(dtype: str) -> int:
    """Return the bytes of one element of a float, integer or boolean dtype."""
    return BY_NAME[dtype].bits // 8


@lru_cache(maxsize=4096)  # thousands of experts have few shapes
def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; a 0-d tensor has one element, an empty one none."""
    return math.prod(shape) * BY_NAME[dtype].bits // 8
