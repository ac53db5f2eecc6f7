"""A model whose rows by token are those of another vocabulary, mapped while they are read.

A row comes from the model itself, from another model that has its token, or is computed: a mean,
or zeros. Runs of consecutive rows are read as one range.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPE_RANK, DTYPES, WIDE_DTYPES, element_nbytes, tensor_nbytes
from shardmix.formats.stored_floats import Floats, stored, widened
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource
from shardmix.sources.identity import SourceIdentity

MEAN = -1
"""In place of a model: the mean of the rows of all models that have the token."""
ZERO = -2
"""In place of a model: zeros."""
AVERAGE = -3
"""In place of a model: the average of all rows before, of this model."""
_PIECE = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class RowRuns:
    """The sources of a tensor's rows, in runs of consecutive ones: columns, a run each."""

    firsts: npt.NDArray[np.int32]
    """First row of the run; the first is 0."""
    givers: npt.NDArray[np.int16]
    """Number of the model that gives the rows; MEAN, ZERO or AVERAGE."""
    rows: npt.NDArray[np.int32]
    """First row in the giver's tensor."""
    num_rows: int
    """Number of all rows."""

    @classmethod
    def of(cls, givers: npt.NDArray[np.int16], rows: npt.NDArray[np.int32]) -> "RowRuns":
        """Return runs of the single rows' givers and rows there."""
        breaks = givers[1:] != givers[:-1]
        breaks |= (rows[1:] != rows[:-1] + 1) & (givers[1:] >= 0)
        firsts = np.flatnonzero(np.concatenate([[True], breaks])).astype(np.int32)
        return cls(firsts, givers[firsts], rows[firsts], len(givers))

    def between(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield runs within some rows: first row, row after the last, giver, first row there."""
        number = int(self.firsts.searchsorted(start, side="right")) - 1
        while start < stop:
            is_last = number + 1 == len(self.firsts)
            end = min(stop, self.num_rows if is_last else int(self.firsts[number + 1]))
            first = int(self.rows[number]) + start - int(self.firsts[number])
            yield start, end, int(self.givers[number]), first
            start, number = end, number + 1

    def is_identity(self, model: int, num_rows: int) -> bool:
        """Return True if all rows are a model's own, in their order."""
        return (
            self.num_rows == num_rows
            and len(self.firsts) == 1
            and int(self.givers[0]) == model
            and int(self.rows[0]) == 0
        )

    def update(self, hasher: "hashlib._Hash") -> None:
        """Feed a hash with all that the runs say."""
        hasher.update(np.int64(self.num_rows).tobytes())
        for column in (self.firsts, self.givers, self.rows):
            hasher.update(np.ascontiguousarray(column).tobytes())


@dataclass(frozen=True, slots=True, eq=False)
class RowMaps:
    """The maps of all models of a merge to one vocabulary."""

    own: tuple[RowRuns, ...]
    """By model: the rows that it has itself. A row that it lacks has ZERO for its giver."""
    filled: tuple[RowRuns, ...]
    """By model: the same, with rows of other models for those that it lacks."""

    def digest(self, model: int) -> str:
        """Return a digest of one model's map."""
        hasher = hashlib.sha256()
        self.filled[model].update(hasher)
        if (self.filled[model].givers == MEAN).any():
            for runs in self.own:
                runs.update(hasher)
        return hasher.hexdigest()[:32]


class MappedTensor(NamedTuple):
    """A parameter with a row for each token."""

    name: str
    """Its name; of one that the model shares with a stored tensor, the name that others store."""
    row: int | None
    """Row of the tensor in the model's table; None if it shares another parameter's."""
    givers: tuple[int | None, ...]
    """By model: the row of that model's tensor of the same parameter; None if it has none."""


class MappedRowsSource(WrappedSource):
    """A model with its rows mapped to another vocabulary."""

    def __init__(
        self,
        models: Sequence[Source],
        model: int,
        maps: RowMaps,
        tensors: Sequence[MappedTensor],
        config: Mapping[str, Any],
        runs: RowRuns | None = None,
    ) -> None:
        inner = models[model]
        self._models, self._model, self._maps = tuple(models), model, maps
        self._runs = maps.filled[model] if runs is None else runs
        self._tensors_asked = tuple(tensors)
        self._config = config
        shared = itertools.count(len(inner.tensors))
        self.mapped = {next(shared) if each.row is None else each.row: each for each in tensors}
        super().__init__(inner, self._table(inner.tensors))

    @property
    def config(self) -> Mapping[str, Any]:
        """Config with the size and the special tokens of the other vocabulary."""
        return self._config

    @cached_property
    def identity(self) -> SourceIdentity:
        """Identity of the inner source, and of the map."""
        own = f"rows by token {self._maps.digest(self._model)}"
        inner = self._inner.identity
        return replace(inner, decoding="; ".join(filter(None, (inner.decoding, own))))

    def open_reader(self) -> TensorReader:
        """Return a reader that maps rows."""
        return self._reader(self._inner.open_reader())

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return such a reader; the inner source reads its base by `shared`."""
        return self._reader(self._inner.open_shared_reader(shared))

    @property
    def uses_kernels(self) -> bool:
        """True if readers of a model that gives rows compile kernels."""
        return any(self._models[giver].uses_kernels for giver in self.givers)

    def changes_to(self, base: Source) -> Source | None:
        """Return the inner source's changes to the inner base, mapped; or None.

        A row that both take from elsewhere has not changed.
        """
        if not isinstance(base, MappedRowsSource) or base._maps is not self._maps:
            return None
        changes = self._inner.changes_to(base._inner)
        if changes is None:
            return None
        runs = _change_runs(self._maps, self._model, base._model)
        if runs is None:
            return None
        models = [*self._models]
        models[self._model] = changes
        asked = self._tensors_asked
        return MappedRowsSource(models, self._model, self._maps, asked, self._config, runs)

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if a model that gives rows changed."""
        for giver in self.givers:
            self._models[giver].check_unchanged()

    @property
    def givers(self) -> set[int]:
        """The numbers of the models whose rows it reads, its own among them."""
        found = {int(giver) for giver in np.unique(self._runs.givers) if giver >= 0}
        if (self._runs.givers == MEAN).any():
            found.update(range(len(self._models)))
        return found | {self._model}

    def _table(self, table: TensorTable) -> TensorTable:
        """Return the tensors with as many rows as the other vocabulary has.

        A parameter that shares a tensor has one of its own: rows that other models give differ.
        """
        shared = [mapped for mapped in self.mapped.values() if mapped.row is None]
        rows = [*range(len(table)), *(self._row_of(mapped) for mapped in shared)]
        names = (*table.names, *(mapped.name for mapped in shared))
        table = replace(table.take(rows), names=names)
        shapes, ranks, nbytes = [*table.shapes], table.dtype_ranks.copy(), table.nbytes.copy()
        kept = (table.dtype_ranks if table.kept_ranks is None else table.kept_ranks).copy()
        is_computed = bool(np.isin(self._runs.givers, (MEAN, AVERAGE)).any())
        for row, mapped in self.mapped.items():
            shapes[row] = _with_rows(table.names[row], shapes[row], self._runs.num_rows)
            given = {
                DTYPES[self._models[giver].tensors.dtype_ranks[at]]
                for giver in self.givers
                if (at := mapped.givers[giver]) is not None
            }
            if is_computed or len(given) > 1:
                wide = any(dtype in WIDE_DTYPES for dtype in given)
                ranks[row] = DTYPE_RANK["F64" if wide else "F32"]
            nbytes[row] = tensor_nbytes(DTYPES[ranks[row]], shapes[row])
        changed = replace(
            table, shapes=tuple(shapes), dtype_ranks=ranks, nbytes=nbytes, kept_ranks=kept
        )
        return changed.with_decoded(list(self.mapped))

    def _row_of(self, mapped: MappedTensor) -> int:
        row = mapped.givers[self._model]
        if row is None:
            raise AssertionError(f"{mapped.name}: the model has no such tensor")
        return row

    def _reader(self, inner: TensorReader) -> TensorReader:
        return _MappedRowsReader(inner, self)


def num_rows(name: str, shape: Sequence[int]) -> int:
    """Return the number of rows of a tensor with one for each token; of scalars 0."""
    return shape[_row_axis(name, shape)] if shape else 0


def _row_axis(name: str, shape: Sequence[int]) -> int:
    """Return the axis of its rows: the first, but of a bias [1, rows] the second."""
    return 1 if len(shape) == 2 and shape[0] == 1 and name.endswith("bias") else 0


def _with_rows(name: str, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return such a tensor's shape with another number of rows."""
    at = _row_axis(name, shape)
    return (*shape[:at], count, *shape[at + 1 :])


def _change_runs(maps: RowMaps, model: int, base: int) -> RowRuns | None:
    """Return the map of a model's changes to a base; None if a row's change is not known by it."""
    givers, rows = _unrolled(maps.filled[model])
    base_givers, base_rows = _unrolled(maps.filled[base])
    is_own = (givers == model) & (base_givers == base)
    is_same = (givers == base_givers) & ((rows == base_rows) | (givers < 0))
    is_average = is_same & (givers == AVERAGE)
    if not (is_own | is_same).all():
        return None
    givers[is_same & ~is_average] = ZERO
    return RowRuns.of(givers, rows)


def _unrolled(runs: RowRuns) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """Return giver and row of each single row."""
    counts = np.diff(np.append(runs.firsts, runs.num_rows))
    givers = np.repeat(runs.givers, counts)
    offsets = np.arange(runs.num_rows, dtype=np.int32) - np.repeat(runs.firsts, counts)
    return givers, np.repeat(runs.rows, counts) + np.where(givers >= 0, offsets, 0)


class _MappedRowsReader:
    """Reads tensors with their rows mapped; a `TensorReader`."""

    def __init__(self, inner: TensorReader, source: MappedRowsSource) -> None:
        self._inner, self._source = inner, source
        self._tensors = source.tensors
        self._runs, self._own = source._runs, source._maps.own
        self._mapped = source.mapped
        self._readers = {
            giver: inner if giver == source._model else source._models[giver].open_reader()
            for giver in source.givers
        }
        self._average: dict[int, Floats] = {}
        widths = [self._width(row) for row in source.mapped]
        average_nbytes = 0
        if (self._runs.givers == AVERAGE).any():
            # The averages, sums for one of them, and a row.
            average_nbytes = 8 * (sum(widths) + 3 * max(widths, default=0))
        self.overhead_nbytes = (
            sum(reader.overhead_nbytes for reader in self._readers.values())
            + 6 * 8 * _PIECE
            + average_nbytes
        )

    def _width(self, row: int) -> int:
        """Return the number of elements in a row."""
        return max(1, math.prod(self._tensors.shapes[row]) // max(1, self._runs.num_rows))

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        mapped = self._mapped.get(row)
        if mapped is None:
            self._inner.read(row, start, into)
            return
        dtype, width = DTYPES[self._tensors.dtype_ranks[row]], self._width(row)
        item = element_nbytes(dtype)
        stop = start + len(into) // item
        for first, end, giver, at in self._runs.between(start // width, -(-stop // width)):
            low, high = max(start, first * width), min(stop, end * width)
            part = into[(low - start) * item : (high - start) * item]
            if giver >= 0:
                position = low + (at - first) * width
                self._read_from(giver, mapped, position, part, dtype)
            elif giver == ZERO:
                np.frombuffer(part, np.uint8)[:] = 0
            elif giver == MEAN:
                self._read_mean(mapped, low, _floats(part, dtype), width)
            else:
                average = self._averaged(row, width)
                _floats(part, dtype)[:] = average[np.arange(low, high) % width]

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon, as far as the model itself has them."""
        mapped = self._mapped.get(row)
        if mapped is None:
            self._inner.prefetch(row, start, num_elements)
            return
        width = self._width(row)
        stop = start + num_elements
        for first, end, giver, at in self._runs.between(start // width, -(-stop // width)):
            low, high = max(start, first * width), min(stop, end * width)
            if giver == self._source._model and (high - low) >= _PIECE:
                self._inner.prefetch(row, low + (at - first) * width, high - low)

    def close(self) -> None:
        """Close all readers."""
        for reader in self._readers.values():
            reader.close()

    def _row_of(self, giver: int, mapped: MappedTensor) -> int:
        row = mapped.givers[giver]
        if row is None:
            raise AssertionError(f"model {giver} has no such tensor")
        return row

    def _read_from(
        self, giver: int, mapped: MappedTensor, position: int, part: memoryview, dtype: str
    ) -> None:
        """Fill a buffer with a model's elements, in the dtype of this tensor."""
        row = self._row_of(giver, mapped)
        own = DTYPES[self._source._models[giver].tensors.dtype_ranks[row]]
        if own == dtype:
            self._readers[giver].read(row, position, part)
            return
        out = _floats(part, dtype)
        for first in range(0, len(out), _PIECE):
            piece = out[first : first + _PIECE]
            piece[:] = self._widened(giver, row, position + first, len(piece), own, out.dtype)

    def _widened(
        self, giver: int, row: int, position: int, count: int, own: str, wide: npt.DTypeLike
    ) -> Floats:
        raw = memoryview(bytearray(count * element_nbytes(own)))
        self._readers[giver].read(row, position, raw)
        return widened(stored(raw, own), own, wide)

    def _read_mean(self, mapped: MappedTensor, start: int, out: Floats, width: int) -> None:
        """Fill an array with means: summed in the order of the models, each sum rounded."""
        for low in range(start, start + len(out), _PIECE):
            high = min(low + _PIECE, start + len(out))
            total = np.zeros(high - low, out.dtype)
            counts = np.zeros(high - low, out.dtype)
            for giver, own in enumerate(self._own):
                for first, end, has, at in own.between(low // width, -(-high // width)):
                    if has != giver:
                        continue
                    begin, stop = max(low, first * width), min(high, end * width)
                    row = self._row_of(giver, mapped)
                    dtype = DTYPES[self._source._models[giver].tensors.dtype_ranks[row]]
                    position = begin + (at - first) * width
                    total[begin - low : stop - low] += self._widened(
                        giver, row, position, stop - begin, dtype, out.dtype
                    )
                    counts[begin - low : stop - low] += 1
            out[low - start : high - start] = total / counts

    def _averaged(self, row: int, width: int) -> Floats:
        """Return the average of a tensor's first rows: summed in float64, in their order."""
        known = self._average.get(row)
        if known is None:
            count = int(self._runs.firsts[self._runs.givers == AVERAGE][0])
            dtype = DTYPES[self._tensors.dtype_ranks[row]]
            total = np.zeros(width, np.float64)
            rows_at_once = max(1, _PIECE // width)
            buffer = bytearray(min(rows_at_once, count) * width * element_nbytes(dtype))
            for first in range(0, count, rows_at_once):
                num = min(rows_at_once, count - first)
                part = memoryview(buffer)[: num * width * element_nbytes(dtype)]
                self.read(row, first * width, part)
                for values in _floats(part, dtype).reshape(num, width):
                    total += values
            known = (total / max(count, 1)).astype(_floats(memoryview(b""), dtype).dtype)
            self._average[row] = known
        return known


def _floats(part: memoryview, dtype: str) -> Floats:
    """Return bytes as an array that can be written to, of float32 or float64."""
    return np.frombuffer(part, np.float64 if dtype == "F64" else np.float32)
