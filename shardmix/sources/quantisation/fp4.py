"""FP4: two floats of 4 bits in a byte, and scales by groups of a row's elements.

NVFP4 has scales in FP8 for 16 elements, and one float32 a tensor: compressed-tensors divides by it
(`weight_global_scale`), ModelOpt multiplies (`weight_scale_2`). MXFP4 has powers of two for 32.
"""

from collections.abc import Iterator

from shardmix.errors import SourceError
from shardmix.formats.coded_tensors import OVER, TIMES, Coding
from shardmix.formats.matrices import Matrices
from shardmix.formats.small_floats import FP4
from shardmix.sources.quantisation.coded import (
    FETCH,
    NONE,
    CodedTensor,
    check_matrix,
    no_scales,
)
from shardmix.sources.quantisation.stored import Declared, Stored

_PACKED = ".weight_packed"
_WEIGHT = ".weight"
_NV_GROUP, _MX_GROUP = 16, 32


def find(stored: Stored, declared: Declared) -> Iterator[CodedTensor]:
    """Yield the tensors in FP4. Raises `SourceError` if their scales are missing or don't fit."""
    del declared  # the groups' size follows from the dtype of the scales
    for codes, name in stored.of_dtypes("U8"):
        packed = name.endswith(_PACKED)
        module = name.removesuffix(_PACKED if packed else _WEIGHT)
        if module == name:
            continue
        tensor_scale = stored.row(f"{module}.weight_{'global_scale' if packed else 'scale_2'}")
        if not packed and tensor_scale is None:
            continue  # bytes of another scheme
        scales = stored.row(f"{module}.weight_scale")
        if scales is None:
            raise no_scales(stored, codes, f"{module}.weight_scale")
        check_matrix(stored, codes)
        *leading, num_bytes = stored.shape(codes)
        shape = (*leading, 2 * num_bytes)
        coding = _coding(stored, codes, scales, tensor_scale, shape, packed=packed)
        yield CodedTensor(
            f"{module}.weight",
            shape,
            coding,
            codes,
            scales,
            tensor_scale=NONE if tensor_scale is None else tensor_scale,
        )


def _coding(
    stored: Stored,
    codes: int,
    scales: int,
    tensor_scale: int | None,
    shape: tuple[int, ...],
    *,
    packed: bool,
) -> Coding:
    dtype = stored.dtype(scales)
    if dtype == "F8_E4M3" and tensor_scale is None:
        raise SourceError(
            f"{stored.told(codes)} are codes in NVFP4, and the scale of the whole tensor, "
            "weight_global_scale, is not there",
            remedy=FETCH,
        )
    if dtype not in ("F8_E4M3", "F8_E8M0", "U8") or (tensor_scale is not None) != (
        dtype == "F8_E4M3"
    ):
        raise SourceError(
            f"{stored.told(scales)} has scales of a dtype that FP4 codes do not have",
            remedy="merge the unquantised checkpoint",
        )
    group = _MX_GROUP if tensor_scale is None else _NV_GROUP
    *leading, rows, columns = shape
    if columns % group:
        raise SourceError(
            f"{stored.told(codes)} has {columns} elements in a row, which groups of {group} do not "
            "divide",
            remedy=FETCH,
        )
    if stored.shape(scales) != (*leading, *Matrices.of(shape).grid((1, group))):
        raise SourceError(
            f"{stored.told(scales)} does not fit the codes {stored.told(codes)}: each {group} "
            f"elements of a row must have a scale, so its shape must be "
            f"{[*leading, rows, columns // group]}",
            remedy=FETCH,
        )
    if tensor_scale is None:
        return Coding(FP4, (1, group))
    shared = stored.shape(tensor_scale)
    if stored.dtype(tensor_scale) != "F32" or shared not in ((), (1,)):
        raise SourceError(
            f"{stored.told(tensor_scale)} must be one number in F32: the scale of the whole tensor",
            remedy=FETCH,
        )
    return Coding(FP4, (1, group), tensor_scale=OVER if packed else TIMES)
