"""The matrices whose factors must be computed before an adapter can be laid out, and the memory.

Values only; `execute.factor_pass` computes.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardmix.errors import BudgetError, RecipeError
from shardmix.options import LLVM, TORCH, RunSettings
from shardmix.plan.memory_budget import reserved_nbytes
from shardmix.system.memory import available_nbytes, resident_nbytes
from shardmix.system.units import MIB, format_mib

OVERSAMPLING = 16
"""Columns of random projections beyond the rank."""
STRIP_NUM_ELEMENTS = 1 << 18
"""Elements of a strip; a row may be longer."""
LEFT_NBYTES = 32 << 20
"""Memory that the process keeps once factors are computed: buffers of BLAS, and gaps in its heap.
Measured: up to 28 MiB."""

_WIDE_NBYTES, _NARROW_NBYTES = 8, 4
# A strip as stored, of the base and of a model widened, their sum, and copies in both widths.
_STRIP_NBYTES = 6 * _WIDE_NBYTES
# Bases before and after a QR decomposition, LAPACK's copy, and the one on the other side.
_NUM_BASES = 4
# Thread stacks, allocator slack, buffers of BLAS, the progress display.
_RUN_NBYTES = 48 * MIB
_SHARE = 0.8
# A worker with the smallest chunks, and its reader of factors and adapters.
_WRITING_NBYTES = 12 * MIB


@dataclass(frozen=True, slots=True)
class Difference:
    """The weighted sum of what models changed in one parameter of their base."""

    name: str
    """Name in the base's files."""
    rows: tuple[int, ...]
    """Row of each source's table, the base's first."""
    weights: tuple[float, ...]
    """Factor of each model's change."""
    num_rows: int
    """Rows of the matrix: the first axis."""
    num_columns: int
    """Its columns: all other axes."""
    most_rank: int
    """Largest rank of the factors; 0 if it is only measured, and kept whole."""
    is_transposed: bool = False
    """True if it is stored as (in, out)."""
    is_refused: bool = False
    """True if an adapter cannot hold a change of it, so that one is an error."""


@dataclass(frozen=True, slots=True)
class Product:
    """The matrices of several adapters side by side, to be reduced to a smaller rank."""

    name: str
    """Name of the parameter."""
    a: int
    """Row of A in the stacked adapters' table."""
    b: int
    """Row of B."""
    shape_a: tuple[int, ...]
    """Shape of A."""
    shape_b: tuple[int, ...]
    """Shape of B."""
    num_stacked: int
    """Number of matrices that the parameter stacks."""
    most_rank: int
    """Largest rank of the factors."""

    @property
    def rank(self) -> int:
        """The rank of the matrices side by side."""
        return self.shape_a[0] // self.num_stacked

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of each of the matrices."""
        columns = math.prod(self.shape_a[1:])
        return self.shape_b[0] * math.prod(self.shape_b[2:]), columns


@dataclass(frozen=True, slots=True)
class FactorRecord:
    """The result for one parameter. Norms are Frobenius norms."""

    name: str
    """Name of the parameter in the base's files."""
    rank: int
    """Rank of the factors; 0 without factors."""
    norm: float
    """Norm of the change."""
    error: float
    """Norm of the change minus the product of the factors, as measured."""


@dataclass(frozen=True, slots=True)
class LowRankFacts:
    """All that is known of an adapter's factors."""

    records: tuple[FactorRecord, ...]
    """The results, parameter by parameter."""
    whole: tuple[str, ...]
    """Names of parameters that changed and are kept whole."""
    left: tuple[str, ...]
    """Names of parameters that changed and are left as they are in the base."""
    computed_by: tuple[str, ...]
    """Libraries that computed the factors."""
    digest: str
    """Digest of all factors."""
    nbytes: int
    """Size of their file."""
    peak_nbytes: int
    """Upper bound of the process's memory while they were computed."""

    @property
    def squared_norm(self) -> float:
        """Squared norm of all changes."""
        return math.fsum(each.norm**2 for each in self.records)


