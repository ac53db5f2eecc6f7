"""Reads quantised tensors as float32, piece by piece, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPES, element_nbytes
from shardmix.errors import SourceError
from shardmix.formats.coded_tensors import (
    Coding,
    apply_scales,
    scale_values,
    spread,
    subtract_zeros,
    unpack_rows,
    with_tensor_scale,
)
from shardmix.formats.matrices import WHOLE, Matrices, rectangles
from shardmix.formats.small_floats import Bytes, Floats, decode, exponents
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import Source
from shardmix.system.units import KIB, MIB

PIECE_NUM_ELEMENTS = 32 * KIB
"""Elements that are decoded at once: codes, indexes and values stay in a core's own cache."""
PIECE_NBYTES = 2 * MIB
"""Memory of one piece: codes, indexes into a table (8 bytes), values, scales."""
EXPERTS_NBYTES = 32 * MIB
"""The most bytes of a transposed matrix that are held: a row of the tensor is in all of its rows.

An expert of gpt-oss has 8 MiB. A larger one is read in parts, again for each request.
"""
_HELD = 2  # of one tensor: codes, and scales
_WORD_ROWS = 32


class SideRows(NamedTuple):
    """For each tensor, the rows of the inner source's tensors that store it; -1 for none."""

    codings: npt.NDArray[np.uint16]
    """Index into the source's codings; without meaning for tensors that are stored as they are."""
    codes: npt.NDArray[np.int32]
    """Its codes, or the tensor itself."""
    scales: npt.NDArray[np.int32]
    """Its scales."""
    tensor_scales: npt.NDArray[np.int32]
    """The scale of the whole tensor."""
    zeros: npt.NDArray[np.int32]
    """Its zero points."""
    orders: npt.NDArray[np.int32]
    """The groups that its columns belong to."""


class _Piece(NamedTuple):
    """Rows of one matrix and a range of their columns."""

    matrix: int
    first_row: int
    num_rows: int
    first_column: int
    num_columns: int


