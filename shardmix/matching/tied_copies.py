"""Copies of tied parameters that files of torch.save name twice, as views of one storage.

transformers leaves the second name out of safetensors. The same models must merge alike from both
formats, so it is left out here as well, if the class declares the tie and the config has it.
"""

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from shardmix.conventions.declarations import declaration_of
from shardmix.matching.ties import NamedModel, pairs_of
from shardmix.sources.base import Readers, Source, TensorReader, WrappedSource


def without_tied_copies(source: Source) -> Source:
    """Return a source without the second names of tied parameters that share their bytes."""
    groups = _names_of_one_storage(source)
    if not groups:
        return source
    table = source.tensors
    rows = {name: row for row, name in enumerate(table.names)}
    model = NamedModel(source.config, declaration_of(source.config, source.folder), rows)
    copies = {
        pair.target
        for pair in pairs_of(model, dict.fromkeys(rows))
        if pair.tie.is_in_force(source.config)
        and any(pair.target in group and pair.source in group for group in groups)
    }
    if not copies:
        return source
    kept = [row for name, row in rows.items() if name not in copies]
    return _Chosen(source, np.array(kept, np.int32))


def _names_of_one_storage(source: Source) -> list[set[str]]:
    """Return the names of tensors that are stored at the same place, in groups."""
    table, groups = source.tensors, defaultdict(set)
    columns = zip(table.files.tolist(), table.starts.tolist(), strict=True)
    for row, place in enumerate(columns):
        if table.nbytes[row] and not table.is_decoded(row):
            groups[place, table.shapes[row], int(table.dtype_ranks[row])].add(table.names[row])
    return [names for names in groups.values() if len(names) > 1]


class _Chosen(WrappedSource):
    """Some tensors of a source."""

    def __init__(self, inner: Source, rows: npt.NDArray[np.int32]) -> None:
        super().__init__(inner, inner.tensors.take(rows))
        self._rows = rows

    def open_reader(self) -> TensorReader:
        """Return a reader that knows these tensors by their own rows."""
        return _ChosenReader(self._inner.open_reader(), self._rows)

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return such a reader; the inner source reads its base by `shared`."""
        return _ChosenReader(self._inner.open_shared_reader(shared), self._rows)


class _ChosenReader:
    """Reads tensors of the inner source by other numbers."""

    def __init__(self, inner: TensorReader, rows: npt.NDArray[np.int32]) -> None:
        self._inner, self._rows = inner, rows
        self.overhead_nbytes = inner.overhead_nbytes

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into` with elements of a tensor from `start` on. Raises `SourceError`."""
        self._inner.read(int(self._rows[row]), start, into)

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon."""
        self._inner.prefetch(int(self._rows[row]), start, num_elements)

    def close(self) -> None:
        """Close the inner reader."""
        self._inner.close()
