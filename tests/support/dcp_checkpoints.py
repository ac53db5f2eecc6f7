"""Distributed checkpoints of torch: as torch writes them, and cut into any boxes."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a chunk."""
Cut = Callable[[str, tuple[int, ...]], Sequence[Box]]
"""Divides a tensor, by name and shape, into chunks."""


def whole(_: str, shape: tuple[int, ...]) -> list[Box]:
    """Keep a tensor in one chunk."""
    return [((0,) * len(shape), shape)]


def cut_along(axis: int, count: int) -> Cut:
    """Cut a tensor into so many chunks along a dimension, as `Shard(axis)` does."""

    def cut(_: str, shape: tuple[int, ...]) -> list[Box]:
        if len(shape) <= axis:
            return whole(_, shape)
        found, start = [], 0
        for piece in torch.arange(shape[axis]).chunk(count):
            offsets, sizes = [0] * len(shape), list(shape)
            offsets[axis], sizes[axis] = start, len(piece)
            found.append((tuple(offsets), tuple(sizes)))
            start += len(piece)
        return found

    return cut


def save_dcp(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    cut: Cut = whole,
    under: str | None = "model",
    num_files: int = 3,
    change: Callable[[Metadata], object] = lambda metadata: None,
    stored: Callable[[torch.Tensor], torch.Tensor] = lambda chunk: chunk.clone(),
) -> Path:
    """Save a checkpoint as ranks do that hold these chunks, in turns.

    `under` is the key of the model in the state; without it the tensors are at the top. `change`
    alters the description before it is written, `stored` each chunk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(num_files)]
    described: dict[str, Any] = {}
    records, paths = {}, {}
    number = 0
    for name, tensor in tensors.items():
        key = name if under is None else f"{under}.{name}"
        paths[key] = (name,) if under is None else (under, name)
        boxes = cut(name, tuple(tensor.shape))
        described[key] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype),
            tensor.size(),
            [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes],
        )
        for index, (at, sizes) in enumerate(boxes):
            place = tuple(slice(low, low + size) for low, size in zip(at, sizes, strict=True))
            file = files[number % num_files]
            start = file.tell()
            torch.save(stored(tensor[place]), file)
            where = _StorageInfo(f"__{number % num_files}_0.distcp", start, file.tell() - start)
            records[MetadataIndex(key, at, index)] = where
            number += 1
    described["step"] = BytesStorageMetadata()
    paths["step"] = ("step",)
    records[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 1)
    metadata = Metadata(described, paths, records, StorageMeta(folder, "id"), "1.0.0")
    change(metadata)
    for index, file in enumerate(files):
        (folder / f"__{index}_0.distcp").write_bytes(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "config.json").write_text("{}")
    return folder
