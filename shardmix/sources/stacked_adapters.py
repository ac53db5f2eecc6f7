"""The matrices of several adapters as those of one: Σ factorᵢ · Bᵢ·Aᵢ is one B · A, exactly.

A has the rows of all Aᵢ one after the other, and B the columns of all factorᵢ · Bᵢ side by side, so
that ranks add up. What is stored in 16 bits is widened, which is exact. B is multiplied in double
precision and rounded once, to float32 (float64 if any Bᵢ is), so an adapter's scaling needs no
place of its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from shardmix.dtypes import DTYPE_RANK, DTYPES, WIDE_DTYPES, element_nbytes, tensor_nbytes
from shardmix.formats.stored_floats import Floats, stored, widened
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.adapters import Adapter
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource
from shardmix.sources.identity import SourceIdentity

_PIECE_NUM_ELEMENTS = 1 << 17
_DECODING = "adapters side by side: factor · B in double precision, rounded once"

ROWS = "rows"
"""Way: the parts' elements, one part after the other, in each of several blocks."""
COLUMNS = "columns"
"""Way: the parts' columns side by side, each multiplied by its factor."""
SUM = "sum"
"""Way: the sum of the parts, each multiplied by its factor; zeros without any."""


class StackedPart(NamedTuple):
    """A tensor of one adapter."""

    adapter: int
    """Index of the adapter."""
    row: int
    """Row of its table."""
    factor: float = 1.0
    """Factor of its elements."""


@dataclass(frozen=True, slots=True)
class StackedTensor:
    """A tensor made of several adapters' ones."""

    name: str
    """Its name."""
    shape: tuple[int, ...]
    """Its shape."""
    way: str
    """ROWS, COLUMNS or SUM."""
    parts: tuple[StackedPart, ...]
    """The adapters' tensors, in order."""
    num_blocks: int = 1
    """Number of blocks that ROWS repeat in: of stacked experts one for each."""


