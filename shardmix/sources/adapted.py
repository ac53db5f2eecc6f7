"""A base model with a LoRA adapter applied while it is read.

Tensors that the adapter leaves alone stay extents of the base's files. All others are decoded: the
reader reads a piece of W, and adds scaling · B·A to it in float32 (float64 if W is), as
`sources.low_rank` says; DoRA then scales each row or column. Nothing is rounded to 16 bits on the
way: that is done once, when the merged values are written.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPE_RANK, DTYPES, WIDE_DTYPES, element_nbytes, tensor_nbytes
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.adapters import (
    ONES,
    Adapter,
    Change,
    Patch,
    View,
    base_warning,
    changes_of,
)
from shardmix.sources.base import Source, TensorReader, WrappedSource
from shardmix.sources.identity import AppliedAdapter, SourceIdentity
from shardmix.sources.low_rank import Floats, Stored, add_product, stored, widened

_PIECE_NUM_ELEMENTS = 1 << 17
"""Elements of W that are changed at once: with their matrices they fit into a core's cache."""
_MOST_CACHED_NBYTES = 8 << 20
_MOST_RIGHT_NBYTES = 16 << 20
_DECODING = "LoRA: W + scaling · B·A, in order of rank"


class AdaptedSource(WrappedSource):
    """A base with an adapter applied."""

    def __init__(self, base: Source, adapter: Adapter, text: str) -> None:
        self._adapter = adapter
        self._changes = changes_of(adapter, base)
        self._text = text
        super().__init__(base, _changed_table(base, adapter, self._changes))

    @property
    def base(self) -> Source:
        """The source that the adapter is applied to."""
        return self._inner

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self._adapter

    @property
    def text(self) -> str:
        """Base and adapter as the user named them."""
        return self._text

    @cached_property
    def identity(self) -> SourceIdentity:
        """Files of the base, then those of the adapter."""
        inner, own = self._inner.identity, self._adapter
        applied = AppliedAdapter(own.name, str(own.folder.absolute()), own.hub_id, own.commit)
        return replace(
            inner,
            files=(*inner.files, *own.files),
            decoding="; ".join(filter(None, (inner.decoding, _DECODING))),
            adapters=(*inner.adapters, applied),
        )

    @property
    def public_name(self) -> str:
        """Public names of base and adapter."""
        return f"{self._inner.public_name}+{self._adapter.name}"

    @property
    def path(self) -> str:
        """Paths of base and adapter, or their Hub ids with commits, which open them again."""
        inner, own = self._inner, self._adapter
        base = inner.path
        if not isinstance(inner, AdaptedSource):
            base = _location(inner.identity.hub_id, inner.identity.commit, base)
        return f"{base}+{_location(own.hub_id, own.commit, str(own.folder.absolute()))}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of the base, and of the adapter's origin and config."""
        warning = base_warning(self._adapter, self._inner)
        own = [f"{self._adapter.text}: {note}" for note in self._adapter.config.notes]
        return (*self._inner.warnings, *([warning] if warning else []), *own)

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker."""
        return _AdaptedReader(self._inner, self._adapter, self._changes, self._tensors.dtype_ranks)

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if base or adapter changed."""
        super().check_unchanged()
        self.identity.check_unchanged()


def _location(hub_id: str | None, commit: str | None, path: str) -> str:
    """Return a Hub id and commit, or the path of what is local."""
    return path if hub_id is None or commit is None else f"{hub_id}@{commit}"


def _changed_table(base: Source, adapter: Adapter, changes: dict[int, Change]) -> TensorTable:
    """Return the base's tensors, with those that are changed in the dtype of the sum."""
    table, own = base.tensors, adapter.weights.tensors
    ranks, nbytes = table.dtype_ranks.copy(), table.nbytes.copy()
    kept = table.dtype_ranks if table.kept_ranks is None else table.kept_ranks
    for row, change in changes.items():
        dtype = DTYPES[table.dtype_ranks[row]]
        if change.value is not None:
            dtype = DTYPES[own.dtype_ranks[change.value]]
        if not change.is_value:
            dtype = "F64" if dtype in WIDE_DTYPES else "F32"
        ranks[row] = DTYPE_RANK[dtype]
        nbytes[row] = tensor_nbytes(dtype, table.shapes[row])
    wide = replace(table, dtype_ranks=ranks, nbytes=nbytes, kept_ranks=kept)
    return wide.with_decoded(sorted(changes))


class _Rectangle(NamedTuple):
    """Elements that follow one another: whole rows, or a part of one."""

    first_row: int
    num_rows: int
    first_column: int
    num_columns: int

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.num_columns


