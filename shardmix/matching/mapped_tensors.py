"""The tensors of a merge's models that have a row for each token, and their correspondence.

Goes by the declarations of classes, and by usual names for others; shapes only confirm it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardmix.conventions.declarations import Declaration, declaration_of
from shardmix.conventions.naming import has_vocabulary_axis
from shardmix.conventions.tensor_names import class_names, without_wrappers
from shardmix.conventions.vocabulary_tensors import VocabularyTensors, vocabulary_tensors
from shardmix.dtypes import DTYPES, FLOAT_DTYPES
from shardmix.errors import SourceError
from shardmix.matching.tensors import names_of_class
from shardmix.matching.ties import NamedModel, shared_with
from shardmix.sources.base import Source
from shardmix.sources.mapped_rows import MappedTensor, num_rows


@dataclass(frozen=True, slots=True)
class TokenTensors:
    """One model's tensors with a row for each token."""

    tensors: tuple[MappedTensor, ...]
    """The tensors that it stores."""
    shared: tuple[MappedTensor, ...]
    """Parameters that it does not store, but another model does, and that share these."""
    num_rows: int
    """Their number of rows."""
    keys: tuple[str, ...]
    """Dotted keys of its config that count them."""


def token_tensors(sources: Sequence[Source]) -> list[TokenTensors]:
    """Return each model's tensors with a row for each token.

    Raises `SourceError` if a model has none, tensors of several sizes, or one that may have such
    rows without a name that says so.
    """
    declarations = [declaration_of(source.config, source.folder) for source in sources]
    stored = [without_wrappers(source.tensors.names) for source in sources]
    kinds = [
        _kind(source, names, declaration)
        for source, names, declaration in zip(sources, stored, declarations, strict=True)
    ]
    common = names_of_class(stored, declarations)
    held = [
        _held(source, names, declaration)
        for source, names, declaration in zip(sources, common, declarations, strict=True)
    ]
    everywhere = {
        names[row]: tuple(its.get(names[row]) for its in held)
        for kind, names in zip(kinds, common, strict=True)
        for row in kind.rows
    }
    found = []
    for model, (kind, names) in enumerate(zip(kinds, common, strict=True)):
        stored_here = everywhere.keys() & set(names)
        tensors = tuple(MappedTensor(names[row], row, everywhere[names[row]]) for row in kind.rows)
        shared = tuple(
            MappedTensor(name, None, givers)
            for name, givers in everywhere.items()
            if name not in stored_here and givers[model] is not None
        )
        found.append(TokenTensors(tensors, shared, kind.num_rows, kind.declared.keys))
    _refuse_half_known(sources, kinds, common)
    return found


@dataclass(frozen=True, slots=True)
class _Kind:
    declared: VocabularyTensors
    rows: tuple[int, ...]
    num_rows: int


def _kind(source: Source, stored: Sequence[str], declaration: Declaration) -> _Kind:
    names, table = class_names(stored, declaration), source.tensors
    declared = vocabulary_tensors(source.config, names)
    prefix = f"{declaration.prefix}." if declaration.prefix else ""

    def is_among(name: str, known: frozenset[str]) -> bool:
        spelled = (name, prefix + name, name.removeprefix(prefix))
        return any(each in known for each in spelled)

    for name in names:
        if is_among(name, declared.others):
            raise SourceError(
                f"{name} grows with the vocabulary in a way that no map of rows follows",
                subject=source.text,
                remedy="give the models the same tokens first (resize_token_embeddings in "
                "transformers)",
            )
    rows = [row for row, name in enumerate(names) if is_among(name, declared.names)]
    if not rows:
        raise SourceError(
            "has no tensor that is known to have a row for each token, so that none can be mapped",
            subject=source.text,
            remedy="name its class in config.json (architectures), or give the models the same "
            "tokens first",
        )
    sizes = {num_rows(names[row], table.shapes[row]): names[row] for row in rows}
    if len(sizes) > 1:
        words = " and ".join(f"{name} has {size}" for size, name in sizes.items())
        raise SourceError(
            f"its tensors have rows for different numbers of tokens: {words}",
            subject=source.text,
            remedy="give the models the same tokens first",
        )
    (size,) = sizes
    known = set(rows)
    for row, name in enumerate(names):
        shape = table.shapes[row]
        is_named = has_vocabulary_axis(name) and bool(shape) and num_rows(name, shape) == size
        is_named = is_named and not is_among(name, declared.unrelated)
        if row in known or not shape:
            continue
        if is_named:  # a head that the class does not have, such as of a file with more
            rows.append(row)
            continue
        if declared.is_known or size not in shape:
            continue
        raise SourceError(
            f"{name} {list(shape)} may have a row for each of {size} tokens or not: its class is "
            "not known",
            subject=source.text,
            remedy="name a class of transformers in config.json (architectures)",
        )
    for row in rows:
        if DTYPES[table.dtype_ranks[row]] not in FLOAT_DTYPES:
            raise SourceError(
                f"{names[row]} has a row for each token, but holds no floats",
                subject=source.text,
                remedy="merge a checkpoint in float16, bfloat16 or float32",
            )
    return _Kind(declared, tuple(sorted(rows)), size)


def _held(source: Source, names: Sequence[str], declaration: Declaration) -> dict[str, int]:
    """Return parameter → row of the tensor that holds it, also for one that it shares."""
    rows = {name: row for row, name in enumerate(names)}
    model = NamedModel(source.config, declaration, rows)
    shared: Mapping[str, str] = shared_with(model)
    return {**{name: rows[other] for name, other in shared.items()}, **rows}


def _refuse_half_known(
    sources: Sequence[Source], kinds: Sequence[_Kind], common: Sequence[Sequence[str]]
) -> None:
    """Raise `SourceError` if a tensor has a row for each token in one model, but not in another."""
    mapped = [{names[row] for row in kind.rows} for kind, names in zip(kinds, common, strict=True)]
    everywhere = set().union(*mapped)
    for source, own, names in zip(sources, mapped, common, strict=True):
        for name in names:
            if name in everywhere and name not in own:
                raise SourceError(
                    f"{name} has a row for each token in another model, and not by its class",
                    subject=source.text,
                    remedy="name the same class in config.json (architectures) of all models",
                )
