"""Copies of tied parameters: files of torch.save name one storage twice, DCP stores it twice.

transformers leaves the second name out of safetensors. The same models must merge alike from both
formats, so it is left out here as well, if the class declares the tie and the config has it.
"""

from collections import defaultdict

from shardmix.conventions.declarations import declaration_of
from shardmix.matching.ties import NamedModel, pairs_of
from shardmix.sources.base import Source
from shardmix.sources.rearranged import RearrangedSource


def without_tied_copies(source: Source) -> Source:
    """Return a source without the second names of tied parameters that share their bytes."""
    groups = [*_names_of_one_storage(source), *source.copies]
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
    return RearrangedSource(source, table.take(kept), kept, [0] * len(kept))


def _names_of_one_storage(source: Source) -> list[set[str]]:
    """Return the names of tensors that are stored at the same place, in groups."""
    table, groups = source.tensors, defaultdict(set)
    columns = zip(table.files.tolist(), table.starts.tolist(), strict=True)
    for row, place in enumerate(columns):
        if table.nbytes[row] and not table.is_decoded(row):
            groups[place, table.shapes[row], int(table.dtype_ranks[row])].add(table.names[row])
    return [names for names in groups.values() if len(names) > 1]
