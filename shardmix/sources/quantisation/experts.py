"""gpt-oss' experts in MXFP4: codes by output and input, of a tensor by input and output.

`X_blocks` has 16 bytes, 32 codes, for each scale of `X_scales`. transformers transposes each expert
when it decodes them, so X has the shape that the unquantised model stores.
"""

from collections.abc import Iterator

from shardmix.errors import SourceError
from shardmix.formats.coded_tensors import Coding
from shardmix.formats.small_floats import FP4
from shardmix.sources.quantisation.coded import FETCH, CodedTensor, no_scales
from shardmix.sources.quantisation.stored import Declared, Stored

_BLOCKS, _SCALES = "_blocks", "_scales"
_BLOCK_NBYTES = 16
_GROUP = 2 * _BLOCK_NBYTES


def find(stored: Stored, declared: Declared) -> Iterator[CodedTensor]:
    """Yield experts in MXFP4. Raises `SourceError` if their scales are missing or do not fit."""
    for codes, name in stored.of_dtypes("U8"):
        if not name.endswith(_BLOCKS):
            continue
        tensor = name.removesuffix(_BLOCKS)
        scales = stored.row(f"{tensor}{_SCALES}")
        shape = stored.shape(codes)
        if scales is None:
            if declared.method == "mxfp4" or len(shape) == 4:
                raise no_scales(stored, codes, f"{tensor}{_SCALES}")
            continue
        if len(shape) != 4 or shape[-1] != _BLOCK_NBYTES:
            raise SourceError(
                f"{stored.told(codes)} must have four axes, the last of {_BLOCK_NBYTES} bytes: "
                "experts, outputs, groups of inputs, codes of a group",
                remedy=FETCH,
            )
        if stored.dtype(scales) != "U8" or stored.shape(scales) != shape[:-1]:
            raise SourceError(
                f"{stored.told(scales)} does not fit the codes {stored.told(codes)}: each "
                f"{_BLOCK_NBYTES} bytes must have a scale, so it must be U8 {list(shape[:-1])}",
                remedy=FETCH,
            )
        experts, outputs, groups, _ = shape
        yield CodedTensor(
            tensor,
            (experts, groups * _GROUP, outputs),
            Coding(FP4, (1, _GROUP), is_transposed=True),
            codes,
            scales,
        )
