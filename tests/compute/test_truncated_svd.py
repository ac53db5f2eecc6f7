"""Low-rank approximations, beside numpy's full decomposition in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmix.compute.truncated_svd import Product, approximated, approximated_products
from tests.support.sampling import examples


class Held:
    """A matrix in memory, read in strips of a few rows."""

    def __init__(self, values, step=37):
        self.values, self._step = values.astype(np.float32), step
        self.num_reads = 0

    @property
    def shape(self):
        return self.values.shape

    def strips(self):
        self.num_reads += 1
        for first in range(0, len(self.values), self._step):
            yield first, self.values[first : first + self._step]


def narrow(values):
    return values.astype(np.float32)


def with_spectrum(values, rows, columns, seed=0):
    generator = np.random.default_rng(seed)
    count = len(values)
    u = np.linalg.qr(generator.standard_normal((rows, count)))[0]
    v = np.linalg.qr(generator.standard_normal((columns, count)))[0]
    return Held((u * values) @ v.T)


def optimum(values, rank):
    """Return the least error of any matrix of a rank."""
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    return np.sqrt(np.square(singular[rank:]).sum())


def measured(matrix, found):
    product = found.left.astype(np.float64) @ found.right.astype(np.float64)
    return np.linalg.norm(matrix.values.astype(np.float64) - product)


SPECTRA = {
    "flat": lambda count: np.ones(count),
    "slow": lambda count: np.arange(1, count + 1) ** -0.5,
    "fast": lambda count: np.arange(1, count + 1) ** -2.0,
    "exponential": lambda count: np.exp(-np.arange(count) / 5),
}


@pytest.mark.parametrize("shape", [(260, 150), (64, 300), (300, 64), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [1, 4, 16, 40])
def test_error_is_near_the_least(shape, spectrum, rank):
    matrix = with_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    rank = min(rank, *shape)
    found = approximated(matrix, rank, None, narrow)
    norm = np.linalg.norm(matrix.values.astype(np.float64))
    assert found.left.shape[1] <= rank
    assert found.norm == pytest.approx(norm, rel=1e-12)
    assert found.error <= max(1.05 * optimum(matrix.values, rank), 2e-7 * norm)
    assert found.error == pytest.approx(measured(matrix, found), rel=1e-6, abs=1e-12 * norm)


def test_true_rank_is_recovered():
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((500, 6)), generator.standard_normal((6, 400))
    found = approximated(Held(left @ right), 6, None, narrow)
    assert found.error <= 1e-7 * found.norm


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_takes_the_least_rank(energy):
    matrix = with_spectrum(np.exp(-np.arange(64) / 6), 200, 64)
    squares = np.square(np.linalg.svd(matrix.values.astype(np.float64), compute_uv=False))
    least = int(np.searchsorted(np.cumsum(squares), energy * squares.sum() * (1 - 1e-9)) + 1)
    found = approximated(matrix, 40, energy, narrow)
    assert found.left.shape[1] == min(least, 40)
    kept = 1 - (found.error / found.norm) ** 2
    assert kept >= min(energy, np.cumsum(squares)[39] / squares.sum()) - 1e-6


def test_rounding_counts_in_the_error():
    matrix = with_spectrum(np.ones(4), 60, 50)

    def half(values):
        return values.astype(np.float16).astype(np.float32)

    found = approximated(matrix, 4, None, half)
    assert found.error == pytest.approx(measured(matrix, found), rel=1e-6)
    assert found.error > 1e-5 * found.norm


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value):
    values = np.ones((30, 20))
    values[3, 4] = value
    found = approximated(Held(values), 4, None, narrow)
    assert not np.isfinite(found.norm)
    assert found.left.shape[1] == 0


def test_no_change_has_no_factors():
    found = approximated(Held(np.zeros((30, 20))), 4, None, narrow)
    assert (found.norm, found.error, found.left.shape[1]) == (0, 0, 0)


@settings(max_examples=examples(10), deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 9),
)
def test_products_are_the_best(rows, columns, width, rank, seed):
    generator = np.random.default_rng(seed)
    left = generator.standard_normal((rows, width)).astype(np.float32)
    right = generator.standard_normal((width, columns)).astype(np.float32)
    rank = min(rank, rows, columns, width)
    (found,) = approximated_products([Product(left, right)], rank, None, narrow)
    matrix = Held(np.zeros((1, 1)))
    matrix.values = left.astype(np.float64) @ right.astype(np.float64)
    norm = np.linalg.norm(matrix.values)
    assert found.norm == pytest.approx(norm, rel=1e-9)
    assert found.error <= optimum(matrix.values, rank) * 1.000001 + 2e-7 * norm
    assert found.error == pytest.approx(measured(matrix, found), rel=1e-6, abs=1e-9 * norm)


def test_products_share_a_rank():
    generator = np.random.default_rng(0)
    products = [
        Product(
            generator.standard_normal((30, 8)).astype(np.float32) * scale,
            generator.standard_normal((8, 20)).astype(np.float32),
        )
        for scale in (1.0, 1e-3, 0.0)
    ]
    found = approximated_products(products, 8, 0.5, narrow)
    assert len({each.left.shape[1] for each in found}) == 1
    kept = sum(each.norm**2 - each.error**2 for each in found)
    assert kept >= 0.5 * sum(each.norm**2 for each in found)
    assert found[2].error == 0
