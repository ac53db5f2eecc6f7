"""A kind of source whose changes to a base are known: floats of another model, plus a constant."""

import json
from dataclasses import replace

import numpy as np

from shardmix.dtypes import DTYPE_RANK, FLOAT_DTYPES
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources import resolve
from shardmix.sources.base import Opening, Source, SourceKind, TensorReader, WrappedSource
from shardmix.sources.identity import SourceIdentity

MARK = "shift.json"
"""A file of this name makes a folder one of this kind: the base's path, and the constant."""


class ShiftedSource(WrappedSource):
    """The base's floats plus a constant, in float32."""

    path = ""

    def __init__(self, base: Source, path, shift: float, *, holds_changes: bool = False) -> None:
        super().__init__(base, _in_float32(base.tensors))
        self.path = str(path)
        self._shift, self._holds_changes = shift, holds_changes

    @property
    def identity(self) -> SourceIdentity:
        return replace(self._inner.identity, decoding=f"shifted by {self._shift}")

    @property
    def holds_changes(self) -> bool:
        return self._holds_changes

    def changes_to(self, base: Source) -> Source | None:
        if base.identity != self._inner.identity:
            return None
        return ShiftedSource(self._inner, self.path, self._shift, holds_changes=True)

    def open_reader(self) -> TensorReader:
        return _Shifting(self._inner, np.float32(self._shift), self._holds_changes)


class _Shifting:
    """Reads bfloat16 and adds, or gives the constant alone."""

    overhead_nbytes = 1 << 20

    def __init__(self, base: Source, shift, gives_changes) -> None:
        self._base, self._shift, self._gives_changes = base.open_reader(), shift, gives_changes

    def read(self, row, start, into):
        out = np.frombuffer(into, np.float32)
        if self._gives_changes:
            out[:] = self._shift
            return
        stored = bytearray(len(into) // 2)
        self._base.read(row, start, memoryview(stored))
        out.view(np.uint32)[:] = np.frombuffer(stored, np.uint16).astype(np.uint32) << 16
        out += self._shift

    def prefetch(self, row, start, num_elements):
        pass

    def close(self):
        self._base.close()


def _in_float32(tensors: TensorTable) -> TensorTable:
    is_float = np.isin(tensors.dtype_ranks, [DTYPE_RANK[dtype] for dtype in FLOAT_DTYPES])
    ranks = np.where(is_float, DTYPE_RANK["F32"], tensors.dtype_ranks).astype(np.uint8)
    nbytes = np.where(is_float, 2 * tensors.nbytes, tensors.nbytes)
    wide = replace(tensors, dtype_ranks=ranks, nbytes=nbytes, kept_ranks=tensors.dtype_ranks)
    return wide.with_decoded(np.flatnonzero(is_float))


def open_shifted(opening: Opening) -> Source | None:
    """Open a folder of this kind; None if it is another."""
    mark = opening.located.path / MARK
    if not mark.exists():
        return None
    base, shift = json.loads(mark.read_text())
    return ShiftedSource(opening.open_other(base), mark.parent, shift)


def save_shifted(folder, base, shift: float):
    """Write a folder that stands for the base's bfloat16 floats plus a constant."""
    folder.mkdir()
    (folder / MARK).write_text(json.dumps([str(base), shift]))
    return folder


def add_kind(monkeypatch) -> None:
    """Let texts stand for sources of this kind."""
    kind = SourceKind(open_shifted, lambda _: None)
    monkeypatch.setattr(resolve, "KINDS", (kind, *resolve.KINDS))
