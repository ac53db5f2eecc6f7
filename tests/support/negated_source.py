"""Sources that decode, for tests of the seam: one negates bfloat16, one widens it to float32."""

from dataclasses import replace

import numpy as np

from shardmix.dtypes import DTYPE_RANK
from shardmix.sources import resolve
from shardmix.sources.base import Opening, Source, SourceKind, TensorReader, WrappedSource
from shardmix.sources.checkpoint import open_checkpoint
from shardmix.sources.identity import SourceIdentity

MARK = "negated"
"""A file of this name makes a folder one of this kind."""
READER_NBYTES = 3 * 1024 * 1024
"""What its readers say that they take."""


class NegatedSource(WrappedSource):
    """A checkpoint whose matrices in bfloat16 have the other sign in the file."""

    def __init__(self, inner: Source) -> None:
        tensors = inner.tensors
        rows = [
            row for row, info in enumerate(tensors) if info.dtype == "BF16" and len(info.shape) == 2
        ]
        super().__init__(inner, tensors.with_decoded(rows))

    @property
    def identity(self) -> SourceIdentity:
        return replace(self._inner.identity, decoding="negated")

    def open_reader(self) -> TensorReader:
        return NegatingReader(self._inner, self._tensors.decoded)


class NegatingReader:
    """Turns the sign bits of what it reads."""

    overhead_nbytes = READER_NBYTES

    def __init__(self, source: Source, decoded) -> None:
        self._inner, self._decoded = source.open_reader(), decoded

    def read(self, row, start, into):
        self._inner.read(row, start, into)
        if self._decoded is not None and self._decoded[row]:
            np.frombuffer(into, np.uint16)[:] ^= 0x8000

    def prefetch(self, row, start, num_elements):
        self._inner.prefetch(row, start, num_elements)

    def close(self):
        self._inner.close()


def open_negated(opening: Opening) -> Source | None:
    """Open a folder of this kind; None if it is another."""
    if not (opening.located.path / MARK).exists():
        return None
    return NegatedSource(open_checkpoint(opening))


def add_kind(monkeypatch) -> None:
    """Let texts stand for sources of this kind, as one line in the table does."""
    monkeypatch.setattr(
        resolve, "KINDS", (SourceKind(open_negated, lambda _: None), *resolve.KINDS)
    )


class WidenedSource(WrappedSource):
    """A source whose tensors in bfloat16 are decoded to float32; outputs keep bfloat16."""

    def __init__(self, inner: Source) -> None:
        tensors = inner.tensors
        stored = tensors.dtype_ranks == DTYPE_RANK["BF16"]
        ranks = np.where(stored, DTYPE_RANK["F32"], tensors.dtype_ranks).astype(np.uint8)
        nbytes = np.where(stored, 2 * tensors.nbytes, tensors.nbytes)
        wide = replace(tensors, dtype_ranks=ranks, nbytes=nbytes, kept_ranks=tensors.dtype_ranks)
        super().__init__(inner, wide.with_decoded(np.flatnonzero(stored)))

    @property
    def identity(self) -> SourceIdentity:
        return replace(self._inner.identity, decoding="widened")

    def open_reader(self) -> TensorReader:
        return WideningReader(self._inner, self._tensors.decoded)


class WideningReader(NegatingReader):
    """Gives float32 for bfloat16."""

    def read(self, row, start, into):
        if not self._decoded[row]:
            self._inner.read(row, start, into)
            return
        stored = bytearray(len(into) // 2)
        self._inner.read(row, start, memoryview(stored))
        np.frombuffer(into, np.uint32)[:] = np.frombuffer(stored, np.uint16).astype(np.uint32) << 16


def add_decoder(monkeypatch, decoder=WidenedSource) -> None:
    """Let all sources that are opened be decoded."""
    monkeypatch.setattr(resolve, "DECODERS", (decoder,))
