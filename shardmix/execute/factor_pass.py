"""The pass that computes low-rank factors of what models changed, one parameter at a time.

One worker, and one thread of BLAS. The caller stores each result before the adapter is laid out,
since ranks may follow from the values.
"""

import math
import platform
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from shardmix.compute import truncated_svd
from shardmix.compute.truncated_svd import Narrow, Wide
from shardmix.dtypes import DTYPES, FLOAT_DTYPES, WIDE_DTYPES, element_nbytes
from shardmix.errors import NonfiniteError, SourceError
from shardmix.execute.executor import IsStopped, Job, Task, TaskResult
from shardmix.execute.jobs import run_job
from shardmix.execute.progress import OnProgress
from shardmix.formats.stored_floats import stored, widened
from shardmix.output.factor_store import FactorStore
from shardmix.plan.factoring import (
    STRIP_NUM_ELEMENTS,
    Difference,
    Factoring,
    FactorRecord,
    Product,
)
from shardmix.sources.base import Source, TensorReader
from shardmix.sources.shared_readers import SharedReaders
from shardmix.system.memory import give_back_free_memory, give_back_large_blocks

_PIECE_NUM_ELEMENTS = 1 << 16
"""Elements that are read at once: less than what the allocator asks the system for each time."""


class Factored(NamedTuple):
    """The result of one task."""

    record: FactorRecord
    """Rank and error."""
    factors: tuple[Narrow, ...]
    """A and B as an adapter stores them; none if the rank is 0."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Computes factors. `stacked` has the matrices of products."""

    factoring: Factoring
    """The parameters, and how they are factored."""
    sources: tuple[Source, ...]
    """The base, then the models."""
    stacked: Source | None
    """The matrices of adapters side by side; None if there are none."""

    @contextmanager
    def opened(self) -> Iterator["Factor"]:
        """Return itself: the worker opens its own files."""
        yield self

    @contextmanager
    def worker(self) -> Iterator["_Factorer"]:
        """Make the worker, with readers of its own."""
        shared = SharedReaders()
        with ExitStack() as stack:
            readers: list[TensorReader] = []
            stacked = None
            if self.factoring.differences:
                readers = [source.open_shared_reader(shared) for source in self.sources]
            if self.stacked is not None:
                stacked = stack.enter_context(closing(self.stacked.open_reader()))
            for reader in readers:
                stack.enter_context(closing(reader))
            yield _Factorer(self, readers, stacked)


class _Stopped(Exception):  # noqa: N818 - no error: nobody wants the result
    """The work was stopped."""


