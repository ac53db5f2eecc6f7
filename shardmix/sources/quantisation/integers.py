"""Integers of 1 to 8 bits: packed into words, or a byte each, with scales by groups of a row.

compressed-tensors packs each row of a matrix from its lowest bits on, and zero points by columns.
"""

from collections.abc import Iterator

from shardmix.errors import SourceError
from shardmix.formats.coded_tensors import Coding
from shardmix.formats.matrices import WHOLE
from shardmix.formats.small_floats import INT8, Code, packed_integer
from shardmix.sources.quantisation.coded import (
    FETCH,
    NONE,
    CodedTensor,
    block_of,
    check_matrix,
    no_scales,
)
from shardmix.sources.quantisation.stored import Declared, Stored

_PACKED = ".weight_packed"
_WEIGHT = ".weight"
_SCALE_DTYPES = ("F32", "BF16", "F16")
_MOST_AXES = 4
_MAX_GROUPS = 1 << 16
"""The most groups of a row that may have zero points or any order: so these fit into memory."""


def find(stored: Stored, declared: Declared) -> Iterator[CodedTensor]:
    """Yield the tensors in integers. Raises `SourceError` if what belongs to them doesn't fit."""
    for codes, name in stored.of_dtypes("I32"):
        if name.endswith(_PACKED):
            yield _packed(stored, declared, codes, name.removesuffix(_PACKED))
    for codes, name in stored.of_dtypes("I8"):
        scales = stored.row(f"{name}_scale")
        if scales is None or not name.endswith(_WEIGHT):
            continue  # bytes of another scheme
        check_matrix(stored, codes)
        yield _coded(stored, declared, codes, name.removesuffix(_WEIGHT), stored.shape(codes), INT8)


def _packed(stored: Stored, declared: Declared, codes: int, module: str) -> CodedTensor:
    described = stored.row(f"{module}.weight_shape")
    if described is None:
        raise SourceError(
            f"{stored.told(codes)} are packed integers, and {module}.weight_shape, their shape "
            "before that, is not there",
            remedy=FETCH,
        )
    check_matrix(stored, codes)
    shape = _shape(stored, codes, described)
    bits = _bits(stored, declared, codes, shape)
    return _coded(stored, declared, codes, module, shape, packed_integer(bits), (described,))


def _shape(stored: Stored, codes: int, described: int) -> tuple[int, ...]:
    told = stored.shape(described)
    is_shape = stored.dtype(described) in ("I64", "I32") and len(told) == 1
    if not is_shape or not 2 <= told[0] <= _MOST_AXES:
        raise SourceError(
            f"{stored.told(described)} is not the shape of a matrix: that is two integers",
            remedy=FETCH,
        )
    shape = stored.integers(described)
    *leading, _ = stored.shape(codes)
    if list(shape[:-1]) != leading or not 0 <= shape[-1] < 1 << 40:
        raise SourceError(
            f"{stored.tensors.names[described]} says {list(shape)}, which {stored.told(codes)} "
            "cannot be: all axes but the last must be the same",
            remedy=FETCH,
        )
    return shape


def _bits(stored: Stored, declared: Declared, codes: int, shape: tuple[int, ...]) -> int:
    """Return the width of packed integers, by the length of their rows."""
    num_words = stored.shape(codes)[-1]
    fitting = [
        bits for bits in range(1, 9) if packed_integer(bits).row_nbytes(shape[-1]) == 4 * num_words
    ]
    known = [bits for bits in fitting if bits in declared.bits] if declared.bits else fitting
    if len(known) != 1:
        widths = " or ".join(map(str, declared.bits)) or "1 to 8"
        found = (
            f"is not {shape[-1]} integers of {widths} bits"
            if not known
            else f"may be integers of {' or '.join(map(str, known))} bits, and config.json does "
            "not say of how many"
        )
        raise SourceError(f"{stored.told(codes)}: a row of {num_words} words {found}", remedy=FETCH)
    return known[0]


def _coded(
    stored: Stored,
    declared: Declared,
    codes: int,
    module: str,
    shape: tuple[int, ...],
    code: Code,
    others: tuple[int, ...] = (),
) -> CodedTensor:
    scales = stored.row(f"{module}.weight_scale")
    if scales is None:
        raise no_scales(stored, codes, f"{module}.weight_scale")
    if stored.dtype(scales) not in _SCALE_DTYPES:
        raise SourceError(
            f"{stored.told(scales)} has scales of a dtype that integers do not have",
            remedy="merge the unquantised checkpoint",
        )
    block = _group(stored, declared, shape, codes, scales)
    zeros = stored.row(f"{module}.weight_zero_point")
    zero_bits = 0
    if zeros is not None:
        zero_bits = _zero_bits(stored, zeros, scales, shape, code)
    elif declared.has_zero_points:
        raise SourceError(
            f"{stored.told(codes)} are codes with zero points by config.json (symmetric: false), "
            f"and {module}.weight_zero_point is not there",
            remedy=FETCH,
        )
    order = stored.row(f"{module}.weight_g_idx")
    if order is not None and (
        stored.shape(order) != (shape[-1],) or stored.dtype(order) not in ("I32", "I64")
    ):
        raise SourceError(
            f"{stored.told(order)} must be one integer for each of the {shape[-1]} columns: the "
            "group that it belongs to",
            remedy=FETCH,
        )
    num_groups = stored.shape(scales)[-1] if block[0] == 1 and block[1] != WHOLE else 1
    if (zeros is not None or order is not None) and num_groups > _MAX_GROUPS:
        raise SourceError(
            f"{stored.told(scales)} has {num_groups} groups in a row; with zero points or in any "
            f"order there may be {_MAX_GROUPS:,}",
            remedy="merge the unquantised checkpoint",
        )
    return CodedTensor(
        f"{module}.weight",
        shape,
        Coding(code, block, zero_bits=zero_bits),
        codes,
        scales,
        zeros=NONE if zeros is None else zeros,
        order=NONE if order is None or num_groups == 1 else order,
        others=(*others, *(() if order is None or num_groups > 1 else (order,))),
    )


def _group(
    stored: Stored, declared: Declared, shape: tuple[int, ...], codes: int, scales: int
) -> tuple[int, int]:
    """Return the block that shares a scale; a size that no config names follows from the shape."""
    *leading, columns = shape
    given = stored.shape(scales)
    if len(given) == len(shape) and list(given[:-1]) == leading and 1 < given[-1] <= columns:
        size, rest = divmod(columns, given[-1])
        sizes = declared.group_sizes
        if rest or (sizes and size not in sizes):
            wanted = f"of {' or '.join(map(str, sizes))} columns" if sizes else "of one size"
            raise SourceError(
                f"{stored.told(scales)} has {given[-1]} groups for {columns} columns; they must be "
                f"{wanted}",
                remedy=FETCH,
            )
        return 1, size
    return block_of(stored, shape, codes, scales, declared)


def _zero_bits(stored: Stored, zeros: int, scales: int, shape: tuple[int, ...], code: Code) -> int:
    """Return the width of packed zero points, or 0 if each has a byte."""
    given = stored.shape(scales)
    if stored.dtype(zeros) == "I8" and stored.shape(zeros) == given:
        return 0
    if stored.dtype(zeros) == "I32" and len(given) == len(shape) and code.is_in_words:
        *leading, rows, _ = shape
        if stored.shape(zeros) == (*leading, code.row_nbytes(rows) // 4, given[-1]):
            return code.bits
    raise SourceError(
        f"{stored.told(zeros)} does not fit the scales {stored.told(scales)}: each scale must have "
        "one zero point",
        remedy=FETCH,
    )
