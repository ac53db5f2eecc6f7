"""How many elements a strip holds."""

from shardmix.formats.safetensors_layout import element_nbytes
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import AGREE, Run
from shardmix.system.buffers import PAGE_NBYTES

AGREE_STRIP_NBYTES = 1 << 16  # integers are few: small buffers do
_SUM_NBYTES = 4
VECTOR = 64
"""Elements that kernels take at once: a strip of whole ones leaves no rest."""


def strip_num_elements(run: Run, *, strip_nbytes: int) -> int:
    """Return how many elements of a run one strip holds, at least one."""
    widths = [element_nbytes(dtype) for dtype in (*run.dtypes, run.out_dtype)]
    if run.reduction == AGREE:
        return max(1, min(strip_nbytes, AGREE_STRIP_NBYTES) // max(widths))
    # Sums are at least float32. All sources, the sum and the output fit into the buffers at once.
    at_once = BUFFERS_PER_WORKER * strip_nbytes // (sum(widths) + _SUM_NBYTES)
    num_elements = max(1, min(strip_nbytes // max(*widths, _SUM_NBYTES), at_once))
    # As many elements as a page has bytes: then all strips of a run lie alike within pages.
    for whole in (PAGE_NBYTES, VECTOR):
        if num_elements > whole:
            return num_elements - num_elements % whole
    return num_elements