def _rectangles(start: int, stop: int, width: int) -> Iterator[_Rectangle]:
    """Divide elements of a matrix with rows of this width into pieces."""
    most_rows = max(1, _PIECE_NUM_ELEMENTS // width)
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width or width > _PIECE_NUM_ELEMENTS:
            count = min(width - column, stop - start, _PIECE_NUM_ELEMENTS)
            yield _Rectangle(row, 1, column, count)
        else:
            num_rows = min((stop - start) // width, most_rows)
            count = num_rows * width
            yield _Rectangle(row, num_rows, 0, width)
        start += count


class _AdaptedReader:
    """Reads a base's tensors with the changes of an adapter; a `TensorReader`."""

    def __init__(
        self,
        base: Source,
        adapter: Adapter,
        changes: dict[int, Change],
        dtype_ranks: npt.NDArray[np.uint8],
    ) -> None:
        self._base = base.open_reader()
        self._tensors = base.tensors
        self._values = adapter.weights.open_reader()
        self._own = adapter.weights.tensors
        self._changes = changes
        self._dtype_ranks = dtype_ranks
        patches = [patch for change in changes.values() for patch in change.patches]
        raw = max((self._raw_nbytes(patch) for patch in patches), default=0)
        self._matrices = _Matrices(self._values, self._own, min(raw, _MOST_CACHED_NBYTES))
        self._right: tuple[object, Floats] | None = None
        self._scratch: dict[str, bytearray] = {}
        self._factors: OrderedDict[tuple[int, int], Floats] = OrderedDict()
        self.overhead_nbytes = self._overhead_nbytes(patches)

    def _raw_nbytes(self, patch: Patch) -> int:
        rows = {view.tensor for view in (patch.left, patch.right)} - {ONES}
        return sum(int(self._own.nbytes[row]) for row in rows)

    def _overhead_nbytes(self, patches: Sequence[Patch]) -> int:
        """Return the memory of all that a reader holds or makes, at most."""
        widths = [change.num_columns for change in self._changes.values()]
        wide = max(
            (element_nbytes(DTYPES[self._dtype_ranks[row]]) for row in self._changes), default=4
        )
        pieces = 4 * wide + 8  # raw elements, product, sum, widened; and for norms in float64
        right = max((patch.rank for patch in patches), default=0) * max(widths, default=0) * wide
        norms = max(
            (
                2 * 8 * change.num_columns
                for change in self._changes.values()
                if change.magnitude is not None and change.is_by_column
            ),
            default=0,
        )
        return (
            self._base.overhead_nbytes
            + pieces * _PIECE_NUM_ELEMENTS
            + 2 * min(right, _MOST_RIGHT_NBYTES)
            + 2 * self._matrices.capacity_nbytes
            + norms
        )

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        change = self._changes.get(row)
        if change is None:
            self._base.read(row, start, into)
            return
        if change.is_value and change.value is not None:
            self._values.read(change.value, start, into)
            return
        wide = np.float64 if DTYPES[self._dtype_ranks[row]] in WIDE_DTYPES else np.float32
        out = np.frombuffer(into, wide)
        at = 0
        for part in _rectangles(start, start + len(out), change.num_columns):
            piece = out[at : at + part.num_elements].reshape(part.num_rows, part.num_columns)
            self._sum(row, change, part, piece)
            if change.magnitude is not None:
                self._scale(row, change, part, piece)
            if change.tokens is not None:
                self._replace_rows(change, change.tokens, part, piece)
            at += part.num_elements

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon."""
        change = self._changes.get(row)
        if change is None or change.value is None:
            self._base.prefetch(row, start, num_elements)
        else:
            self._values.prefetch(change.value, start, num_elements)

    def close(self) -> None:
        """Close all files."""
        with ExitStack() as stack:
            stack.callback(self._base.close)
            stack.callback(self._values.close)

    # W + scaling · left·right.

    def _sum(self, row: int, change: Change, part: _Rectangle, out: Floats) -> None:
        """Set a piece to the sum of W and all low-rank changes."""
        values, dtype = self._weights(row, change, part)
        done = part.first_row
        for patch in _overlapping(change.patches, part):
            first = max(patch.first_row, part.first_row)
            stop = min(patch.first_row + patch.num_rows, part.first_row + part.num_rows)
            if done < first:
                rows = slice(done - part.first_row, first - part.first_row)
                out[rows] = widened(values[rows], dtype, out.dtype)
            rows = slice(first - part.first_row, stop - part.first_row)
            left = self._matrices.read(
                patch.left, first - patch.first_row, stop - first, 0, patch.rank, out.dtype
            )
            step = max(1, _MOST_RIGHT_NBYTES // (patch.rank * out.dtype.itemsize))
            for column in range(0, part.num_columns, step):
                columns = slice(column, min(column + step, part.num_columns))
                right = self._right_of(patch, part, columns, change.num_columns, out.dtype)
                add_product(
                    values[rows, columns], dtype, out[rows, columns], left, right, patch.scaling
                )
            done = stop
        if done < part.first_row + part.num_rows:
            rows = slice(done - part.first_row, part.num_rows)
            out[rows] = widened(values[rows], dtype, out.dtype)

    def _weights(self, row: int, change: Change, part: _Rectangle) -> tuple[Stored, str]:
        """Read a piece of W as it is stored; return it, and its dtype."""
        reader, tensors, number = self._base, self._tensors, row
        if change.value is not None:
            reader, tensors, number = self._values, self._own, change.value
        dtype = DTYPES[tensors.dtype_ranks[number]]
        nbytes = part.num_elements * element_nbytes(dtype)
        if len(self._scratch.get(dtype, ())) < nbytes:
            self._scratch[dtype] = bytearray(nbytes)
        raw = memoryview(self._scratch[dtype])[:nbytes]
        reader.read(number, part.first_row * change.num_columns + part.first_column, raw)
        return stored(raw, dtype).reshape(part.num_rows, part.num_columns), dtype

    def _right_of(
        self,
        patch: Patch,
        part: _Rectangle,
        columns: slice,
        width: int,
        dtype: npt.DTypeLike,
    ) -> Floats:
        """Return columns of a patch's right matrix; whole, it is kept for the next pieces."""
        first, count = part.first_column + columns.start, columns.stop - columns.start
        if patch.rank * width * np.dtype(dtype).itemsize > _MOST_RIGHT_NBYTES:
            return self._matrices.read(patch.right, 0, patch.rank, first, count, dtype)
        key = patch.right, patch.rank, width, dtype
        if self._right is None or self._right[0] != key:
            self._right = None  # before the next one takes memory
            whole = self._matrices.read(patch.right, 0, patch.rank, 0, width, dtype)
            self._right = key, whole
        return self._right[1][:, first : first + count]

    # DoRA.

    def _scale(self, row: int, change: Change, part: _Rectangle, out: Floats) -> None:
        """Multiply a piece by the factors of its rows or columns."""
        with np.errstate(over="ignore", invalid="ignore"):
            if change.is_by_column:
                first = part.first_column
                out *= self._column_factors(row, change, out.dtype)[first : first + out.shape[1]]
                return
            step = _block_rows(change)
            for block in range(part.first_row // step, -(-(part.first_row + len(out)) // step)):
                factors = self._row_factors(row, change, block, out.dtype)
                first = max(block * step, part.first_row)
                stop = min((block + 1) * step, part.first_row + len(out))
                of_block = slice(first - block * step, stop - block * step)
                out[first - part.first_row : stop - part.first_row] *= factors[of_block, None]

    def _row_factors(self, row: int, change: Change, block: int, dtype: npt.DTypeLike) -> Floats:
        """Return magnitude / norm of each row of a block: norms in float64, over whole rows."""
        key = row, block
        if key not in self._factors:
            step, width = _block_rows(change), change.num_columns
            first = block * step
            count = min(step, self._tensors[row].num_elements // width - first)
            norms = np.zeros(count)
            for part in _rectangles(first * width, (first + count) * width, width):
                rows = slice(part.first_row - first, part.first_row - first + part.num_rows)
                norms[rows] += np.add.reduce(self._squares(row, change, part, dtype), axis=1)
            self._keep_factors(key, change, norms, first, dtype)
        return self._factors[key]

    def _column_factors(self, row: int, change: Change, dtype: npt.DTypeLike) -> Floats:
        """Return magnitude / norm of each column, in one pass over the whole tensor."""
        key = row, -1
        if key not in self._factors:
            norms = np.zeros(change.num_columns)
            for part in _rectangles(0, self._tensors[row].num_elements, change.num_columns):
                columns = slice(part.first_column, part.first_column + part.num_columns)
                norms[columns] += np.add.reduce(self._squares(row, change, part, dtype), axis=0)
            self._keep_factors(key, change, norms, 0, dtype)
        return self._factors[key]

    def _squares(
        self, row: int, change: Change, part: _Rectangle, dtype: npt.DTypeLike
    ) -> npt.NDArray[np.float64]:
        values = np.empty((part.num_rows, part.num_columns), dtype)
        self._sum(row, change, part, values)
        squares: npt.NDArray[np.float64] = np.square(values, dtype=np.float64)
        return squares

    def _keep_factors(
        self,
        key: tuple[int, int],
        change: Change,
        norms: npt.NDArray[np.float64],
        first: int,
        dtype: npt.DTypeLike,
    ) -> None:
        if change.magnitude is None:
            raise AssertionError("no magnitudes")
        view = View(change.magnitude, 0, 0, 1)
        magnitudes = self._matrices.read(view, 0, 1, first, len(norms), np.float64)[0]
        with np.errstate(divide="ignore", invalid="ignore"):
            self._factors[key] = (magnitudes / np.sqrt(norms)).astype(dtype)
        while len(self._factors) > 2:  # those of a chunk's two ends
            self._factors.popitem(last=False)

    # Rows of embeddings.

    def _replace_rows(self, change: Change, tokens: int, part: _Rectangle, out: Floats) -> None:
        for number, row in enumerate(change.token_rows):
            if part.first_row <= row < part.first_row + part.num_rows:
                view = View(tokens, number * change.num_columns, 0, 1)
                out[row - part.first_row] = self._matrices.read(
                    view, 0, 1, part.first_column, part.num_columns, out.dtype
                )[0]


def _block_rows(change: Change) -> int:
    """Return the number of rows whose norms are computed together."""
    return max(1, _PIECE_NUM_ELEMENTS // change.num_columns)


def _overlapping(patches: Sequence[Patch], part: _Rectangle) -> Iterator[Patch]:
    """Yield the patches that change some of a piece's rows."""
    for patch in patches:
        if patch.first_row >= part.first_row + part.num_rows:
            return
        if patch.first_row + patch.num_rows > part.first_row:
            yield patch


class _Matrices:
    """Reads matrices within an adapter's tensors, and keeps the tensors read last, if small."""

    def __init__(self, reader: TensorReader, tensors: TensorTable, capacity_nbytes: int) -> None:
        self._reader, self._tensors = reader, tensors
        self.capacity_nbytes = capacity_nbytes
        self._kept: OrderedDict[int, Stored] = OrderedDict()

    def read(
        self,
        view: View,
        first_row: int,
        num_rows: int,
        first_column: int,
        num_columns: int,
        dtype: npt.DTypeLike,
    ) -> Floats:
        """Return a part of a matrix, contiguous, in float32 or float64."""
        if view.tensor == ONES:
            return np.ones((num_rows, num_columns), dtype)
        name = DTYPES[self._tensors.dtype_ranks[view.tensor]]
        start = view.start + first_row * view.row_step + first_column * view.column_step
        whole = self._whole(view.tensor, name)
        if whole is not None:
            width = whole.itemsize
            strided = np.lib.stride_tricks.as_strided(
                whole[start:],
                (num_rows, num_columns),
                (view.row_step * width, view.column_step * width),
                writeable=False,
            )
            return widened(strided, name, dtype)
        # Along the smaller step, elements lie close together.
        if view.row_step < view.column_step:
            flipped = View(view.tensor, 0, view.column_step, view.row_step)
            return np.ascontiguousarray(
                self._by_rows(flipped, start, num_columns, num_rows, name, dtype).T
            )
        return self._by_rows(view, start, num_rows, num_columns, name, dtype)

    def _by_rows(
        self,
        view: View,
        start: int,
        num_rows: int,
        num_columns: int,
        name: str,
        dtype: npt.DTypeLike,
    ) -> Floats:
        found = np.empty((num_rows, num_columns), dtype)
        step = max(1, view.column_step)
        raw = bytearray(((num_columns - 1) * step + 1) * element_nbytes(name))
        for row in range(num_rows):
            self._reader.read(view.tensor, start + row * view.row_step, memoryview(raw))
            found[row] = widened(stored(memoryview(raw), name)[::step], name, dtype)
        return found

    def _whole(self, row: int, name: str) -> Stored | None:
        """Return a tensor as it is stored, if it is small enough to be kept."""
        nbytes = int(self._tensors.nbytes[row])
        if nbytes > self.capacity_nbytes:
            return None
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        while self._kept and sum(each.nbytes for each in self._kept.values()) + nbytes > (
            self.capacity_nbytes
        ):
            self._kept.popitem(last=False)
        raw = bytearray(nbytes)
        self._reader.read(row, 0, memoryview(raw))
        self._kept[row] = stored(memoryview(raw), name)
        return self._kept[row]
