"""The report of a model, from its headers."""

from dataclasses import dataclass, replace
from pathlib import Path

from shardmix.conventions.declarations import declaration_of
from shardmix.conventions.naming import ties_word_embeddings
from shardmix.formats.safetensors_layout import TensorInfo
from shardmix.matching.ties import NamedModel, shared_with
from shardmix.reports.plan_facts import ShardReport
from shardmix.sources.base import Source


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The tensors and shards of a model."""

    source: str
    """The user's name for it."""
    path: str
    """Its path."""
    num_tensors: int
    """Number of tensors stored."""
    num_parameters: int
    """Elements of all tensors stored; a tied one counts once."""
    bytes: int
    """Size of the weight files."""
    dtypes: dict[str, int]
    """Elements by safetensors dtype."""
    shards: tuple[ShardReport, ...]
    """The weight files."""
    tie_word_embeddings: bool | None
    """The config's value, or None if it has none."""
    tied: dict[str, str]
    """Parameter that is not stored → the stored one that it shares."""
    tensors: tuple[TensorInfo, ...]
    """All tensors, by file and within it by offset."""


def describe_model(source: Source) -> ModelReport:
    """Return the report of a source."""
    parts = source.parts
    tensors = tuple(
        replace(tensor, name=f"{part.subfolder}/{tensor.name}") if part.subfolder else tensor
        for part in parts
        for tensor in part.tensors
    )
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.num_elements
    tied = {
        f"{prefix}{absent}": f"{prefix}{stored}"
        for part in parts
        for prefix in (f"{part.subfolder}/" if part.subfolder else "",)
        for absent, stored in _tied(part).items()
    }
    return ModelReport(
        source=source.text,
        path=str(_location(source)),
        num_tensors=len(tensors),
        num_parameters=sum(dtypes.values()),
        bytes=sum(file.nbytes for part in parts for file in part.identity.files),
        dtypes=dtypes,
        shards=tuple(
            ShardReport(
                file.name,
                file.nbytes,
                int((part.tensors.files == index).sum()),
                file.nbytes,
                (),
            )
            for part in parts
            for index, file in enumerate(part.identity.files)
        ),
        tie_word_embeddings=ties_word_embeddings(source.config),
        tied=tied,
        tensors=tensors,
    )


def _location(source: Source) -> Path:
    """Return what a model is on the disk: its folder, or its one file."""
    return source.root / source.identity.files[0].name if source.is_single_file else source.root


def _tied(part: Source) -> dict[str, str]:
    rows = {name: row for row, name in enumerate(part.tensors.names)}
    return shared_with(NamedModel(part.config, declaration_of(part.config), rows))
