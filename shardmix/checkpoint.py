"""A checkpoint as its headers describe it: every tensor's name, dtype, shape, file and offset.

Reads headers and small JSON files, never tensor data. Tensors are kept in columns (one row a
tensor), so that ten checkpoints of 90,000 tensors fit beside a tight budget.
"""

import json
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shardmix.errors import SourceError
from shardmix.hub import INDEX_NAME, WEIGHTS_NAME, locate, no_weights_finding
from shardmix.safetensors_layout import (
    DTYPE_RANK,
    DTYPES,
    HEADER_LENGTH_NBYTES,
    HeaderEntry,
    TensorInfo,
    decode_header,
    header_nbytes,
)

CONFIG_NAME = "config.json"
_MAX_JSON_NBYTES = 256_000_000  # an index of a million tensors has about half of it


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One weight file of a checkpoint."""

    path: Path
    """Where it lies."""
    nbytes: int
    """Its size."""
    mtime_ns: int | None = None
    """When it was last modified, in nanoseconds since 1970; None: not checked."""


@dataclass(frozen=True, slots=True)
class TensorTable:
    """All tensors of a checkpoint, by file and within it by offset; row i is one tensor."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype_ranks: npt.NDArray[np.uint8]
    """Index into `safetensors_layout.DTYPES`."""
    files: npt.NDArray[np.int32]
    """Index into `Checkpoint.shards`."""
    starts: npt.NDArray[np.int64]
    """First byte in its file."""
    nbytes: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, known by its headers alone."""

    source: str
    """As the user wrote it."""
    folder: Path
    """The model's folder, with config and tokenizer."""
    hub_id: str | None
    """`org/name`, where it came from the Hub."""
    is_single_file: bool
    """The source is a file, not a folder."""
    shards: tuple[ShardFile, ...]
    """Weight files, in name order."""
    config: dict[str, Any] = field(repr=False)
    """Content of config.json; empty where there is none."""
    table: TensorTable = field(repr=False)
    """The tensors, in columns."""

    @property
    def num_tensors(self) -> int:
        """How many tensors are stored."""
        return len(self.table.names)

    def tensor(self, row: int) -> TensorInfo:
        """Return one row of the table."""
        table = self.table
        return TensorInfo(
            name=table.names[row],
            dtype=DTYPES[table.dtype_ranks[row]],
            shape=table.shapes[row],
            start=int(table.starts[row]),
            nbytes=int(table.nbytes[row]),
        )

    def tensors(self) -> Iterator[TensorInfo]:
        """Yield every tensor, by file and within it by offset."""
        return (self.tensor(row) for row in range(self.num_tensors))


def open_checkpoint(source: str) -> Checkpoint:
    """Open a local folder, a `.safetensors` file or a Hub id, reading headers alone.

    Raises `SourceError` where files are missing, damaged, pickled or outside the folder.
    """
    located = locate(source)
    is_single_file = not located.path.is_dir()
    if is_single_file:
        if located.path.suffix != ".safetensors":
            raise SourceError(
                f"{source}: is a file but not a .safetensors file; give a model folder, a "
                ".safetensors file or a Hub id"
            )
        folder, weight_map, paths = located.path.parent, None, [located.path]
    else:
        folder = located.path
        weight_map, paths = _weight_files(source, folder)
    shards = tuple(ShardFile(path, _regular_file_nbytes(source, path)) for path in paths)
    return Checkpoint(
        source=source,
        folder=folder,
        hub_id=located.hub_id,
        is_single_file=is_single_file,
        shards=shards,
        config=read_config(folder),
        table=_read_table(source, folder, shards, weight_map),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a model folder's config.json; empty where there is none."""
    path = folder / CONFIG_NAME
    config: dict[str, Any] = read_json(path) if path.exists() else {}
    return config


def read_json(path: Path, *, expected: type = dict) -> Any:
    """Read a JSON object (or list) from a file; raise `SourceError` where it isn't one."""
    try:
        if path.stat().st_size > _MAX_JSON_NBYTES:
            raise SourceError(f"{path}: has {path.stat().st_size} bytes; that is no model's JSON")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, expected):
        raise SourceError(
            f"{path}: must hold a JSON {'list' if expected is list else 'object'}, "
            f"not {type(content).__name__}"
        )
    return content


