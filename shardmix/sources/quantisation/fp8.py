"""FP8: a tensor of 8-bit floats, and scales by tensor, channel or block.

DeepSeek-V3, and transformers' `fp8` and `mxfp8`, say `weight_scale_inv` although it multiplies;
compressed-tensors, FBGEMM and ModelOpt say `weight_scale`.
"""

from collections.abc import Iterator

from shardmix.errors import SourceError
from shardmix.formats.coded_tensors import Coding
from shardmix.formats.small_floats import E4M3, E5M2
from shardmix.sources.quantisation.coded import (
    FETCH,
    NONE,
    CodedTensor,
    block_of,
    check_matrix,
)
from shardmix.sources.quantisation.stored import Declared, Stored

_CODES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
_SCALES = ("_scale_inv", "_scale")
# DeepSeek-V4 and Mistral; transformers renames them.
_SCALES_OF_MODULES = (".scale", ".qscale_weight")


def find(stored: Stored, declared: Declared) -> Iterator[CodedTensor]:
    """Yield the tensors in FP8 that have scales. Raises `SourceError` if these do not fit."""
    for codes, name in stored.of_dtypes(*_CODES):
        scales = _scales(stored, name)
        if scales is None:
            continue  # scales of FP4, or no part of a known scheme
        check_matrix(stored, codes)
        shape = stored.shape(codes)
        zeros = stored.row(f"{name}_zero_point")
        if zeros is not None and (
            stored.shape(zeros) != stored.shape(scales) or stored.dtype(zeros) != "F8_E4M3"
        ):
            raise SourceError(
                f"{stored.told(zeros)} are zero points of another shape or dtype than "
                f"{stored.told(scales)} have",
                remedy=FETCH,
            )
        yield CodedTensor(
            name,
            shape,
            Coding(_CODES[stored.dtype(codes)], block_of(stored, shape, codes, scales, declared)),
            codes,
            scales,
            zeros=NONE if zeros is None else zeros,
        )


def _scales(stored: Stored, name: str) -> int | None:
    module = name.removesuffix(".weight")
    names = [f"{name}{ending}" for ending in _SCALES]
    if module != name:
        names += [f"{module}{ending}" for ending in _SCALES_OF_MODULES]
    found = [row for row in map(stored.row, names) if row is not None]
    if len(found) > 1:
        told = " and ".join(stored.told(row) for row in found)
        raise SourceError(f"{name} has scales twice: {told}", remedy=FETCH)
    return found[0] if found else None