class _Factorer:
    """The worker."""

    def __init__(
        self, work: Factor, readers: Sequence[TensorReader], stacked: TensorReader | None
    ) -> None:
        self._work, self._readers, self._stacked = work, readers, stacked

    def run(self, task: Task, is_stopped: IsStopped) -> TaskResult[Factored] | None:
        """Factor one parameter."""
        factoring, number = self._work.factoring, task.file
        try:
            if number < len(factoring.differences):
                each = factoring.differences[number]
                value = self._difference(each, is_stopped)
            else:
                value = self._product(factoring.products[number - len(factoring.differences)])
        except _Stopped:
            return None
        return TaskResult(task, num_bytes(self._work, number), value, is_file_end=True)

    def _difference(self, each: Difference, is_stopped: IsStopped) -> Factored:
        matrix = _Change(self._work, self._readers, each, is_stopped)
        if not each.most_rank:
            norm = math.sqrt(matrix.squared_norm())
            if not math.isfinite(norm):  # it is kept as it is
                norm = math.inf
            return Factored(FactorRecord(each.name, 0, norm, 0.0), ())
        factoring = self._work.factoring
        found = truncated_svd.approximated(
            matrix, each.most_rank, factoring.energy, _rounded(factoring.dtype)
        )
        _refuse_nonfinite(each.name, found.norm)
        rank = found.left.shape[1]
        record = FactorRecord(each.name, rank, found.norm, found.error)
        if not rank:
            return Factored(record, ())
        if each.is_transposed:
            return Factored(record, (found.left.T, found.right.T))
        return Factored(record, (found.right, found.left))

    def _product(self, each: Product) -> Factored:
        a, b = self._whole(each.a, each.shape_a), self._whole(each.b, each.shape_b)
        stack, factoring = each.num_stacked, self._work.factoring
        a, b = a.reshape(stack, each.rank, -1), b.reshape(len(b), each.rank, stack)
        products = [truncated_svd.Product(b[:, :, n], a[n]) for n in range(stack)]
        found = truncated_svd.approximated_products(
            products, each.most_rank, factoring.energy, _rounded(factoring.dtype)
        )
        norm = math.sqrt(math.fsum(own.norm**2 for own in found))
        _refuse_nonfinite(each.name, norm)
        error = math.sqrt(math.fsum(own.error**2 for own in found))
        rank = found[0].left.shape[1]
        new_a = np.concatenate([own.right for own in found])
        new_b = np.stack([own.left for own in found], axis=2)
        return Factored(
            FactorRecord(each.name, rank, norm, error),
            (
                new_a.reshape(rank * stack, *each.shape_a[1:]),
                new_b.reshape(each.shape_b[0], rank * stack, *each.shape_b[2:]),
            ),
        )

    def _whole(self, row: int, shape: tuple[int, ...]) -> Narrow:
        """Return a stacked tensor in float32."""
        if self._stacked is None or self._work.stacked is None:
            raise AssertionError("there are no adapters side by side")
        table = self._work.stacked.tensors
        found = np.empty(math.prod(shape), np.float32)
        if DTYPES[table.dtype_ranks[row]] not in WIDE_DTYPES:
            self._stacked.read(row, 0, found.view(np.uint8).data)
            return found.reshape(shape)
        for first in range(0, len(found), STRIP_NUM_ELEMENTS):
            piece = np.empty(min(STRIP_NUM_ELEMENTS, len(found) - first))
            self._stacked.read(row, first, piece.view(np.uint8).data)
            found[first : first + len(piece)] = piece
        return found.reshape(shape)