@dataclass(frozen=True, slots=True)
class Factoring:
    """All that must be factored, and how."""

    rank: int
    """Largest rank."""
    energy: float | None
    """Share of the squared norm that the least rank must keep; None: all have the largest."""
    dtype: str
    """Safetensors dtype that factors are rounded to."""
    differences: tuple[Difference, ...] = ()
    """Parameters that are read from models. Those that are only measured come first."""
    products: tuple[Product, ...] = ()
    """Parameters that are read from adapters."""
    reader_nbytes: int = 0
    """Memory of the sources' readers."""
    held_nbytes: int = 0
    """A matrix of at most this size is held in memory once it is read; larger ones are read
    again."""
    peak_nbytes: int = 0
    """Upper bound of the process's peak resident memory."""

    @property
    def num_tasks(self) -> int:
        """Number of parameters."""
        return len(self.differences) + len(self.products)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all factors, at most."""
        return _NARROW_NBYTES * (
            sum(each.most_rank * (each.num_rows + each.num_columns) for each in self.differences)
            + sum(each.most_rank * sum(each.sides) * each.num_stacked for each in self.products)
        )


def _difference_nbytes(each: Difference) -> int:
    strip = _STRIP_NBYTES * max(STRIP_NUM_ELEMENTS, each.num_columns)
    if not each.most_rank:
        return strip
    least, most = sorted((each.num_rows, each.num_columns))
    width = min(each.most_rank + OVERSAMPLING, least)
    bases = _WIDE_NBYTES * width * (_NUM_BASES * most + least)
    return strip + bases + 4 * _WIDE_NBYTES * width * width


def _product_nbytes(each: Product) -> int:
    rows, columns = each.sides
    width = each.rank + each.most_rank
    matrices = _NARROW_NBYTES * (each.rank + 2 * each.most_rank) * (rows + columns)
    stacked = 2 * _NARROW_NBYTES * each.rank * (rows + columns) * each.num_stacked
    cores = 8 * each.num_stacked * _WIDE_NBYTES * width * width
    strips = 6 * _WIDE_NBYTES * max(STRIP_NUM_ELEMENTS, 2 * width * width)
    return (stacked if each.num_stacked > 1 else matrices) * 2 + cores + strips


def check_rank(rank: int, most: Sequence[int]) -> None:
    """Raise `RecipeError` if no matrix can have a rank; `most` are the largest that they can."""
    if rank > max(most, default=0):
        raise RecipeError(
            f"is beyond every matrix: the largest rank that one can have is {max(most, default=0)}",
            subject=f"rank {rank}",
            remedy="give a smaller one",
        )


def fitted(factoring: Factoring, settings: RunSettings) -> "Factoring":
    """Return a factoring with the memory that it takes, within the budget.

    Raises `BudgetError` if not even the factors of one matrix fit, naming the least that works.
    """
    needs = [
        *map(_difference_nbytes, factoring.differences),
        *map(_product_nbytes, factoring.products),
    ]
    reserved = resident_nbytes() + _RUN_NBYTES + factoring.reader_nbytes
    least = reserved + max(needs, default=0)
    given = settings.max_memory_nbytes
    if given is not None and least > given:
        enough = max(least, _written_nbytes(factoring, settings)) + 4 * MIB
        raise BudgetError(
            f"too small; the least that works for factors of rank {factoring.rank} is "
            f"{format_mib(enough)}",
            subject=f"--max-memory {format_mib(given)}",
            remedy="raise the budget, or lower --rank",
        )
    budget = given if given is not None else reserved + int(available_nbytes() * _SHARE)
    held, peak = _held(factoring.differences, budget - reserved)
    return replace(factoring, held_nbytes=held, peak_nbytes=max(least, reserved + peak))


def _written_nbytes(factoring: Factoring, settings: RunSettings) -> int:
    """Return the least memory in which the adapter can then be written."""
    has_llvm = settings.backend != TORCH and importlib.util.find_spec("llvmlite") is not None
    reserved = reserved_nbytes(LLVM if has_llvm else TORCH)
    return reserved + LEFT_NBYTES + factoring.reader_nbytes + _WRITING_NBYTES


def _held(differences: Sequence[Difference], spare: int) -> tuple[int, int]:
    """Return the size of the largest matrix that may be held, and the peak with it."""
    held = peak = 0
    for each in differences:
        if not each.most_rank:
            continue
        own = _NARROW_NBYTES * each.num_rows * each.num_columns
        need = own + _difference_nbytes(each)
        if need <= spare:
            held, peak = max(held, own), max(peak, need)
    return held, peak
