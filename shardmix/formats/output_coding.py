"""The codings that an output's matrices can be written in: codes, and a scale for each block. Pure.

A coding knows one block's scale and one element's code; bands of blocks (`matrices`), and the
pieces of them that are in memory, are the same for all.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from shardmix.formats.matrices import Bands, num_blocks, rectangles
from shardmix.formats.small_floats import Bytes, Floats

PIECE_NUM_ELEMENTS = 1 << 16
"""The most elements that are coded at once: their scratch stays in the caches."""
SCRATCH_NBYTES = 16 * PIECE_NUM_ELEMENTS
"""Memory of a quantiser: of each element of a piece four words of 32 bits."""


class OutputCoding(Protocol):
    """A way to store matrices as codes of one byte and scales of blocks."""

    code_dtype: str
    """Safetensors dtype of the codes."""
    scale_dtype: str
    """Safetensors dtype of the scales; 32 bits."""
    block: tuple[int, int]
    """Rows and columns of a block."""

    def scales(self, largest: Floats) -> Floats:
        """Return the scales of blocks, from the largest finite magnitude in each."""

    def encode(self, values: Floats, factors: Floats, out: Bytes, scratch: Floats) -> None:
        """Fill `out` with the codes of values (rows × columns) over the columns' scales.

        `out` may lie in the memory of the values, if not behind their start. The `scratch`, three
        rows of as many elements, is changed.
        """

    def compiled(self) -> "Encode":
        """Return `encode` as machine code of the same bits; llvmlite must be there."""


Encode = Callable[[Floats, Floats, Bytes, Floats], None]
"""`OutputCoding.encode`."""


class Quantiser:
    """Codes the values of bands for one worker."""

    def __init__(self, coding: OutputCoding, *, is_compiled: bool = False) -> None:
        self._encode = coding.compiled() if is_compiled else coding.encode
        self._scratch = np.empty((3, PIECE_NUM_ELEMENTS), np.float32)

    def find_largest(
        self, bands: Bands, start: int, values: Floats, largest: Floats, *, is_finite: bool
    ) -> None:
        """Raise `largest` to the largest finite magnitude in each block of a band.

        Args:
            bands: the tensor's bands.
            start: the first element; all lie in one band.
            values: the elements' values.
            largest: one entry for each block of the band; changed in place.
            is_finite: True if no value is NaN or infinite.
        """
        width = bands.block[1]
        at = 0
        for piece in rectangles(start, start + len(values), bands.columns, PIECE_NUM_ELEMENTS):
            part = piece.of(values, at)
            magnitudes = piece.of(self._scratch[0])
            np.abs(part, out=magnitudes)
            if not is_finite:
                magnitudes[~np.isfinite(magnitudes)] = 0
            by_column = np.maximum.reduce(magnitudes, axis=0)
            first = piece.first_column // width
            skipped = piece.first_column % width
            starts = np.arange(0, skipped + len(by_column), width) - skipped
            starts[0] = 0
            found = np.maximum.reduceat(by_column, starts)
            target = largest[first : first + len(found)]
            np.maximum(target, found, out=target)
            at += piece.num_elements

    def encode(self, bands: Bands, start: int, values: Floats, scales: Floats, out: Bytes) -> None:
        """Fill `out` with the codes of elements from `start` on, which lie in one band.

        `scales` are the band's. `out` may lie in the memory of `values`, if not behind its start.
        """
        width = bands.block[1]
        at = 0
        for piece in rectangles(start, start + len(values), bands.columns, PIECE_NUM_ELEMENTS):
            first, skipped = divmod(piece.first_column, width)
            stop = num_blocks(piece.first_column + piece.num_columns, width)
            factors = np.repeat(scales[first:stop], width)[skipped : skipped + piece.num_columns]
            stop_at = at + piece.num_elements
            scratch = self._scratch[:, : piece.num_elements]
            self._encode(piece.of(values, at), factors, out[at:stop_at], scratch)
            at = stop_at
