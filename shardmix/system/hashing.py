"""Digests of files: of fixed-size leaves, hashed in any order, or of the file from end to end.

A file is cut into leaves of 4 MiB; the last one may be shorter. Its digest is the digest of its
leaves' digests in order. So it does not depend on who hashed which leaf, or when, and one damaged
leaf changes it. With sha256 the digest is the whole file's, as `sha256sum` and the Hub show it, and
leaves are hashed with XXH3 as well. Knows bytes, not models.
"""

import errno
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import xxhash

from shardmix.errors import RecipeError
from shardmix.system.buffers import buffer_for_reading
from shardmix.system.units import MIB

LEAF_NBYTES = 4 * MIB
"""Part of the digest's definition; chunks may be of any size."""
READ_NBYTES = 256 * 1024
"""Bytes read at once to hash an existing file."""


class Hasher(Protocol):
    """The methods that hashlib, xxhash and blake3 share."""

    def update(self, data: memoryview, /) -> object:
        """Add more bytes."""

    def digest(self) -> bytes:
        """Return the digest of the bytes added so far."""

    def copy(self) -> "Hasher":
        """Return an independent hasher with the same bytes added."""


@dataclass(frozen=True, slots=True)
class _Algorithm:
    """A way to make digests."""

    leaf: Callable[[], Hasher]
    """Makes a hasher of a leaf's bytes."""
    whole: Callable[[], Hasher] | None = None
    """Makes a hasher of a file from end to end; None if its leaves' digests are enough."""
    package: str | None = None
    """Package, and extra of shardmix, that it takes; None if it is always there."""


def _blake3() -> Hasher:
    import blake3

    return blake3.blake3()


XXH3 = "xxh3"
SHA256 = "sha256"
_ALGORITHMS = {
    # Against corruption, at the speed of memory.
    XXH3: _Algorithm(xxhash.xxh3_128),
    # Tamper evidence.
    "blake3": _Algorithm(_blake3, package="blake3"),
    # The whole file's, as the Hub shows it, at the price of one core a file.
    SHA256: _Algorithm(xxhash.xxh3_128, whole=hashlib.sha256),
}
ALGORITHMS = tuple(_ALGORITHMS)
"""Names of all algorithms."""


def check_algorithm(algorithm: str, *, is_choice: bool = True) -> None:
    """Raise `RecipeError` if an algorithm is unknown or not installed.

    `is_choice`: the error names the other algorithms, since the user can choose one.
    """
    if algorithm not in ALGORITHMS:
        raise RecipeError(
            f"must be one of {', '.join(ALGORITHMS)}", subject=f"digest {algorithm!r}"
        )
    package = _ALGORITHMS[algorithm].package
    if package is not None and importlib.util.find_spec(package) is None:
        others = [name for name, each in _ALGORITHMS.items() if each.package is None]
        other = f", or use --digest {' or '.join(others)}" if is_choice else ""
        raise RecipeError(
            f"is not installed (pip install 'shardmix[{package}]')",
            subject=f"digest {algorithm}",
            remedy=f"install it{other}",
        )


def is_sequential(algorithm: str) -> bool:
    """Return True if a digest needs the file to be read from end to end."""
    return _ALGORITHMS[algorithm].whole is not None


