"""What is told of a model: flat, typed, ready for JSON. From headers and config alone."""

from dataclasses import dataclass, replace

from shardmix.checkpoint import Checkpoint
from shardmix.declarations import declaration_of
from shardmix.naming import ties_word_embeddings
from shardmix.safetensors_layout import TensorInfo
from shardmix.ties import NamedModel, shared_with


@dataclass(frozen=True, slots=True)
class ShardReport:
    """One output file."""

    name: str
    """File name."""
    bytes: int
    """Its size."""
    num_tensors: int
    """How many tensors it stores."""
    bytes_read: int
    """Source bytes that go into it."""
    sources: tuple[str, ...]
    """The files that those bytes are read from."""


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What a checkpoint holds."""

    source: str
    """As named by the user."""
    path: str
    """Where it lies."""
    num_tensors: int
    """Tensors stored."""
    num_parameters: int
    """Elements of all tensors stored; a tied one counts once."""
    bytes: int
    """Size of the weight files."""
    dtypes: dict[str, int]
    """Elements by safetensors dtype."""
    shards: tuple[ShardReport, ...]
    """The weight files."""
    tie_word_embeddings: bool | None
    """What the config says; None where it says nothing."""
    tied: dict[str, str]
    """Parameter that is not stored → the stored one that it shares."""
    tensors: tuple[TensorInfo, ...]
    """All tensors, by file and within it by offset."""


def describe_model(checkpoint: Checkpoint) -> ModelReport:
    """Return what a checkpoint holds."""
    parts = checkpoint.parts
    tensors = tuple(
        replace(tensor, name=f"{part.place}/{tensor.name}") if part.place else tensor
        for part in parts
        for tensor in part.tensors()
    )
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.num_elements
    tied = {
        f"{prefix}{absent}": f"{prefix}{stored}"
        for part in parts
        for prefix in (f"{part.place}/" if part.place else "",)
        for absent, stored in _tied(part).items()
    }
    return ModelReport(
        source=checkpoint.source,
        path=str(checkpoint.shards[0].path if checkpoint.is_single_file else checkpoint.root),
        num_tensors=len(tensors),
        num_parameters=sum(dtypes.values()),
        bytes=sum(shard.nbytes for part in parts for shard in part.shards),
        dtypes=dtypes,
        shards=tuple(
            ShardReport(
                shard.path.relative_to(part.root).as_posix(),
                shard.nbytes,
                int((part.table.files == index).sum()),
                shard.nbytes,
                (),
            )
            for part in parts
            for index, shard in enumerate(part.shards)
        ),
        tie_word_embeddings=ties_word_embeddings(checkpoint.config),
        tied=tied,
        tensors=tensors,
    )


def _tied(part: Checkpoint) -> dict[str, str]:
    rows = {name: row for row, name in enumerate(part.table.names)}
    return shared_with(NamedModel(part.config, declaration_of(part.config), rows))
