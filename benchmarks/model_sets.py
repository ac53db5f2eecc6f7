"""The sets of checkpoints that bench.py merges, written where they aren't there yet."""

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint_shapes import PRESETS, LlamaShape
from harness import Workspace

TINY = LlamaShape(64, 176, 2, 4, 2, 512)
OFFSETS = re.compile(rb'"data_offsets":\[([0-9]+),([0-9]+)\]')
ONE_FILE = "100GB"
"""A shard size that nothing here comes up to."""


@dataclass(frozen=True, slots=True)
class ModelSet:
    """Checkpoints of one layout."""

    name: str
    models: tuple[Path, ...]
    model_bytes: int
    """Size of one model's weight files."""
    num_tensors: int
    """Of one model."""
    largest_tensor_bytes: int

    def first(self, num_models: int) -> "ModelSet":
        """The set of the first models alone."""
        return replace(self, models=self.models[:num_models])


def model_set(name: str, models: Sequence[Path]) -> ModelSet:
    """A set, with the figures of its first model's headers."""
    files = sorted(models[0].glob("*.safetensors"))
    sizes = [size for path in files for size in tensor_sizes(path)]
    return ModelSet(
        name=name,
        models=tuple(models),
        model_bytes=sum(path.stat().st_size for path in files),
        num_tensors=len(sizes),
        largest_tensor_bytes=max(sizes),
    )


def tensor_sizes(path: Path) -> Iterable[int]:
    """Bytes of each tensor in a file that `checkpoints.py` wrote.

    Not by `json`: as objects a long header takes memory, which would count for what is measured.
    """
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = file.read(header_bytes)
    for entry in OFFSETS.finditer(header):
        yield int(entry[2]) - int(entry[1])


def _written(workspace: Workspace, name: str, letters: str, kind: str, *options: str) -> list[Path]:
    return [
        workspace.checkpoint(f"{name}-{letter}", kind, *options, "--seed", str(seed))
        for seed, letter in enumerate(letters)
    ]


def llamas(workspace: Workspace, preset: str, *, num_layers: int | None = None) -> ModelSet:
    """Three sharded Llamas; of fewer layers where `num_layers` says so."""
    name = preset if num_layers is None else f"{preset}-{num_layers}-layers"
    options = ["--preset", preset]
    options += [] if num_layers is None else ["--num-hidden-layers", str(num_layers)]
    return model_set(name, _written(workspace, name, "abc", "llama", *options))


def tiny(workspace: Workspace) -> ModelSet:
    """Two of some hundred KB, which every tool merges: to bring the tool into the page cache."""
    options = [
        word
        for name in TINY.__dataclass_fields__
        for word in (f"--{name.replace('_', '-')}", str(getattr(TINY, name)))
    ]
    return model_set("tiny", _written(workspace, "tiny", "ab", "llama", *options))


def single_files(workspace: Workspace, preset: str) -> ModelSet:
    """Two Llamas of one file each."""
    name = f"{preset}-single-file"
    options = ["--preset", preset, "--max-shard-size", ONE_FILE]
    return model_set(name, _written(workspace, name, "ab", "llama", *options))


def small_tensors(workspace: Workspace, num_tensors: int, like: ModelSet, preset: str) -> ModelSet:
    """As many bytes as `like` has, in shards as large, as experts of 64 KiB to 4 MiB."""
    name = f"moe-{num_tensors}"
    options = ["--num-tensors", str(num_tensors), "--total-size", str(like.model_bytes)]
    options += ["--max-shard-size", str(PRESETS[preset][1])]
    return model_set(name, _written(workspace, name, "abc", "mixed-moe", *options))


def giants(workspace: Workspace, tensor_bytes: int) -> ModelSet:
    """Two one-layer Llamas whose embedding alone has `tensor_bytes` or a little more."""
    name = f"giant-{tensor_bytes // 1024**2}MiB"
    options = ["--tensor-size", str(tensor_bytes)]
    return model_set(name, _written(workspace, name, "ab", "giant", *options))


def many(workspace: Workspace, originals: ModelSet, num_models: int) -> ModelSet:
    """The set made longer by hard links to its models: other checkpoints of the same bytes."""
    models = list(originals.models)
    for number in range(len(models), num_models):
        source = originals.models[number % len(originals.models)]
        models.append(workspace.linked_copy(source, f"{originals.name}-copy-{number}"))
    return replace(originals, models=tuple(models[:num_models]))
