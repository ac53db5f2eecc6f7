"""How many elements a chunk holds."""

from shardmix.dtypes import element_nbytes
from shardmix.methods import keep_first
from shardmix.methods.registry import merge_method
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import PAGE_NBYTES

KEEP_FIRST_CHUNK_NBYTES = 1 << 16  # integers are few: small buffers do
_SUM_NBYTES = 4
_WIDE_NBYTES = 8
VECTOR = 64
"""Elements that kernels take at once: a chunk of whole ones leaves no rest."""


def chunk_num_elements(segment: Segment, *, chunk_nbytes: int) -> int:
    """Return how many elements of a segment one chunk holds, at least one."""
    widths = [element_nbytes(dtype) for dtype in (*segment.dtypes, segment.out_dtype)]
    if segment.method == keep_first.NAME:
        return max(1, min(chunk_nbytes, KEEP_FIRST_CHUNK_NBYTES) // max(widths))
    if not merge_method(segment.method).is_weighted_sum:
        # One buffer is for what the method makes on the way.
        unrounded = _WIDE_NBYTES if "F64" in segment.dtypes else _SUM_NBYTES
        at_once = (BUFFERS_PER_WORKER - 1) * chunk_nbytes // (sum(widths) + unrounded)
        return _rounded(max(1, at_once))
    # Sums are at least float32. All sources, the sum and the output fit into the buffers at once.
    at_once = BUFFERS_PER_WORKER * chunk_nbytes // (sum(widths) + _SUM_NBYTES)
    num_elements = max(1, min(chunk_nbytes // max(*widths, _SUM_NBYTES), at_once))
    return _rounded(num_elements)


def _rounded(num_elements: int) -> int:
    """Return as many elements as a page has bytes, or as a vector holds, or some of these."""
    # By pages: then all chunks of a segment lie alike within them.
    for whole in (PAGE_NBYTES, VECTOR):
        if num_elements > whole:
            return num_elements - num_elements % whole
    return num_elements