class _Change:
    """The weighted sum of what models changed in a parameter, as a matrix read in strips."""

    def __init__(
        self, work: Factor, readers: Sequence[TensorReader], each: Difference, is_stopped: IsStopped
    ) -> None:
        self._readers, self._each, self._is_stopped = readers, each, is_stopped
        tables = [source.tensors for source in work.sources]
        self._dtypes = [
            DTYPES[table.dtype_ranks[row]] for table, row in zip(tables, each.rows, strict=True)
        ]
        self.shape = each.num_rows, each.num_columns
        nbytes = 4 * each.num_rows * each.num_columns
        may_hold = each.most_rank and nbytes <= work.factoring.held_nbytes
        self._held = np.empty(self.shape, np.float32) if may_hold else None
        step = max(1, STRIP_NUM_ELEMENTS // max(1, each.num_columns))
        num_rows = 0 if may_hold else min(step, each.num_rows)
        self._strip = np.empty((num_rows, each.num_columns), np.float32)
        self._is_read = False

    def strips(self) -> Iterator[tuple[int, Narrow]]:
        """Yield all rows in order, from memory if they are held there.

        A strip is valid until the next one.
        """
        step = max(1, STRIP_NUM_ELEMENTS // max(1, self.shape[1]))
        for first in range(0, self.shape[0], step):
            if self._is_stopped():
                raise _Stopped
            count = min(step, self.shape[0] - first)
            held = self._held
            strip = self._strip[:count] if held is None else held[first : first + count]
            if held is None or not self._is_read:
                self._read(first, strip)
            yield first, strip
        self._is_read = True

    def squared_norm(self) -> float:
        """Return the sum of squares; of integers the number of rows of strips that differ."""
        if self._dtypes[0] in FLOAT_DTYPES:
            return truncated_svd.squared_norm(self)
        return float(self._num_differing())

    def _num_differing(self) -> int:
        step, count = max(1, STRIP_NUM_ELEMENTS // max(1, self.shape[1])), 0
        for first in range(0, self.shape[0], step):
            num_rows = min(step, self.shape[0] - first)
            base, *others = (bytes(raw) for raw in self._raw(first, num_rows))
            count += any(other != base for other in others)
        return count

    def _raw(self, first: int, count: int) -> Iterator[memoryview]:
        width = self.shape[1]
        columns = zip(self._readers, self._each.rows, self._dtypes, strict=True)
        for reader, row, dtype in columns:
            raw = memoryview(bytearray(count * width * element_nbytes(dtype)))
            reader.read(row, first * width, raw)
            yield raw

    def _read(self, first: int, into: Narrow) -> None:
        """Read rows from `first` on, in pieces that stay in the cache."""
        step = max(1, _PIECE_NUM_ELEMENTS // max(1, self.shape[1]))
        for at in range(0, len(into), step):
            piece = into[at : at + step]
            values = (
                widened(stored(raw, dtype), dtype, np.float64)
                for raw, dtype in zip(self._raw(first + at, len(piece)), self._dtypes, strict=True)
            )
            base = next(values)
            total = np.zeros(len(base))
            with np.errstate(over="ignore", invalid="ignore"):
                for weight, value in zip(self._each.weights, values, strict=True):
                    total += weight * (value - base)
                piece[...] = total.reshape(piece.shape)


def _rounded(dtype: str) -> truncated_svd.Rounded:
    """Return the function that rounds to a dtype as the stored factors are, in float32.

    From double precision: to float16 at once, to bfloat16 by way of float32.
    """

    def rounded(values: Wide) -> Narrow:
        with np.errstate(over="ignore"):
            if dtype == "F16":
                return values.astype(np.float16).astype(np.float32)
            narrow = values.astype(np.float32)
        if dtype == "BF16":
            bits = narrow.view(np.uint32)
            bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
            bits &= np.uint32(0xFFFF0000)
        return narrow

    return rounded


def _refuse_nonfinite(name: str, norm: float) -> None:
    if not math.isfinite(norm):
        raise NonfiniteError(
            "the change holds NaN or Inf, or is too large, so that it has no singular values",
            subject=name,
            remedy="mend the model that holds them",
        )


def _refuse_if_others(each: Difference) -> None:
    if each.is_refused:
        raise SourceError(
            "changed, and is nothing that a LoRA adapter can hold: neither the weight of a linear "
            "layer, nor part of a module that could be kept whole",
            subject=each.name,
            remedy="leave such changes out with --skip-others (skip_others=True), or keep the "
            "whole model",
        )


def num_bytes(work: Factor, number: int) -> int:
    """Return the bytes that a task reads, each counted once."""
    differences = work.factoring.differences
    if number < len(differences):
        each = differences[number]
        columns = zip(work.sources, each.rows, strict=True)
        return sum(int(source.tensors.nbytes[row]) for source, row in columns)
    product = work.factoring.products[number - len(differences)]
    if work.stacked is None:
        return 0
    return int(work.stacked.tensors.nbytes[[product.a, product.b]].sum())


def library() -> str:
    """Return the name of what computes here, for the record."""
    config: Any = np.show_config(mode="dicts")
    found = (config or {}).get("Build Dependencies", {}).get("lapack", {})
    lapack = " ".join(filter(None, (found.get("name"), found.get("version"))))
    return f"numpy {np.__version__}, LAPACK of {lapack or 'unknown'}, {platform.machine()}"


def factor(
    work: Factor,
    store: FactorStore,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> None:
    """Compute all factors that are not stored yet, and store them.

    Raises `SourceError` if a model cannot be read, `NonfiniteError` if a change is not finite,
    `OutputError` if factors cannot be stored, `MergeCancelled` once `cancel` is set.
    """
    give_back_large_blocks()
    differences = work.factoring.differences
    names = [each.name for each in differences]
    names += [each.name for each in work.factoring.products]
    tasks = [Task(number, 0, 1) for number, name in enumerate(names) if name not in store.records]

    def take(result: TaskResult[Factored]) -> None:
        record = result.value.record
        if result.task.file < len(differences) and record.norm > 0:
            _refuse_if_others(differences[result.task.file])
        store.add(*result.value)

    if tasks:
        # Threads of BLAS wait for one another by spinning: beside other work they take seven times
        # the CPU time of one.
        with threadpool_limits(limits=1, user_api="blas"):
            run_job(
                Job(work, num_workers=1, is_in_order=True),
                tasks,
                take,
                num_bytes=sum(num_bytes(work, task.file) for task in tasks),
                num_files=len(tasks),
                on_progress=on_progress,
                cancel=cancel,
            )
    give_back_free_memory()