def _weight_files(source: str, folder: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """Return the index's weight_map, if the folder has one, and the weight files in name order."""
    index_path = folder / INDEX_NAME
    # Both present: as in transformers, the single file counts.
    if os.path.lexists(folder / WEIGHTS_NAME):
        return None, [folder / WEIGHTS_NAME]
    if not index_path.exists():
        files = sorted(path.name for path in folder.iterdir())
        others = [name for name in files if name.endswith(".safetensors")]
        if others:
            raise SourceError(
                f"{source}: has {', '.join(others[:3])} but neither {WEIGHTS_NAME} nor "
                f"{INDEX_NAME}; give the file itself as the source, or add the index"
            )
        raise SourceError(f"{source}: {no_weights_finding(files)}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index_path}: has no weight_map from tensor names to files")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or "\0" in name:
            raise SourceError(f"{index_path}: names {name!r} as a file; it must be a file name")
    shard_names = set(weight_map.values())
    for name in shard_names:
        _check_inside(index_path, name)
    paths = [folder / name for name in sorted(shard_names)]
    for path in paths:
        if not path.exists():
            raise SourceError(
                f"{index_path}: names {path.name}, which is not in the folder; "
                "a download may be incomplete: fetch it again"
            )
    return weight_map, paths


def _check_inside(index_path: Path, name: str) -> None:
    # By the name alone: in the Hub's cache every shard is itself a link out of the folder.
    relative = os.path.normpath(name)
    if Path(name).is_absolute() or relative.startswith("..") or "\\" in name:
        raise SourceError(
            f"{index_path}: names {name!r}, which lies outside the model's folder; "
            "an index may name files in its own folder alone"
        )
    if not name.endswith(".safetensors"):
        raise SourceError(f"{index_path}: names {name!r}, which is not a .safetensors file")


def _regular_file_nbytes(source: str, path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{source}: {path.name} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{source}: {path.name} is not a regular file")
    return status.st_size


def _read_table(
    source: str,
    folder: Path,
    shards: tuple[ShardFile, ...],
    weight_map: dict[str, str] | None,
) -> TensorTable:
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    dtype_ranks: list[int] = []
    files: list[int] = []
    starts: list[int] = []
    nbytes: list[int] = []
    shape_pool: dict[tuple[int, ...], tuple[int, ...]] = {}
    for file_index, shard in enumerate(shards):
        entries, data_start = _read_header(shard)
        if weight_map is not None:
            entries = _named_by_index(source, shard.path.relative_to(folder), entries, weight_map)
        ordered = sorted(entries.items(), key=_data_order)
        # Names and shapes recur in every model of a merge: keep one object of each.
        names += [sys.intern(name) for name, _ in ordered]
        shapes += [shape_pool.setdefault(entry.shape, entry.shape) for _, entry in ordered]
        dtype_ranks += [DTYPE_RANK[entry.dtype] for _, entry in ordered]
        files += [file_index] * len(ordered)
        starts += [data_start + entry.data_offsets[0] for _, entry in ordered]
        nbytes += [entry.data_offsets[1] - entry.data_offsets[0] for _, entry in ordered]
    if weight_map is not None and len(names) != len(weight_map):
        missing = sorted(set(weight_map) - set(names))[:3]
        raise SourceError(
            f"{source}: {INDEX_NAME} names tensors that their files do not hold: "
            f"{', '.join(missing)}; fetch the checkpoint again"
        )
    return TensorTable(
        names=tuple(names),
        shapes=tuple(shapes),
        dtype_ranks=np.array(dtype_ranks, dtype=np.uint8),
        files=np.array(files, dtype=np.int32),
        starts=np.array(starts, dtype=np.int64),
        nbytes=np.array(nbytes, dtype=np.int64),
    )


def _data_order(item: tuple[str, HeaderEntry]) -> tuple[int, int]:
    return item[1].data_offsets


def _named_by_index(
    source: str, file: Path, entries: dict[str, HeaderEntry], weight_map: dict[str, str]
) -> dict[str, HeaderEntry]:
    """Return those entries for which the index names this file, should two files hold one name."""
    unnamed = next((name for name in entries if name not in weight_map), None)
    if unnamed is not None:
        raise SourceError(
            f"{source}: {file} holds {unnamed}, which {INDEX_NAME} does not name; index and "
            "shards are from different checkpoints"
        )
    file_name = str(file)
    return {name: entry for name, entry in entries.items() if weight_map[name] == file_name}


def _read_header(shard: ShardFile) -> tuple[dict[str, HeaderEntry], int]:
    """Return a file's entries, and where in the file its data starts."""
    try:
        with shard.path.open("rb") as file:
            length = header_nbytes(file.read(HEADER_LENGTH_NBYTES), file_nbytes=shard.nbytes)
            entries = decode_header(file.read(length), file_nbytes=shard.nbytes)
        # Our own decoding gives offsets; whether the file is valid is for safetensors to say.
        with safe_open(shard.path, framework="np"):
            pass
    except SourceError as error:
        raise SourceError(f"{shard.path}: {error}") from None
    except SafetensorError as error:
        raise SourceError(
            f"{shard.path}: not a valid safetensors file ({error}); fetch it again"
        ) from None
    except OSError as error:
        raise SourceError(f"{shard.path}: cannot be read ({error.strerror})") from None
    return entries, HEADER_LENGTH_NBYTES + length
