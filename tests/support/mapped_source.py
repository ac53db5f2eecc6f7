"""Sources with mapped rows, made by hand, for tests of the seam."""

import numpy as np

from shardmix.sources import resolve
from shardmix.sources.base import Source
from shardmix.sources.mapped_rows import (
    AVERAGE,
    MEAN,
    ZERO,
    MappedRowsSource,
    MappedTensor,
    RowMaps,
    RowRuns,
)
from tests.support.vocabularies import EMBEDDING, HEAD

MARK = "mapped"
"""A file of this name makes a folder one of this kind; a model beside it gives further rows."""
GIVERS = [0, 0, 0, 1, 1, 0, ZERO, MEAN, MEAN, MEAN, 0, 1, AVERAGE, AVERAGE]
"""Who gives each row."""
ROWS = [2, 3, 4, 0, 1, 9, 0, 0, 0, 0, 0, 7, 0, 0]
"""Its row there."""
OWN = (
    [2, 3, 4, -1, -1, 9, -1, 5, -1, 6, 0, -1, -1, -1],
    [-1, -1, -1, 0, 1, -1, -1, 3, 5, 4, -1, 7, -1, -1],
)
"""The rows of both models themselves."""


def runs(givers: list[int], rows: list[int]) -> RowRuns:
    """Return runs of single rows."""
    return RowRuns.of(np.array(givers, np.int16), np.array(rows, np.int32))


def mapped(source: Source) -> Source | None:
    """Map the rows of a folder of this kind; None if it is another."""
    if not (source.folder / MARK).exists():
        return None
    other = resolve.open_source(str(source.folder.parent / "other"))
    own = [
        runs([model if row >= 0 else ZERO for row in its], [max(row, 0) for row in its])
        for model, its in enumerate(OWN)
    ]
    filled = runs(GIVERS, ROWS)
    names = [source.tensors.names, other.tensors.names]
    tensors = [
        MappedTensor(name, names[0].index(name), tuple(its.index(name) for its in names))
        for name in (EMBEDDING, HEAD)
    ]
    maps = RowMaps(tuple(own), (filled, filled))
    return MappedRowsSource([source, other], 0, maps, tensors, source.config)


def add_mapping(monkeypatch) -> None:
    """Let texts stand for sources of this kind."""
    monkeypatch.setattr(resolve, "DECODERS", (mapped, *resolve.DECODERS))
