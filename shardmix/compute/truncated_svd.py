"""Low-rank approximations by singular values, in bounded memory: of matrices and of products.

A matrix is read in strips of rows, several times, and never held. Its range is found by random
projections and two power iterations (Halko, Martinsson, Tropp, 2011, arXiv:0909.4061, algorithms
4.4 and 5.1), whose error is hardly above the least that any matrix of that rank has. A product B·A
is reduced to a small core by QR decompositions of both sides; the product itself is never formed.

All sums are in double precision. LAPACK's last bits differ between machines. The error is measured
on the factors as they are stored, not estimated.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shardmix.plan.factoring import OVERSAMPLING, STRIP_NUM_ELEMENTS

Wide = npt.NDArray[np.float64]
Narrow = npt.NDArray[np.float32]
Rounded = Callable[[Wide], Narrow]
"""Rounds factors to the dtype that they will be stored in, as float32."""

_NUM_POWER_ITERATIONS = 2
_SEED = 0x5EED
# Of a share of the squared norm, what rounding may take away.
_SLACK = 1e-12


class Matrix(Protocol):
    """A matrix that is read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def strips(self) -> Iterator[tuple[int, Narrow]]:
        """Yield all rows in order: the first row's number, and some rows."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The product of two factors in place of a matrix."""

    left: Narrow
    """Matrix (rows, rank)."""
    right: Narrow
    """Matrix (rank, columns)."""
    norm: float
    """Frobenius norm of the matrix; NaN or infinite if it has such values, without factors."""
    error: float
    """Frobenius norm of the matrix minus the product, as measured."""


def squared_norm(matrix: Matrix) -> float:
    """Return the sum of all squares of a matrix."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.fsum(float(np.vdot(wide, wide)) for _, wide in _wide_strips(matrix))


def approximated(matrix: Matrix, rank: int, energy: float | None, rounded: Rounded) -> LowRank:
    """Return a matrix as the product of two factors of at most a rank.

    With `energy`, the least rank up to that which keeps this share of the squared norm. The roots
    of the singular values go into both factors alike.
    """
    num_rows, num_columns = matrix.shape
    width = min(rank + OVERSAMPLING, num_rows, num_columns)
    generator = np.random.Generator(np.random.Philox(_SEED))
    basis = generator.standard_normal((num_columns, width))
    image, total = _image(matrix, basis)
    if not math.isfinite(total) or total == 0:
        return _nothing(matrix.shape, math.sqrt(total) if total >= 0 else math.nan)
    basis = _orthonormal(image)
    del image
    is_whole = width == min(num_rows, num_columns)
    for _ in range(0 if is_whole else _NUM_POWER_ITERATIONS):
        basis = _orthonormal(_adjoint_image(matrix, basis))
        basis = _orthonormal(_image(matrix, basis)[0])
    rows, small = np.linalg.qr(_adjoint_image(matrix, basis))
    u, values, v = np.linalg.svd(small.T)
    kept = _least_rank([values], [total], rank, energy)
    roots = np.sqrt(values[:kept])
    left = rounded((basis @ u[:, :kept]) * roots)
    right = rounded(roots[:, None] * (v[:kept] @ rows.T))
    del basis, rows
    return LowRank(left, right, math.sqrt(total), _residual(matrix, left, right))


def _image(matrix: Matrix, basis: Wide) -> tuple[Wide, float]:
    """Return matrix · basis, and the matrix's squared norm."""
    image = np.empty((matrix.shape[0], basis.shape[1]))
    squares = []
    with np.errstate(over="ignore", invalid="ignore"):
        for first, wide in _wide_strips(matrix):
            squares.append(float(np.vdot(wide, wide)))
            np.matmul(wide, basis, out=image[first : first + len(wide)])
    return image, math.fsum(squares) if all(map(math.isfinite, squares)) else math.nan


def _adjoint_image(matrix: Matrix, basis: Wide) -> Wide:
    """Return the transposed matrix · basis."""
    image = np.zeros((matrix.shape[1], basis.shape[1]))
    part = np.empty_like(image)
    for first, wide in _wide_strips(matrix):
        np.matmul(wide.T, basis[first : first + len(wide)], out=part)
        image += part
    return image


def _wide_strips(matrix: Matrix) -> Iterator[tuple[int, Wide]]:
    """Yield strips in double precision, each in the memory of the one before.

    New arrays of this size would come from the system each time, page by page.
    """
    buffer: Wide | None = None
    for first, strip in matrix.strips():
        if buffer is None:
            buffer = np.empty(strip.shape)
        wide = buffer[: len(strip)]
        np.copyto(wide, strip)
        yield first, wide


def _orthonormal(image: Wide) -> Wide:
    return np.linalg.qr(image)[0]


