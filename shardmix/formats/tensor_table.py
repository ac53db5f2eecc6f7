"""The tensors of a model in columns, one row a tensor: names, shapes, dtypes and offsets.

Pure: knows no files. Ten models of 90,000 tensors would take hundreds of megabytes as objects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPES
from shardmix.formats.safetensors_layout import TensorInfo


@dataclass(frozen=True, slots=True)
class View:
    """The way that a tensor's elements lie in its file."""

    offset: int
    """Offset of the first element, in bytes."""
    strides: tuple[int, ...]
    """Distance between neighbours in each dimension, in elements; none is negative."""
    shape: tuple[int, ...] = ()
    """Its dimensions, if they are not the tensor's: a dimension may be divided in two."""


@dataclass(frozen=True, slots=True)
class TensorTable:
    """All tensors of a model, by file and within it by offset; row i is one tensor.

    Dtypes, shapes and sizes are those that a reader gives, of decoded tensors after decoding.
    Decoded tensors form a stream of their own: they follow one another in the order of their rows,
    without gaps. So neighbours in it are read as one range, as in a file.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype_ranks: npt.NDArray[np.uint8]
    """Index into `dtypes.DTYPES`."""
    files: npt.NDArray[np.int32]
    """Index into the source's files: the file that stores a tensor, or (if decoded) that it belongs
    to."""
    starts: npt.NDArray[np.int64]
    """First byte in its file, or in the stream of decoded tensors."""
    nbytes: npt.NDArray[np.int64]
    decoded: npt.NDArray[np.bool_] | None = None
    """True for tensors that are decoded while they are read; None if there are none."""
    kept_ranks: npt.NDArray[np.uint8] | None = None
    """Index into `dtypes.DTYPES` of each tensor's dtype in an output that keeps dtypes; None if it
    is the reader's. Decoded values are wider than what the model is stored in."""

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.names)

    def __getitem__(self, row: int) -> TensorInfo:
        """Return one row."""
        return TensorInfo(
            name=self.names[row],
            dtype=DTYPES[self.dtype_ranks[row]],
            shape=self.shapes[row],
            start=int(self.starts[row]),
            nbytes=int(self.nbytes[row]),
        )

    def __iter__(self) -> Iterator[TensorInfo]:
        """Yield every tensor, in the order of rows."""
        return (self[row] for row in range(len(self)))

    def kept_dtypes(self, rows: npt.NDArray[np.int32]) -> list[str]:
        """Return the dtypes of these rows' tensors in an output that keeps dtypes."""
        ranks = self.dtype_ranks if self.kept_ranks is None else self.kept_ranks
        return [DTYPES[rank] for rank in ranks[rows].tolist()]

    def is_decoded(self, row: int) -> bool:
        """Return True if a tensor is decoded while it is read."""
        return self.decoded is not None and bool(self.decoded[row])

    def take(self, rows: Sequence[int]) -> "TensorTable":
        """Return rows by their numbers; all decoded ones are among them, as they are one stream."""
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            shapes=tuple(self.shapes[row] for row in rows),
            dtype_ranks=self.dtype_ranks[rows],
            files=self.files[rows],
            starts=self.starts[rows],
            nbytes=self.nbytes[rows],
            decoded=None if self.decoded is None else self.decoded[rows],
            kept_ranks=None if self.kept_ranks is None else self.kept_ranks[rows],
        )

    def with_decoded(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "TensorTable":
        """Return the same tensors with these rows decoded, besides those that are already."""
        decoded = np.zeros(len(self), np.bool_) if self.decoded is None else self.decoded.copy()
        decoded[rows] = True
        starts = self.starts.copy()
        starts[decoded] = np.cumsum(self.nbytes[decoded]) - self.nbytes[decoded]
        return replace(self, starts=starts, decoded=decoded)
