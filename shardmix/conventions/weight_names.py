"""Names of weight files that loaders look for, of their shards and indexes.

Pure rules on names; opens nothing.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

MODEL = "model"
"""Name that transformers, sentence-transformers and timm load, without its suffix."""
DIFFUSERS = "diffusion_pytorch_model"
"""Name that diffusers loads for a component, such as a UNet or a VAE."""
MISTRAL = "consolidated"
"""Name that mistral-inference and vLLM load beside a params.json."""
OPEN_CLIP = "open_clip_model"
"""Name that open_clip loads beside an open_clip_config.json ..."""
OPEN_CLIP_OLD = "open_clip_pytorch_model"
"""... and the name it tries after that."""

STEMS = (MODEL, DIFFUSERS, MISTRAL, OPEN_CLIP, OPEN_CLIP_OLD)
"""All names that some loader looks for in a model's folder."""

MARKS = {
    MISTRAL: "params.json",
    OPEN_CLIP: "open_clip_config.json",
    OPEN_CLIP_OLD: "open_clip_config.json",
}
"""Stem → the file beside such weights that makes them a model; config.json for other stems."""

SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files of `torch.save`."""
DCP_METADATA = ".metadata"
"""The file that describes a distributed checkpoint of torch (DCP) ..."""
DCP_SUFFIX = ".distcp"
"""... and the suffix of those that hold its chunks."""

# The folder of such a checkpoint beside config and tokenizer, as accelerate names it.
_FSDP_FOLDER = re.compile(r"pytorch_model_fsdp_\d+")
_SHARD = re.compile(
    r"(?P<stem>.+?)[-_.](?P<number>\d{1,6})[-_.]?of[-_.]?(?P<count>\d{1,6})(?P<end>\.\w+)"
)


@dataclass(frozen=True, slots=True)
class ShardName:
    """The name of one of several weight files that together are a model."""

    stem: str
    """The part of the name that they share."""
    number: int
    """Number of this file."""
    count: int
    """Number of all files."""


def weights_name(stem: str) -> str:
    """Return the name of a model's weights in one file."""
    return stem + SUFFIX


def index_name(stem: str) -> str:
    """Return the name of the index of a model's weights in shards."""
    return stem + SUFFIX + ".index.json"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The names of a folder's weight files."""

    stem: str
    """Stem of such weights in safetensors: the output's."""
    whole: str
    """Name of the file that holds all weights."""
    index: str
    """Name of the index of shards."""


_IN_SAFETENSORS = tuple(StoredWeights(stem, weights_name(stem), index_name(stem)) for stem in STEMS)
# As torch.save writes them: the same loaders' names, if there is nothing in safetensors.
_IN_TORCH_FILES = tuple(
    StoredWeights(stem, f"{name}.bin", f"{name}.bin.index.json")
    for name, stem in (
        ("pytorch_model", MODEL),
        (DIFFUSERS, DIFFUSERS),
        (OPEN_CLIP_OLD, OPEN_CLIP_OLD),
    )
)
ALL_WEIGHTS = (*_IN_SAFETENSORS, *_IN_TORCH_FILES)
"""All names that some loader looks for, in the order in which they count."""


def stored_weights(
    has: Callable[[str], bool], *, is_diffusers: bool = False
) -> StoredWeights | None:
    """Return a folder's weights, or None if it has none; `has` tells if a file exists.

    A component of diffusers is loaded from diffusers' own name first.
    """
    first = [each for each in _IN_SAFETENSORS if is_diffusers and each.stem == DIFFUSERS]
    candidates = (*first, *ALL_WEIGHTS)
    return next((each for each in candidates if has(each.whole) or has(each.index)), None)


def is_fsdp_folder(name: str) -> bool:
    """Return True if accelerate stores a model's distributed checkpoint in a folder so named."""
    return _FSDP_FOLDER.fullmatch(name) is not None


def distributed_files(names: Collection[str]) -> list[str]:
    """Return the files of a repository's distributed checkpoint, or of that in a folder of it."""
    tops = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == DCP_METADATA]
    tops = sorted(top for top in tops if not top or is_fsdp_folder(top))
    if not tops:
        return []
    return [
        name
        for name in names
        if name.rpartition("/")[0] == tops[0] and name.endswith((DCP_METADATA, DCP_SUFFIX))
    ]


def stem_of(name: str) -> str:
    """Return a name's stem, without suffix and number, or MODEL if no loader looks for it."""
    shard = shard_name(name)
    stem = name.removesuffix(SUFFIX) if shard is None else shard.stem
    return stem if stem in STEMS else MODEL


def is_loaded_name(name: str) -> bool:
    """Return True if some loader looks for weights, or an index, of this name."""
    plain = name.removesuffix(".index.json")
    shard = shard_name(plain)
    stem = plain.removesuffix(SUFFIX) if shard is None else shard.stem
    return plain.endswith(SUFFIX) and stem in STEMS


def shard_pattern(stem: str) -> str:
    """Return the pattern of shards' names, with huggingface_hub's `{suffix}` in it."""
    return stem + "{suffix}" + SUFFIX


def shard_name(name: str) -> ShardName | None:
    """Parse a name such as `model-00001-of-00003.safetensors`; return None for other names."""
    found = _SHARD.fullmatch(name)
    if found is None or int(found["count"]) < 2:
        return None
    return ShardName(found["stem"], int(found["number"]), int(found["count"]))
