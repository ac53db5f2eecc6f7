"""Factors of matrices in a file of this merge's own, as the tensors of an adapter."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardmix.dtypes import DTYPE_RANK, tensor_nbytes
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource
from shardmix.sources.identity import FileStamp, SourceFile, SourceIdentity
from shardmix.sources.readers import StoredReader

_DTYPE = "F32"


@dataclass(frozen=True, slots=True)
class StoredFactor:
    """The factors of one parameter."""

    name: str
    """Name of the parameter in the base's files."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of A and B."""
    start: int
    """First byte of A in the file; B follows."""

    def tensors(self, names: tuple[str, str]) -> list[tuple[str, tuple[int, ...], int]]:
        """Return A and B as tensors of these names: name, shape and first byte of each."""
        start, found = self.start, []
        for name, shape in zip(names, self.shapes, strict=True):
            found.append((name, shape, start))
            start += tensor_nbytes(_DTYPE, shape)
        return found


@dataclass(frozen=True, slots=True)
class FactorFile:
    """A file of factors in float32."""

    file: SourceFile
    """The file."""
    factors: tuple[StoredFactor, ...]
    """Its content."""
    digest: str
    """Digest of all factors."""

    @classmethod
    def of(
        cls, path: str, status: os.stat_result, factors: tuple[StoredFactor, ...], *, digest: str
    ) -> "FactorFile":
        """Return the file with its present status."""
        stamp = FileStamp.of(status)
        file = SourceFile(path, status.st_size, status.st_mtime_ns, name="factors", stamp=stamp)
        return cls(file, factors, digest)


class StoredFactors(WrappedSource):
    """Tensors that lie in a file of factors; `inner` is one of the models that it is made from.

    `tensors` are name, shape, and first byte.
    """

    def __init__(
        self,
        inner: Source,
        file: SourceFile,
        tensors: Sequence[tuple[str, tuple[int, ...], int]],
    ) -> None:
        self._file = file
        self._stored = _table(tensors)
        super().__init__(inner, self._stored.with_decoded(range(len(tensors))))

    @property
    def identity(self) -> SourceIdentity:
        """Identity of the file."""
        return SourceIdentity((self._file,), decoding="low-rank factors")

    uses_kernels = False
    """Its readers compile none."""

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker."""
        return StoredReader((self._file,), self._stored)

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return a reader for one worker: no base is read."""
        return self.open_reader()

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the file changed."""
        self.identity.check_unchanged()


def _table(tensors: Sequence[tuple[str, tuple[int, ...], int]]) -> TensorTable:
    count = len(tensors)
    return TensorTable(
        names=tuple(name for name, _, _ in tensors),
        shapes=tuple(shape for _, shape, _ in tensors),
        dtype_ranks=np.full(count, DTYPE_RANK[_DTYPE], np.uint8),
        files=np.zeros(count, np.int32),
        starts=np.array([start for _, _, start in tensors], np.int64),
        nbytes=np.array([tensor_nbytes(_DTYPE, shape) for _, shape, _ in tensors], np.int64),
    )
