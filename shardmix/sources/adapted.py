"""A base model with a LoRA adapter applied while it is read.

Tensors that the adapter leaves alone stay extents of the base's files. All others are decoded: the
reader reads a piece of W, and adds scaling · B·A to it in float32 (float64 if W is), as
`sources.low_rank` says; DoRA then scales each row or column. Nothing is rounded to 16 bits on the
way: that is done once, when the merged values are written.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import (
    DTYPE_RANK,
    DTYPES,
    FLOAT_DTYPES,
    WIDE_DTYPES,
    element_nbytes,
    tensor_nbytes,
)
from shardmix.formats.matrices import Rectangle, rectangles
from shardmix.formats.stored_floats import Floats, Stored, stored, widened
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.adapter_changes import ONES, Change, LowRankPair, Patch, View
from shardmix.sources.adapter_matching import matched
from shardmix.sources.adapters import Adapter, base_warning
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource
from shardmix.sources.identity import AppliedAdapter, SourceIdentity
from shardmix.sources.low_rank import add_product
from shardmix.sources.low_rank_kernel import kernel

_PIECE_NUM_ELEMENTS = 1 << 18
"""Elements of W that are changed at once: those of most chunks."""
_MOST_CACHED_NBYTES = 8 << 20
_MOST_KEPT_NBYTES = 16 << 20
_MOST_LEFT_NBYTES = 4 << 20
_DECODING = "LoRA: W + scaling · B·A, in order of rank"


class AdaptedSource(WrappedSource):
    """A base with an adapter applied."""

    def __init__(self, base: Source, adapter: Adapter, text: str) -> None:
        self._adapter = adapter
        found = matched(adapter, base)
        self._changes, self._pairs = found.changes, found.pairs
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
    def changes(self) -> Mapping[int, Change]:
        """Row of the table → what the adapter does to that tensor."""
        return self._changes

    @property
    def pairs(self) -> Sequence[LowRankPair]:
        """The adapter's matrices, as it stores them."""
        return self._pairs

    @property
    def text(self) -> str:
        """Base and adapter as the user named them."""
        return self._text

    @cached_property
    def identity(self) -> SourceIdentity:
        """Files of the base, then those of the adapter."""
        inner, own = self._inner.identity, self._adapter
        applied = AppliedAdapter(own.name, str(own.folder.absolute()), own.hub_id, own.commit)
        # By number: the folder of a local adapter may have another name the next time.
        number = len(inner.adapters) + 1
        files = (replace(file, name=f"adapter-{number}/{file.name}") for file in own.files)
        return replace(
            inner,
            files=(*inner.files, *files),
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

    uses_kernels = True
    """Its readers compile the kernel of `low_rank_kernel`."""

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker."""
        return self._reader(self._inner.open_reader())

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return a reader for one worker that shares the reading of the base."""
        return self._reader(shared.reader_of(self._inner))

    def _reader(self, below: TensorReader) -> TensorReader:
        tensors, below_tensors = self._tensors, self._inner.tensors
        return _AdaptedReader(below, below_tensors, self._adapter, self._changes, tensors)

    def changes_to(self, base: Source) -> Source | None:
        """Return scaling · B·A, if it is on this base: nothing of the base is read then.

        None also if the adapter does more: replaces values or scales them (DoRA).
        """
        if any(not change.is_low_rank for change in self._changes.values()):
            return None
        if base.identity == self._inner.identity:
            return _AdapterChanges(self, None)
        below = self._inner.changes_to(base)
        return None if below is None else _AdapterChanges(self, below)

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if base or adapter changed."""
        super().check_unchanged()
        self.identity.check_unchanged()


class _AdapterChanges(WrappedSource):
    """The changes that an adapter makes to its base, and those that were made below it."""

    holds_changes = True
    """True: its floats are changes."""

    def __init__(self, adapted: AdaptedSource, below: Source | None) -> None:
        super().__init__(adapted, _change_table(adapted.base.tensors))
        self._adapted, self._below = adapted, below

    @cached_property
    def identity(self) -> SourceIdentity:
        """Identity of the adapted model; the way of decoding is another."""
        whole = self._adapted.identity
        return replace(whole, decoding=f"{whole.decoding}; only the changes")

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker."""
        return self._reader(None if self._below is None else self._below.open_reader())

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return a reader for one worker that shares the reading of changes below."""
        return self._reader(None if self._below is None else shared.reader_of(self._below))

    def _reader(self, below: TensorReader | None) -> TensorReader:
        adapter, changes = self._adapted.adapter, self._adapted.changes
        return _AdaptedReader(below or _ZeroReader(), self.tensors, adapter, changes, self.tensors)


class _ZeroReader:
    """Reads zeros; a `TensorReader`."""

    overhead_nbytes = 0
    """It has no memory of its own."""

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with zeros."""
        np.frombuffer(into, np.uint8)[:] = 0

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Do nothing: nothing is read."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _change_table(table: TensorTable) -> TensorTable:
    """Return the tensors with all floats in the dtype of changes to them."""
    is_float = np.isin(table.dtype_ranks, [DTYPE_RANK[name] for name in FLOAT_DTYPES])
    is_wide = np.isin(table.dtype_ranks, [DTYPE_RANK[name] for name in WIDE_DTYPES])
    wanted = np.where(is_wide, DTYPE_RANK["F64"], DTYPE_RANK["F32"])
    ranks = np.where(is_float, wanted, table.dtype_ranks).astype(np.uint8)
    dtypes = [DTYPES[rank] for rank in ranks.tolist()]
    nbytes = np.array(
        [tensor_nbytes(dtype, shape) for dtype, shape in zip(dtypes, table.shapes, strict=True)],
        np.int64,
    )
    kept = table.dtype_ranks if table.kept_ranks is None else table.kept_ranks
    wide = replace(table, dtype_ranks=ranks, nbytes=nbytes, kept_ranks=kept)
    return wide.with_decoded(np.flatnonzero(is_float))


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


def _pieces(start: int, stop: int, width: int) -> Iterator[Rectangle]:
    return rectangles(start, stop, width, _PIECE_NUM_ELEMENTS)


class _AdaptedReader:
    """Reads a base's tensors with the changes of an adapter; a `TensorReader`."""

    def __init__(
        self,
        base: TensorReader,
        base_tensors: TensorTable,
        adapter: Adapter,
        changes: Mapping[int, Change],
        tensors: TensorTable,
    ) -> None:
        self._base = base
        self._tensors = base_tensors
        self._values = adapter.weights.open_reader()
        self._own = adapter.weights.tensors
        self._changes = changes
        self._dtype_ranks = tensors.dtype_ranks
        patches = [patch for change in changes.values() for patch in change.patches]
        raw = max((self._raw_nbytes(patch) for patch in patches), default=0)
        self._matrices = _Matrices(self._values, self._own, min(raw, _MOST_CACHED_NBYTES))
        self._left: tuple[object, Floats] | None = None
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
        left = max((wide * patch.rank * patch.num_rows for patch in patches), default=0)
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
            + 2 * min(right, _MOST_KEPT_NBYTES)
            + 2 * min(left, max(_MOST_LEFT_NBYTES, wide * _PIECE_NUM_ELEMENTS))
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
        for at in range(0, len(out), _PIECE_NUM_ELEMENTS):
            piece = out[at : at + _PIECE_NUM_ELEMENTS]
            self._sum(row, change, start + at, piece)
        if change.magnitude is None and change.tokens is None:
            return
        at = 0
        for part in _pieces(start, start + len(out), change.num_columns):
            piece = part.of(out, at)
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

    def _sum(self, row: int, change: Change, start: int, out: Floats) -> None:
        """Set elements from `start` on to the sum of W and all low-rank changes."""
        values, dtype = self._weights(row, change, start, len(out))
        width, stop = change.num_columns, start + len(out)
        done = start
        for patch in change.patches:
            first = max(start, patch.first_row * width)
            last = min(stop, (patch.first_row + patch.num_rows) * width)
            if first >= last:
                continue
            if done < first:
                between = slice(done - start, first - start)
                out[between] = widened(values[between], dtype, out.dtype)
            inside = slice(first - start, last - start)
            begin = first - patch.first_row * width
            self._add(patch, width, begin, dtype, values[inside], out[inside])
            done = last
        if done < stop:
            rest = slice(done - start, None)
            out[rest] = widened(values[rest], dtype, out.dtype)

    def _weights(self, row: int, change: Change, start: int, count: int) -> tuple[Stored, str]:
        """Read elements of W as they are stored; return them, and their dtype."""
        reader, tensors, number = self._base, self._tensors, row
        if change.value is not None:
            reader, tensors, number = self._values, self._own, change.value
        dtype = DTYPES[tensors.dtype_ranks[number]]
        nbytes = count * element_nbytes(dtype)
        if len(self._scratch.get(dtype, ())) < nbytes:
            self._scratch[dtype] = bytearray(nbytes)
        raw = memoryview(self._scratch[dtype])[:nbytes]
        reader.read(number, start, raw)
        return stored(raw, dtype), dtype

    def _add(
        self, patch: Patch, width: int, start: int, dtype: str, values: Stored, out: Floats
    ) -> None:
        """Set elements of a patch from its `start` on to `values` + scaling · left·right."""
        row, column = divmod(start, width)
        num_rows = -(-(column + len(out)) // width)
        left = self._left_of(patch, row, num_rows, out.dtype)
        right = self._right_of(patch, width, out.dtype)
        compiled = kernel(dtype) if out.dtype == np.float32 and right is not None else None
        if compiled is not None and right is not None:
            compiled.add_range(values, out, column, left, right, patch.scaling)
            return
        at = 0
        for part in _pieces(column, column + len(out), width):
            rows = left[part.first_row : part.first_row + part.num_rows]
            its_values, its_out = values[at : at + part.num_elements], part.of(out, at)
            its_values = its_values.reshape(its_out.shape)
            step = max(1, _MOST_KEPT_NBYTES // (patch.rank * out.dtype.itemsize))
            for first in range(0, part.num_columns, step):
                columns = slice(first, min(first + step, part.num_columns))
                begin, count = part.first_column + first, columns.stop - first
                if right is None:
                    some = self._matrices.read(patch.right, 0, patch.rank, begin, count, out.dtype)
                else:
                    some = right[:, begin : begin + count]
                add_product(
                    dtype, its_values[:, columns], its_out[:, columns], rows, some, patch.scaling
                )
            at += part.num_elements

    def _left_of(self, patch: Patch, row: int, num_rows: int, dtype: npt.DTypeLike) -> Floats:
        """Return rows of a patch's left matrix; a small one is kept whole for the next piece."""
        if patch.num_rows * patch.rank * np.dtype(dtype).itemsize > _MOST_LEFT_NBYTES:
            return self._matrices.read(patch.left, row, num_rows, 0, patch.rank, dtype)
        key = patch.left, dtype
        if self._left is None or self._left[0] != key:
            self._left = None  # before the next one takes memory
            whole = self._matrices.read(patch.left, 0, patch.num_rows, 0, patch.rank, dtype)
            self._left = key, whole
        return self._left[1][row : row + num_rows]

    def _right_of(self, patch: Patch, width: int, dtype: npt.DTypeLike) -> Floats | None:
        """Return a patch's right matrix, which is kept for the next piece; None if it is large."""
        if patch.rank * width * np.dtype(dtype).itemsize > _MOST_KEPT_NBYTES:
            return None
        key = patch.right, dtype
        if self._right is None or self._right[0] != key:
            self._right = None
            whole = self._matrices.read(patch.right, 0, patch.rank, 0, width, dtype)
            self._right = key, whole
        return self._right[1]

    # DoRA.

    def _scale(self, row: int, change: Change, part: Rectangle, out: Floats) -> None:
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
            for part in _pieces(first * width, (first + count) * width, width):
                rows = slice(part.first_row - first, part.first_row - first + part.num_rows)
                norms[rows] += np.add.reduce(self._squares(row, change, part, dtype), axis=1)
            self._keep_factors(key, change, norms, first, dtype)
        return self._factors[key]

    def _column_factors(self, row: int, change: Change, dtype: npt.DTypeLike) -> Floats:
        """Return magnitude / norm of each column, in one pass over the whole tensor."""
        key = row, -1
        if key not in self._factors:
            norms = np.zeros(change.num_columns)
            for part in _pieces(0, self._tensors[row].num_elements, change.num_columns):
                columns = slice(part.first_column, part.first_column + part.num_columns)
                norms[columns] += np.add.reduce(self._squares(row, change, part, dtype), axis=0)
            self._keep_factors(key, change, norms, 0, dtype)
        return self._factors[key]

    def _squares(
        self, row: int, change: Change, part: Rectangle, dtype: npt.DTypeLike
    ) -> npt.NDArray[np.float64]:
        values = np.empty(part.num_elements, dtype)
        self._sum(row, change, part.first_row * change.num_columns + part.first_column, values)
        squares: npt.NDArray[np.float64] = np.square(values, dtype=np.float64)
        return part.of(squares)

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

    def _replace_rows(self, change: Change, tokens: int, part: Rectangle, out: Floats) -> None:
        for number, row in enumerate(change.token_rows):
            if part.first_row <= row < part.first_row + part.num_rows:
                view = View(tokens, number * change.num_columns, 0, 1)
                out[row - part.first_row] = self._matrices.read(
                    view, 0, 1, part.first_column, part.num_columns, out.dtype
                )[0]


def _block_rows(change: Change) -> int:
    """Return the number of rows whose norms are computed together."""
    return max(1, _PIECE_NUM_ELEMENTS // change.num_columns)


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
