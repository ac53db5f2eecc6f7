"""The number of elements of a chunk."""

from functools import lru_cache

from shardmix.dtypes import WIDE_DTYPES, element_nbytes
from shardmix.methods import keep_first
from shardmix.methods.registry import merge_method
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import PAGE_NBYTES

KEEP_FIRST_CHUNK_NBYTES = 1 << 16  # small, since integers are few
_SUM_NBYTES = 4
_WIDE_NBYTES = 8
# One buffer is for the intermediate results of a method.
_METHOD_BUFFERS = BUFFERS_PER_WORKER - 1
VECTOR = 64
"""Elements that kernels process at once. A chunk is whole vectors, so that none is left over."""


def chunk_num_elements(segment: Segment, *, chunk_nbytes: int) -> int:
    """Return the number of elements of a segment in one chunk, at least one."""
    return _num_elements(segment.method, segment.dtypes, segment.out_dtype, chunk_nbytes)


@lru_cache(maxsize=1024)  # tensors are many, their kinds few
def _num_elements(method: str, dtypes: tuple[str, ...], out_dtype: str, chunk_nbytes: int) -> int:
    widths = [element_nbytes(dtype) for dtype in (*dtypes, out_dtype)]
    if method == keep_first.NAME:
        return max(1, min(chunk_nbytes, KEEP_FIRST_CHUNK_NBYTES) // max(widths))
    if not merge_method(method).is_weighted_sum:
        at_once = _METHOD_BUFFERS * chunk_nbytes // _method_nbytes(dtypes, out_dtype)
        return _rounded(max(1, at_once))
    # Sums are at least float32. All sources, the sum and the output fit into the buffers at
    # once.
    at_once = BUFFERS_PER_WORKER * chunk_nbytes // (sum(widths) + _SUM_NBYTES)
    num_elements = max(1, min(chunk_nbytes // max(*widths, _SUM_NBYTES), at_once))
    return _rounded(num_elements)


def whole_chunk_nbytes(segment: Segment) -> int:
    """Return the size of a chunk that holds a whole segment. Not for weighted sums."""
    return _holding(segment, segment.num_elements)


def band_chunk_nbytes(segment: Segment) -> int:
    """Return the size of a chunk that holds a band of a quantised segment."""
    assert segment.coded is not None
    return _holding(segment, segment.coded.bands.largest_num_elements)


def _holding(segment: Segment, num_elements: int) -> int:
    num_elements = -(-num_elements // PAGE_NBYTES) * PAGE_NBYTES
    element = _method_nbytes(segment.dtypes, segment.out_dtype)
    if merge_method(segment.method).is_weighted_sum:
        widest = max(_SUM_NBYTES, *map(element_nbytes, (*segment.dtypes, segment.out_dtype)))
        return max(num_elements * widest, -(-num_elements * element // BUFFERS_PER_WORKER))
    return -(-num_elements * element // _METHOD_BUFFERS)


def _method_nbytes(dtypes: tuple[str, ...], out_dtype: str) -> int:
    """Return the bytes of one element in all sources, in the output, and unrounded."""
    unrounded = _SUM_NBYTES if WIDE_DTYPES.isdisjoint(dtypes) else _WIDE_NBYTES
    return sum(map(element_nbytes, (*dtypes, out_dtype))) + unrounded


def _rounded(num_elements: int) -> int:
    """Round down to whole pages of elements, or to whole vectors, if there is at least one."""
    # By pages, so that all chunks of a segment have the same alignment.
    for whole in (PAGE_NBYTES, VECTOR):
        if num_elements > whole:
            return num_elements - num_elements % whole
    return num_elements