def num_leaves(file_nbytes: int) -> int:
    """Return the number of leaves of a file."""
    return -(-file_nbytes // LEAF_NBYTES)


class LeafDigests:
    """The digests of one file's leaves as they become known, in 16 or 32 bytes a leaf."""

    def __init__(self, algorithm: str, file_nbytes: int) -> None:
        self._algorithm = algorithm
        self.digest_nbytes = len(_leaf_hasher(algorithm).digest())
        """Length of one leaf's digest."""
        self._known = bytearray(num_leaves(file_nbytes))
        self._digests = bytearray(len(self._known) * self.digest_nbytes)

    def __len__(self) -> int:
        return len(self._known)

    @property
    def num_known(self) -> int:
        """Number of leaves whose digest is known."""
        return sum(self._known)

    def get(self, leaf: int) -> bytes | None:
        """Return a leaf's digest, or None if it is not known."""
        start = leaf * self.digest_nbytes
        known = self._known[leaf]
        return bytes(self._digests[start : start + self.digest_nbytes]) if known else None

    def put(self, leaf: int, digest: bytes) -> None:
        """Store a leaf's digest."""
        start = leaf * self.digest_nbytes
        self._digests[start : start + self.digest_nbytes] = digest
        self._known[leaf] = True

    def fits(self, leaf: int, digest: bytes) -> bool:
        """Return True if the file has this leaf and the digest has the right length."""
        return 0 <= leaf < len(self._known) and len(digest) == self.digest_nbytes

    def forget(self, leaf: int) -> None:
        """Mark a leaf as unknown again."""
        self._known[leaf] = False

    def file_digest(self) -> str:
        """Return the file's digest (hex); needs all leaves, and is not for sha256."""
        assert all(self._known)
        hasher = _leaf_hasher(self._algorithm)
        hasher.update(memoryview(self._digests))
        return hasher.digest().hex()


class LeafHasher:
    """Hashes a file's bytes in order, from the start of a leaf, and yields each leaf's digest."""

    def __init__(self, algorithm: str, *, file_nbytes: int, first_leaf: int) -> None:
        self._algorithm = algorithm
        self._file_nbytes = file_nbytes
        self._leaf = first_leaf
        self._start()

    def update(self, data: memoryview) -> Iterator[tuple[int, bytes]]:
        """Add more bytes; yield (leaf, digest) of each leaf that they complete."""
        while len(data):
            part, data = data[: self._num_missing], data[self._num_missing :]
            self._hasher.update(part)
            self._num_missing -= len(part)
            if self._num_missing == 0:
                yield self._leaf, self._hasher.digest()
                self._leaf += 1
                self._start()

    def _start(self) -> None:
        self._hasher = _leaf_hasher(self._algorithm)
        self._num_missing = min(LEAF_NBYTES, self._file_nbytes - self._leaf * LEAF_NBYTES)


def file_hasher(algorithm: str) -> Hasher | None:
    """Return a hasher for a whole file if the algorithm needs one, else None."""
    whole = _ALGORITHMS[algorithm].whole
    return None if whole is None else whole()


def digest_nbytes(algorithm: str) -> int:
    """Return the length of a file's digest in bytes."""
    return len((file_hasher(algorithm) or _leaf_hasher(algorithm)).digest())


def read_range(descriptor: int, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """Yield a file's bytes from `start` to `stop`, read into `buffer` a piece at a time.

    Yields fewer bytes if the file ends before `stop`. Raises OSError.
    """
    while start < stop:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), stop - start)]], start)
        if count == 0:
            return
        yield buffer[:count]
        start += count


class FileDigest:
    """The digest of a file as it is now, read in ranges of leaves by several threads."""

    def __init__(self, algorithm: str, file_nbytes: int) -> None:
        self._algorithm = algorithm
        self._file_nbytes = file_nbytes
        self._whole = file_hasher(algorithm)
        self._digests = LeafDigests(algorithm, file_nbytes)

    def read(
        self, descriptor: int, first_leaf: int, stop_leaf: int, buffer: memoryview
    ) -> Iterator[int]:
        """Read a range of leaves through a buffer; yield the number of bytes of each piece.

        If the algorithm `is_sequential`, ranges must come in order. Raises OSError, also if the
        file ends early.
        """
        start = first_leaf * LEAF_NBYTES
        stop = min(stop_leaf * LEAF_NBYTES, self._file_nbytes)
        leaves = LeafHasher(self._algorithm, file_nbytes=self._file_nbytes, first_leaf=first_leaf)
        for data in read_range(descriptor, start, stop, buffer):
            start += len(data)
            if self._whole is not None:
                self._whole.update(data)
            else:
                for leaf, digest in leaves.update(data):
                    self._digests.put(leaf, digest)
            yield len(data)
        if start < stop:
            raise OSError(errno.EIO, f"it ended {stop - start} bytes early while it was read")

    def hex(self) -> str:
        """Return the digest (hex), once all leaves are read."""
        return self._digests.file_digest() if self._whole is None else self._whole.digest().hex()


def file_digest(descriptor: int, algorithm: str) -> str:
    """Return the digest (hex) of an open file as it is now. Raises OSError, also if it shrinks."""
    file_nbytes = os.fstat(descriptor).st_size
    digest = FileDigest(algorithm, file_nbytes)
    buffer = buffer_for_reading(READ_NBYTES)
    for _ in digest.read(descriptor, 0, num_leaves(file_nbytes), buffer):
        pass
    return digest.hex()


def _leaf_hasher(algorithm: str) -> Hasher:
    return _ALGORITHMS[algorithm].leaf()