def _residual(matrix: Matrix, left: Narrow, right: Narrow) -> float:
    wide_right = right.astype(np.float64)
    squares = []
    buffer: Wide | None = None
    for first, wide in _wide_strips(matrix):
        if buffer is None:
            buffer = np.empty(wide.shape)
        part = buffer[: len(wide)]
        np.matmul(left[first : first + len(wide)].astype(np.float64), wide_right, out=part)
        np.subtract(wide, part, out=part)
        squares.append(float(np.vdot(part, part)))
    return math.sqrt(math.fsum(squares))


def _nothing(shape: tuple[int, int], norm: float) -> LowRank:
    left, right = np.zeros((shape[0], 0), np.float32), np.zeros((0, shape[1]), np.float32)
    return LowRank(left, right, norm, norm)


def _least_rank(
    values: Sequence[Wide], totals: Sequence[float], rank: int, energy: float | None
) -> int:
    """Return the least rank that keeps a share of all squares, at most `rank`, at least 1.

    `values` are the singular values of several matrices, of which each has that rank.
    """
    most = min(rank, max(int(np.count_nonzero(each)) for each in values))
    if energy is None:
        return max(1, most)
    wanted = energy * math.fsum(totals) * (1 - _SLACK)
    for least in range(1, most):
        if math.fsum(float(np.vdot(each[:least], each[:least])) for each in values) >= wanted:
            return least
    return max(1, most)


# Products.


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two matrices, in float32."""

    left: Narrow
    """Matrix (rows, rank)."""
    right: Narrow
    """Matrix (rank, columns)."""


def approximated_products(
    products: Sequence[Product], rank: int, energy: float | None, rounded: Rounded
) -> list[LowRank]:
    """Return products as products of a smaller rank, the same for all, each the best of its rank.

    The QR decompositions go strip by strip, so that besides the matrices only small ones are held.
    """
    cores = [_core(product) for product in products]
    totals = [float(np.vdot(values, values)) for _, _, _, _, values in cores]
    if not all(map(math.isfinite, totals)):
        return [_nothing(_shape(product), math.nan) for product in products]
    kept = _least_rank([core[-1] for core in cores], totals, rank, energy)
    return [
        _reduced(product, core, kept, rounded)
        for product, core in zip(products, cores, strict=True)
    ]


def _shape(product: Product) -> tuple[int, int]:
    return product.left.shape[0], product.right.shape[1]


def _core(product: Product) -> tuple[Wide, Wide, Wide, Wide, Wide]:
    """Return the triangles of both sides; left vectors, right vectors and values of their core."""
    of_left, of_right = _triangle([product.left]), _triangle([product.right.T])
    core = of_left @ of_right.T
    if not np.isfinite(core).all():
        return of_left, of_right, core, core, np.array([math.nan])
    u, values, v = np.linalg.svd(core)
    return of_left, of_right, u, v, values


def _reduced(
    product: Product, core: tuple[Wide, Wide, Wide, Wide, Wide], rank: int, rounded: Rounded
) -> LowRank:
    of_left, of_right, u, v, values = core
    norm = math.sqrt(float(np.vdot(values, values)))
    if norm == 0:
        zeros = np.zeros((product.left.shape[0], rank), np.float32)
        return LowRank(zeros, np.zeros((rank, product.right.shape[1]), np.float32), 0.0, 0.0)
    least = values[0] * len(values) * np.finfo(np.float64).eps
    inverse = np.where(values[:rank] > least, values[:rank], np.inf) ** -0.5
    # B·A = Q·core·P: the core's vectors are reached without Q and P, so nothing is inverted.
    to_left = (of_right.T @ v[:rank].T) * inverse
    to_right = inverse[:, None] * (u[:, :rank].T @ of_left)
    left = np.empty((len(product.left), to_left.shape[1]), np.float32)
    for rows in _slices(*product.left.shape):
        left[rows] = rounded(product.left[rows].astype(np.float64) @ to_left)
    right = np.empty((to_right.shape[0], product.right.shape[1]), np.float32)
    for columns in _slices(product.right.shape[1], product.right.shape[0]):
        right[:, columns] = rounded(to_right @ product.right[:, columns].astype(np.float64))
    before, after = _triangle([product.left, left]), _triangle([product.right.T, right.T])
    own = product.left.shape[1]
    difference = before[:, :own] @ after[:, :own].T - before[:, own:] @ after[:, own:].T
    return LowRank(left, right, norm, math.sqrt(float(np.vdot(difference, difference))))


def _triangle(parts: Sequence[npt.NDArray[np.float32]]) -> Wide:
    """Return the triangular factor of the QR decomposition of matrices side by side."""
    width = sum(part.shape[1] for part in parts)
    found: Wide = np.zeros((0, width))
    for rows in _slices(len(parts[0]), width):
        strip = np.concatenate([part[rows] for part in parts], axis=1, dtype=np.float64)
        found = np.asarray(np.linalg.qr(np.concatenate([found, strip]), mode="r"))
    return found


def _slices(num_rows: int, width: int) -> Iterator[slice]:
    """Yield the rows of strips that are at least as long as wide."""
    step = max(width, STRIP_NUM_ELEMENTS // max(1, width), 1)
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))
