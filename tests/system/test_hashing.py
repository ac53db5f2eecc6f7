"""Leaves and their digests, without any file."""

import pytest

from shardmix.system.hashing import LEAF_NBYTES, LeafDigests


@pytest.mark.parametrize(("algorithm", "nbytes"), [("xxh3", 16), ("sha256", 16)])
def test_what_fits_a_file(algorithm, nbytes):
    """A journal may claim anything: leaves that the file has not, digests of another length."""
    leaves = LeafDigests(algorithm, 2 * LEAF_NBYTES + 1)
    assert len(leaves) == 3
    assert [leaves.fits(leaf, bytes(nbytes)) for leaf in (-1, 0, 2, 3)] == [
        False,
        True,
        True,
        False,
    ]
    assert not leaves.fits(0, bytes(nbytes - 1))
    assert not leaves.fits(0, bytes(nbytes + 1))
