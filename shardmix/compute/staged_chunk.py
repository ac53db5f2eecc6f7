"""A chunk's buffers on the CPU: every source's bytes, the output, and the unrounded result."""

from collections.abc import Sequence

from shardmix.dtypes import element_nbytes
from shardmix.plan.memory_budget import BUFFERS_PER_WORKER
from shardmix.plan.merge_plan import Segment
from shardmix.system.buffers import PAGE_NBYTES, buffer_of_pages, offset_in_page

# Alignment within a page costs each part of a buffer up to this many more bytes.
_ALIGNING_NBYTES = 2 * PAGE_NBYTES


class StagedChunk:
    """One buffer, divided for each kind of chunk; parts have the alignment of their files."""

    def __init__(
        self, *, chunk_nbytes: int, num_buffers: int = BUFFERS_PER_WORKER, most_sources: int
    ) -> None:
        num_parts = most_sources + 2
        nbytes = num_buffers * chunk_nbytes + num_parts * _ALIGNING_NBYTES
        self._buffer = buffer_of_pages(nbytes)
        self._kind: tuple[Segment | None, int, int] = None, 0, 0
        self.sources: Sequence[memoryview] = ()
        """Buffers that the sources' bytes are read into."""
        self.out = self.unrounded = memoryview(b"")
        """The output's bytes, and those of the result in the dtype that it is computed in."""

    def divide(
        self, segment: Segment, start: int, num_elements: int, *, unrounded_nbytes: int
    ) -> bool:
        """Divide the buffer for a chunk; return True if the parts differ from the last chunk's."""
        # For elements of any size: equal offsets mean equal alignment of all parts.
        kind = segment, start % PAGE_NBYTES, num_elements
        if self._kind[0] is segment and self._kind[1:] == kind[1:]:
            return False
        self._kind = kind
        widths = [*map(element_nbytes, segment.dtypes), element_nbytes(segment.out_dtype)]
        offsets = [*(source.offset for source in segment.sources), segment.out_offset, 0]
        begins, end = [], 0
        for width, offset in zip((*widths, unrounded_nbytes), offsets, strict=True):
            page = end + -end % PAGE_NBYTES
            begins.append(page + offset_in_page(offset + start * width))
            end = begins[-1] + num_elements * width
        if end > len(self._buffer):  # a few elements of very many sources
            self._buffer = buffer_of_pages(end)
        *self.sources, self.out, self.unrounded = (
            self._buffer[begin : begin + num_elements * width]
            for begin, width in zip(begins, (*widths, unrounded_nbytes), strict=True)
        )
        return True
