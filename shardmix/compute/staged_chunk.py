"""A chunk's buffers on the CPU: every source's bytes, the output, and the unrounded result."""

from collections.abc import Sequence

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
        self._last: tuple[Segment | None, int, int] = None, 0, 0
        self.sources: Sequence[memoryview] = ()
        """Buffers that the sources' bytes are read into."""
        self.out = self.unrounded = memoryview(b"")
        """The output's bytes, and those of the result in the dtype that it is computed in."""

    def is_divided(self, segment: Segment, start: int, num_elements: int) -> bool:
        """Tell whether the buffer's parts are those of such a chunk; note it as the last one."""
        last = self._last
        # For elements of any size: equal offsets mean equal alignment of all parts.
        self._last = segment, start % PAGE_NBYTES, num_elements
        return last[0] is segment and last[1:] == self._last[1:]

    def divide(
        self, segment: Segment, start: int, num_elements: int, widths: Sequence[int]
    ) -> None:
        """Divide the buffer for a chunk.

        `widths` are the bytes of an element in each source, in the output, and unrounded.
        """
        offsets = [*[source.offset for source in segment.sources], segment.out_offset, 0]
        begins, end = [], 0
        for width, offset in zip(widths, offsets, strict=True):
            page = end + -end % PAGE_NBYTES
            begins.append(page + offset_in_page(offset + start * width))
            end = begins[-1] + num_elements * width
        if end > len(self._buffer):  # a few elements of very many sources
            self._buffer = buffer_of_pages(end)
        buffer = self._buffer
        *self.sources, self.out, self.unrounded = [
            buffer[begin : begin + num_elements * width]
            for begin, width in zip(begins, widths, strict=True)
        ]