class StackedAdapters(WrappedSource):
    """Tensors made of those of several adapters; `inner` is one of the models that have them."""

    def __init__(
        self, inner: Source, adapters: Sequence[Adapter], stacked: Sequence[StackedTensor]
    ) -> None:
        super().__init__(inner, _table(adapters, stacked))
        self._adapters, self._stacked = tuple(adapters), tuple(stacked)

    @cached_property
    def identity(self) -> SourceIdentity:
        """Identity of the adapters' files."""
        files = (file for adapter in self._adapters for file in adapter.files)
        return SourceIdentity(tuple(files), decoding=_DECODING)

    uses_kernels = False
    """Its readers compile none."""

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker."""
        return _StackedReader(self._adapters, self._stacked, self.tensors)

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return a reader for one worker: no base is read."""
        return self.open_reader()

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if an adapter changed."""
        self.identity.check_unchanged()


def _table(adapters: Sequence[Adapter], stacked: Sequence[StackedTensor]) -> TensorTable:
    dtypes = []
    for tensor in stacked:
        own = {
            DTYPES[adapters[part[0]].weights.tensors.dtype_ranks[part.row]] for part in tensor.parts
        }
        dtypes.append("F32" if WIDE_DTYPES.isdisjoint(own) else "F64")
    nbytes = [tensor_nbytes(each, x.shape) for each, x in zip(dtypes, stacked, strict=True)]
    count = len(stacked)
    table = TensorTable(
        names=tuple(tensor.name for tensor in stacked),
        shapes=tuple(tensor.shape for tensor in stacked),
        dtype_ranks=np.array([DTYPE_RANK[dtype] for dtype in dtypes], np.uint8),
        files=np.zeros(count, np.int32),
        starts=np.zeros(count, np.int64),
        nbytes=np.array(nbytes, np.int64),
    )
    return table.with_decoded(range(count))


class _StackedReader:
    """Reads stacked tensors; a `TensorReader`."""

    def __init__(
        self, adapters: Sequence[Adapter], stacked: Sequence[StackedTensor], tensors: TensorTable
    ) -> None:
        self._tables = [adapter.weights.tensors for adapter in adapters]
        self._readers = [adapter.weights.open_reader() for adapter in adapters]
        self._stacked, self._tensors = stacked, tensors
        widest = max((_width(each) for each in stacked if each.way == COLUMNS), default=0)
        # A piece, or a row if that is longer: as stored, widened twice, and multiplied.
        self.overhead_nbytes = 4 * 8 * max(_PIECE_NUM_ELEMENTS, widest)

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        tensor = self._stacked[row]
        wide = np.float64 if DTYPES[self._tensors.dtype_ranks[row]] in WIDE_DTYPES else np.float32
        out = np.frombuffer(into, wide)
        if tensor.way == ROWS:
            self._read_rows(tensor, start, out)
        elif tensor.way == COLUMNS:
            self._read_columns(tensor, start, out)
        else:
            self._read_sum(tensor, start, out)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Do nothing: adapters are small."""

    def close(self) -> None:
        """Close all files."""
        with ExitStack() as stack:
            for reader in self._readers:
                stack.callback(reader.close)

    def _read_rows(self, tensor: StackedTensor, start: int, out: Floats) -> None:
        at = 0
        for part, begin, count in self._ranges(tensor, start, start + len(out)):
            for first in range(0, count, _PIECE_NUM_ELEMENTS):
                num = min(_PIECE_NUM_ELEMENTS, count - first)
                out[at : at + num] = self._values(part, begin + first, num, out.dtype)
                at += num

    def _ranges(
        self, tensor: StackedTensor, start: int, stop: int
    ) -> Iterator[tuple[StackedPart, int, int]]:
        """Yield part, first element in it, and number of elements, of a range of ROWS."""
        lengths = [self._num_elements(part) // tensor.num_blocks for part in tensor.parts]
        block = start // sum(lengths)
        position = block * sum(lengths)
        while position < stop:
            for part, length in zip(tensor.parts, lengths, strict=True):
                first, last = max(position, start), min(position + length, stop)
                if first < last:
                    yield part, block * length + first - position, last - first
                position += length
            block += 1

    def _read_columns(self, tensor: StackedTensor, start: int, out: Floats) -> None:
        width = _width(tensor)
        step = max(1, _PIECE_NUM_ELEMENTS // width)
        stop = start + len(out)
        for first_row in range(start // width, -(-stop // width), step):
            num_rows = min(step, -(-stop // width) - first_row)
            rows = np.empty((num_rows, width), out.dtype)
            at = 0
            for part in tensor.parts:
                own = self._num_elements(part) // tensor.shape[0]
                values = self._values(part, first_row * own, num_rows * own, np.float64)
                with np.errstate(over="ignore", invalid="ignore"):
                    values *= part.factor
                    rows[:, at : at + own] = values.reshape(num_rows, own)
                at += own
            first, last = max(first_row * width, start), min((first_row + num_rows) * width, stop)
            inner = first - first_row * width
            out[first - start : last - start] = rows.reshape(-1)[inner : inner + last - first]

    def _read_sum(self, tensor: StackedTensor, start: int, out: Floats) -> None:
        for first in range(0, len(out), _PIECE_NUM_ELEMENTS):
            count = min(_PIECE_NUM_ELEMENTS, len(out) - first)
            total = np.zeros(count)
            for part in tensor.parts:
                with np.errstate(over="ignore", invalid="ignore"):
                    total += part.factor * self._values(part, start + first, count, np.float64)
            with np.errstate(over="ignore"):
                out[first : first + count] = total

    def _values(self, part: StackedPart, start: int, count: int, wide: object) -> Floats:
        dtype = DTYPES[self._tables[part.adapter].dtype_ranks[part.row]]
        raw = memoryview(bytearray(count * element_nbytes(dtype)))
        self._readers[part.adapter].read(part.row, start, raw)
        # Widening may give the bytes themselves, which are read-only for nobody else.
        return widened(stored(raw, dtype), dtype, wide)  # type: ignore[arg-type]

    def _num_elements(self, part: StackedPart) -> int:
        return self._tables[part.adapter][part.row].num_elements


def _width(tensor: StackedTensor) -> int:
    """Return the elements of a row of COLUMNS."""
    width = 1
    for size in tensor.shape[1:]:
        width *= size
    return max(1, width)
