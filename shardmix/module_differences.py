"""In what the modules of sentence-transformers models differ.

Reads small files, and bytes of weights that cannot be merged; changes nothing.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from shardmix.checkpoint import Checkpoint
from shardmix.differences import Difference
from shardmix.errors import SourceError
from shardmix.filesystem import open_regular, refuse_link_outside
from shardmix.module_tree import Module
from shardmix.parts import match_parts
from shardmix.sentence_modules import MODULES_NAME

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")
_PIECE_NBYTES = 1 << 20


def module_differences(checkpoints: Sequence[Checkpoint]) -> Iterator[Difference]:
    """Yield in what the models' modules differ; nothing if at most one model has modules."""
    yield from _weights_of_some(checkpoints)
    yield from _unmerged_weights(checkpoints)


def _weights_of_some(checkpoints: Sequence[Checkpoint]) -> Iterator[Difference]:
    """Find modules with weights that not every model has."""
    unmatched = {id(part) for part in match_parts(checkpoints).unmatched}
    for checkpoint in checkpoints:
        places = [part.place for part in checkpoint.parts if id(part) in unmatched]
        if places:
            others = [
                other.source
                for other in checkpoints
                if not all(
                    any(part.key == mine.key for part in other.parts)
                    for mine in checkpoint.parts
                    if id(mine) in unmatched
                )
            ]
            yield Difference(
                MODULES_NAME,
                f"{', '.join(f'{place}/' for place in places)}: holds weights in "
                f"{checkpoint.source}, and {', '.join(others)} has no such module",
                "they are not merged",
                is_refused=True,
            )


def _unmerged_weights(checkpoints: Sequence[Checkpoint]) -> Iterator[Difference]:
    """Find weights in modules that cannot be merged, unless they are the same everywhere."""
    giver = next((checkpoint for checkpoint in checkpoints if checkpoint.modules), None)
    if giver is None:
        return
    merged = {part.place for part in giver.parts}
    for module in giver.modules:
        if not module.place or module.place in merged:
            continue
        for name in _weight_files(giver.root, module.place):
            others = [
                other.source
                for other in checkpoints
                if other is not giver and not _has_same_file(giver, other, module, name)
            ]
            if others:
                yield Difference(
                    f"{module.place}/{name}",
                    f"{module.place}/{name}: is another in {giver.source} than in "
                    f"{', '.join(others)}, and no model.safetensors, so that it cannot be merged "
                    "(load each model in sentence-transformers and save it: that writes one)",
                    f"the output takes {giver.source}'s",
                    is_refused=True,
                )


def _weight_files(root: Path, place: str) -> list[str]:
    refuse_link_outside(root, root / place)
    try:
        names = (path.name for path in (root / place).iterdir())
        return sorted(name for name in names if name.endswith(_WEIGHTS))
    except FileNotFoundError:
        return []


def _has_same_file(giver: Checkpoint, other: Checkpoint, module: Module, name: str) -> bool:
    """Tell whether another model has the same bytes in a file of the corresponding module."""
    place = next((each.place for each in other.modules if each.key == module.key), None)
    if place is None:
        return False
    mine, theirs = giver.root / module.place / name, other.root / place / name
    for root, path in ((giver.root, mine), (other.root, theirs)):
        if os.path.lexists(path):
            refuse_link_outside(root, path)
    try:
        with open_regular(mine) as first, open_regular(theirs) as second:
            if os.fstat(first.fileno()).st_size != os.fstat(second.fileno()).st_size:
                return False
            while piece := first.read(_PIECE_NBYTES):
                if piece != second.read(_PIECE_NBYTES):
                    return False
            return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read ({error.strerror})") from None
