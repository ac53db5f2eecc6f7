"""How many elements a chunk holds."""

from shardmix.dtypes import element_nbytes
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import AGREE, Segment
from shardmix.system.buffers import PAGE_NBYTES

AGREE_CHUNK_NBYTES = 1 << 16  # integers are few: small buffers do
_SUM_NBYTES = 4
VECTOR = 64
"""Elements that kernels take at once: a chunk of whole ones leaves no rest."""


def chunk_num_elements(segment: Segment, *, chunk_nbytes: int) -> int:
    """Return how many elements of a segment one chunk holds, at least one."""
    widths = [element_nbytes(dtype) for dtype in (*segment.dtypes, segment.out_dtype)]
    if segment.reduction == AGREE:
        return max(1, min(chunk_nbytes, AGREE_CHUNK_NBYTES) // max(widths))
    # Sums are at least float32. All sources, the sum and the output fit into the buffers at once.
    at_once = BUFFERS_PER_WORKER * chunk_nbytes // (sum(widths) + _SUM_NBYTES)
    num_elements = max(1, min(chunk_nbytes // max(*widths, _SUM_NBYTES), at_once))
    # As many elements as a page has bytes: then all chunks of a segment lie alike within pages.
    for whole in (PAGE_NBYTES, VECTOR):
        if num_elements > whole:
            return num_elements - num_elements % whole
    return num_elements