class QuantisedReader:
    """Decodes tensors of one source for one worker; a `TensorReader`."""

    def __init__(
        self,
        inner: Source,
        tensors: TensorTable,
        codings: tuple[Coding, ...],
        rows: SideRows,
        overhead_nbytes: int,
    ) -> None:
        self._stored = inner.tensors
        self._inner = inner.open_reader()
        self._tensors = tensors
        self._codings = codings
        self._rows = rows
        self._own_nbytes = overhead_nbytes
        self._last: tuple[object, Floats] = None, np.empty((0, 0), np.float32)
        """Blocks and columns of the last piece, and their factors: many pieces share blocks."""
        self._held: dict[int, tuple[int, Bytes]] = {}
        """Row of stored codes or scales of experts → number and bytes of the matrix held."""

    @property
    def overhead_nbytes(self) -> int:
        """Memory of decoding, and of the inner reader."""
        return self._own_nbytes + self._inner.overhead_nbytes

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        if self._rows.scales[row] < 0:
            self._inner.read(int(self._rows.codes[row]), start, into)
            return
        out = np.frombuffer(into, np.float32)
        coding = self._codings[self._rows.codings[row]]
        if coding.is_transposed:
            self._read_transposed(row, coding, start, out)
            return
        matrices = Matrices.of(self._tensors.shapes[row])
        done = 0
        for piece in _pieces(matrices, start, start + len(out)):
            stop = done + piece.num_rows * piece.num_columns
            values = out[done:stop].reshape(piece.num_rows, piece.num_columns)
            self._read_codes(row, coding, matrices, piece, values)
            self._scale(row, coding, matrices, piece, values)
            done = stop

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Let the system read codes ahead."""
        codes = int(self._rows.codes[row])
        if self._rows.scales[row] < 0:
            self._inner.prefetch(codes, start, num_elements)
            return
        coding = self._codings[self._rows.codings[row]]
        if not coding.is_transposed:
            # Nearly so: rows of packed integers may end in bits that nobody uses.
            bits = 8 * self._width(codes)
            first = start * coding.code.bits // bits
            stop = -(-(start + num_elements) * coding.code.bits // bits)
            stop = min(stop, int(self._stored.nbytes[codes]) // self._width(codes))
            if first < stop:
                self._inner.prefetch(codes, first, stop - first)

    def close(self) -> None:
        """Close files and free memory."""
        self._held.clear()
        self._last = None, np.empty((0, 0), np.float32)
        self._inner.close()

    def _width(self, stored_row: int) -> int:
        return element_nbytes(DTYPES[self._stored.dtype_ranks[stored_row]])

    def _bytes(self, stored_row: int, start: int, nbytes: int) -> Bytes:
        """Return bytes of a stored tensor; both are multiples of its elements."""
        data = np.empty(nbytes, np.uint8)
        if nbytes:
            self._inner.read(stored_row, start // self._width(stored_row), data.data)
        return data

    def _read_codes(
        self, row: int, coding: Coding, matrices: Matrices, piece: _Piece, out: Floats
    ) -> None:
        code, codes = coding.code, int(self._rows.codes[row])
        row_nbytes = code.row_nbytes(matrices.columns)
        skipped = piece.first_column % code.aligned
        first = code.row_nbytes(piece.first_column - skipped)
        # Either the rows are whole, or there is one.
        stop = code.row_nbytes(piece.first_column + piece.num_columns)
        length = row_nbytes if piece.num_rows > 1 else stop - first
        position = (piece.matrix * matrices.rows + piece.first_row) * row_nbytes + first
        stored = self._bytes(codes, position, piece.num_rows * length)
        stored = stored.reshape(piece.num_rows, length)
        if not skipped:
            decode(code, stored, out)
            return
        wider = np.empty((1, skipped + piece.num_columns), np.float32)
        decode(code, stored, wider)
        out[:] = wider[:, skipped:]

    def _scale(
        self, row: int, coding: Coding, matrices: Matrices, piece: _Piece, out: Floats
    ) -> None:
        scales, zeros = int(self._rows.scales[row]), int(self._rows.zeros[row])
        order = int(self._rows.orders[row])
        block = coding.block
        is_shared = block[0] != 1 and zeros < 0 and order < 0
        blocks = _touched(block[0], piece.first_row, piece.num_rows)
        place = row, piece.matrix, blocks, piece.first_column, piece.num_columns
        if is_shared and self._last[0] == place:
            apply_scales(out, self._last[1], block[0], piece.first_row)
            return
        columns = None
        if order >= 0:
            columns = self._groups_of_columns(order, row, piece, matrices.grid(block)[1])
        factors = self._grid(scales, matrices, coding, piece, whole_rows=columns is not None)
        tensor_scale = int(self._rows.tensor_scales[row])
        if tensor_scale >= 0:
            factors = with_tensor_scale(coding, factors, self._values(tensor_scale, 0, 1))
        if zeros >= 0:
            points = (
                self._packed_zeros(zeros, matrices, coding, piece, whole_rows=columns is not None)
                if coding.zero_bits
                else self._grid(zeros, matrices, coding, piece, whole_rows=columns is not None)
            )
            subtract_zeros(
                out, _of_columns(points, block, piece, columns), block[0], piece.first_row
            )
        factors = _of_columns(factors, block, piece, columns)
        apply_scales(out, factors, block[0], piece.first_row)
        if is_shared:
            self._last = place, factors

    def _values(self, stored_row: int, start: int, count: int) -> Floats:
        width = self._width(stored_row)
        dtype = DTYPES[self._stored.dtype_ranks[stored_row]]
        return scale_values(dtype, self._bytes(stored_row, start * width, count * width))

    def _grid(
        self,
        stored_row: int,
        matrices: Matrices,
        coding: Coding,
        piece: _Piece,
        *,
        whole_rows: bool,
    ) -> Floats:
        """Return the scales, or zero points, of the blocks that a piece touches."""
        if int(self._stored.nbytes[stored_row]) == self._width(stored_row):
            return self._values(stored_row, 0, 1).reshape(1, 1)
        rows, columns = matrices.grid(coding.block)
        first, stop = _touched(coding.block[0], piece.first_row, piece.num_rows)
        left, right = _touched(coding.block[1], piece.first_column, piece.num_columns)
        if whole_rows or stop - first > 1:
            left, right = 0, columns
        start = (piece.matrix * rows + first) * columns + left
        values = self._values(stored_row, start, (stop - first - 1) * columns + right - left)
        return values.reshape(stop - first, right - left)

    def _packed_zeros(
        self,
        stored_row: int,
        matrices: Matrices,
        coding: Coding,
        piece: _Piece,
        *,
        whole_rows: bool,
    ) -> Floats:
        """Return zero points of a piece's rows, which are packed along the rows."""
        _, columns = matrices.grid(coding.block)
        bits = coding.zero_bits
        num_words = coding.code.row_nbytes(matrices.rows) // 4
        skipped = piece.first_row % _WORD_ROWS
        first = (piece.first_row - skipped) // _WORD_ROWS * bits
        stop = coding.code.row_nbytes(piece.first_row + piece.num_rows) // 4
        start = (piece.matrix * num_words + first) * columns * 4
        stored = self._bytes(stored_row, start, (stop - first) * columns * 4)
        words = stored.view(np.int32).reshape(stop - first, columns)
        if not whole_rows:
            left, right = _touched(coding.block[1], piece.first_column, piece.num_columns)
            words = words[:, left:right]
        return unpack_rows(bits, words, skipped, piece.num_rows)

    def _groups_of_columns(
        self, stored_row: int, row: int, piece: _Piece, num_groups: int
    ) -> npt.NDArray[np.int64] | None:
        """Return the group of each column; None if the columns are in order."""
        width = self._width(stored_row)
        data = self._bytes(stored_row, piece.first_column * width, piece.num_columns * width)
        groups = data.view(np.int64 if width == 8 else np.int32).astype(np.int64)
        if (groups == -1).all():  # never filled
            return None
        if groups.min() < 0 or groups.max() >= num_groups:
            raise SourceError(
                f"{self._stored.names[stored_row]} names groups of {self._tensors.names[row]} that "
                f"are not there; it has {num_groups}",
                remedy="fetch the checkpoint again, or merge the unquantised one",
            )
        return groups

    def _read_transposed(self, row: int, coding: Coding, start: int, out: Floats) -> None:
        """Fill `out` from codes that lie column by column."""
        shape = self._tensors.shapes[row]
        stored = Matrices(shape[0], shape[2], shape[1])
        group = coding.block[1]
        done = 0
        while done < len(out):
            matrix, element = divmod(start + done, stored.rows * stored.columns)
            column, skipped = divmod(element, stored.rows)
            # The rest of a group of the tensor's rows: as stored, of columns.
            num_columns = group - column % group
            count = min(num_columns * stored.rows - skipped, len(out) - done)
            self._read_group(row, coding, stored, matrix, column, skipped, out[done : done + count])
            done += count

    def _read_group(
        self,
        row: int,
        coding: Coding,
        stored: Matrices,
        matrix: int,
        column: int,
        skipped: int,
        out: Floats,
    ) -> None:
        """Fill `out` from one group of stored columns, from an element of the first one on."""
        codes, scales = int(self._rows.codes[row]), int(self._rows.scales[row])
        group = coding.block[1]
        number, first = divmod(column, group)
        _, num_groups = stored.grid(coding.block)
        row_nbytes = coding.code.row_nbytes(stored.columns)
        nbytes = coding.code.row_nbytes(group)
        step = max(1, PIECE_NUM_ELEMENTS // group)
        num_columns = -(-(skipped + len(out)) // stored.rows)
        is_whole = not skipped and num_columns * stored.rows == len(out)
        target = out.reshape(num_columns, stored.rows) if is_whole else None
        for start in range(0, stored.rows, step):
            num_rows = min(step, stored.rows - start)
            part = self._expert_rows(codes, matrix, start, num_rows, stored.rows, row_nbytes)
            exponents_of = self._expert_rows(
                scales, matrix, start, num_rows, stored.rows, num_groups
            )
            values = np.empty((num_rows, group), np.float32)
            decode(coding.code, part[:, number * nbytes : (number + 1) * nbytes], values)
            apply_scales(values, exponents(exponents_of[:, number : number + 1]), 1, 0)
            wanted = values[:, first : first + num_columns].T
            if target is not None:
                target[:, start : start + num_rows] = wanted
                continue
            for index in range(num_columns):  # of a request that ends within a row
                low = index * stored.rows + start - skipped
                left, right = max(low, 0), min(low + num_rows, len(out))
                if left < right:
                    out[left:right] = wanted[index, left - low : right - low]

    def _expert_rows(
        self, stored_row: int, matrix: int, start: int, num_rows: int, rows: int, row_nbytes: int
    ) -> Bytes:
        """Return rows of a matrix of codes or of scales, held as a whole if it is small enough."""
        position = matrix * rows * row_nbytes
        if rows * row_nbytes > EXPERTS_NBYTES:
            data = self._bytes(stored_row, position + start * row_nbytes, num_rows * row_nbytes)
            return data.reshape(num_rows, row_nbytes)
        held = self._held.get(stored_row)
        if held is None or held[0] != matrix:
            del held
            if stored_row not in self._held and len(self._held) == _HELD:
                self._held.clear()
            self._held.pop(stored_row, None)
            held = matrix, self._bytes(stored_row, position, rows * row_nbytes)
            self._held[stored_row] = held
        return held[1].reshape(rows, row_nbytes)[start : start + num_rows]


def _pieces(matrices: Matrices, start: int, stop: int) -> Iterator[_Piece]:
    """Divide a range of elements into pieces of one matrix each."""
    size = matrices.rows * matrices.columns
    while start < stop:
        matrix, begin = divmod(start, size)
        end = min(size, begin + stop - start)
        for part in rectangles(begin, end, matrices.columns, PIECE_NUM_ELEMENTS):
            yield _Piece(matrix, *part)
        start += end - begin


def _touched(block: int, first: int, count: int) -> tuple[int, int]:
    """Return the first block, and one past the last, that a range of an axis touches."""
    return (0, 1) if block == WHOLE else (first // block, -(-(first + count) // block))


def _of_columns(
    grid: Floats, block: tuple[int, int], piece: _Piece, groups: npt.NDArray[np.int64] | None
) -> Floats:
    """Return the value of each column of a piece."""
    if groups is not None:
        return grid[:, groups]
    return spread(grid, block[1], piece.first_column, piece.num_columns)
