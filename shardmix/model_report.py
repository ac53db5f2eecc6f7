"""What is told of a model: flat, typed, ready for JSON. From headers and config alone."""

from dataclasses import dataclass

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
    tensors = tuple(checkpoint.tensors())
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.num_elements
    rows = {name: row for row, name in enumerate(checkpoint.table.names)}
    model = NamedModel(checkpoint.config, declaration_of(checkpoint.config), rows)
    files = checkpoint.table.files.tolist()
    return ModelReport(
        source=checkpoint.source,
        path=str(checkpoint.shards[0].path if checkpoint.is_single_file else checkpoint.folder),
        num_tensors=len(tensors),
        num_parameters=sum(dtypes.values()),
        bytes=sum(shard.nbytes for shard in checkpoint.shards),
        dtypes=dtypes,
        shards=tuple(
            ShardReport(shard.path.name, shard.nbytes, files.count(index), shard.nbytes, ())
            for index, shard in enumerate(checkpoint.shards)
        ),
        tie_word_embeddings=ties_word_embeddings(checkpoint.config),
        tied=shared_with(model),
        tensors=tensors,
    )
