"""A checkpoint as its headers describe it: every tensor's name, dtype, shape, file and offset.

Reads headers and small JSON files, never tensor data. Tensors are stored in columns (one row a
tensor), so that ten checkpoints of 90,000 tensors fit beside a tight budget.
"""

import itertools
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import Module, module_subfolders, read_modules
from shardmix.conventions.weight_names import (
    ALL_WEIGHTS,
    DIFFUSERS,
    MODEL,
    SUFFIX,
    TORCH_SUFFIXES,
    StoredWeights,
    index_name,
    shard_name,
    stem_of,
    stored_weights,
    weights_name,
)
from shardmix.errors import SourceError, shown, unreadable
from shardmix.formats.strict_json import read_index, read_json
from shardmix.formats.tensor_table import TensorTable, View
from shardmix.sources.base import (
    Extent,
    ModelFolder,
    Opening,
    Readers,
    Source,
    TensorReader,
    stored_extent,
)
from shardmix.sources.headers import SHORT_HEADER_NBYTES, Headers, read_torch_header
from shardmix.sources.identity import FileStamp, SourceFile, SourceIdentity
from shardmix.sources.located import LocalSource
from shardmix.system.files import refuse_link_outside
from shardmix.system.memory import check_room

CONFIG_NAME = "config.json"

# Memory of planning for each tensor: at most 1,350 bytes measured.
_MEMORY_PER_TENSOR = 1_600
_MOST_NAMES_BELOW = 100


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, known only by its headers."""

    text: str
    """The model as the user named it; for a module, followed by the module's folder."""
    folder: Path
    """The folder with the weights, config and tokenizer: the model's, or one of its modules'."""
    is_single_file: bool
    """True if the source is a file, not a folder."""
    identity: SourceIdentity
    """Weight files, in name order, and their commit."""
    metadata: tuple[Mapping[str, str], ...] = field(repr=False, hash=False)
    """Metadata in the header of each of these files."""
    config: dict[str, Any] = field(repr=False)
    """Content of config.json; empty if there is none."""
    tensors: TensorTable = field(repr=False)
    """The tensors, in columns."""
    views: Mapping[int, View] = field(default_factory=dict, repr=False, hash=False)
    """Row of a tensor whose elements are in another order → the way that they lie."""
    stem: str = MODEL
    """Stem of its weight files, one of those in `weight_names`; MODEL for other names."""
    left_out: tuple[LeftOut, ...] = ()
    """Files of its repository on the Hub that were not fetched."""
    subfolder: str = ""
    """Path of the folder within the model's, with `/`; empty for the model's own."""
    key: str = ""
    """Key of the same part in another model: `Module.key`; empty if it is not a module."""
    modules: tuple[Module, ...] = ()
    """All modules of a sentence-transformers model, in order."""
    others: tuple["Checkpoint", ...] = ()
    """Checkpoints of further modules with weights; empty for most models."""
    warnings: tuple[str, ...] = ()
    """Warnings about it; a checkpoint has none of its own."""

    @property
    def root(self) -> Path:
        """The model's folder."""
        return self.folder.parents[self.subfolder.count("/")] if self.subfolder else self.folder

    @property
    def path(self) -> str:
        """Absolute path of the model's folder, or of the file that the user named."""
        return self.identity.files[0].path if self.is_single_file else str(self.root.absolute())

    @property
    def parts(self) -> tuple["Checkpoint", ...]:
        """All parts with weights: first this one, then the others."""
        return (self, *self.others)

    @property
    def copies(self) -> tuple[frozenset[str], ...]:
        """No groups: such files have no checksums that count."""
        return ()

    @property
    def max_shard_size(self) -> str | None:
        """Return None: its files are shards."""
        return None

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The model's weight files, by path within its folder; and indexes of its modules."""
        files = [file.name for part in self.parts for file in part.identity.files]
        indexes = [
            f"{part.subfolder}/{each.index}"
            for part in self.parts
            for each in ALL_WEIGHTS
            if part.subfolder and each.stem == MODEL
        ]
        return (*files, *indexes)

    @property
    def public_name(self) -> str:
        """Its Hub id, or its own name without a path."""
        if self.identity.hub_id is not None:
            return self.text
        if self.is_single_file:
            return Path(self.identity.files[0].path).name
        return self.root.resolve().name

    def extent(self, row: int) -> Extent | None:
        """Return the extent of a tensor; None if its elements are in another order."""
        return stored_extent(self.identity, self.tensors, row)

    @property
    def holds_changes(self) -> bool:
        """Return False: it is a model."""
        return False

    def changes_to(self, base: Source) -> None:
        """Return None: its changes are known only by subtracting."""

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker."""
        # Imported here: a plan reads no tensor.
        from shardmix.sources.readers import StoredReader
        from shardmix.sources.views import ViewReader

        if not self.views:
            return StoredReader(self.identity.files, self.tensors)
        return ViewReader(self.identity.files, self.tensors, self.views)

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return a reader for one worker: it is made of no other source."""
        return self.open_reader()

    @property
    def uses_kernels(self) -> bool:
        """Return False: it only reads."""
        return False

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if a file changed since its header was read."""
        for part in self.parts:
            part.identity.check_unchanged()


def open_checkpoint(opening: Opening) -> Checkpoint:
    """Open a local folder or a `.safetensors` file, reading headers only.

    Raises `SourceError` if files are missing, damaged, pickled or outside the folder, `BudgetError`
    if to decode headers might take the process beyond the opening's memory.
    """
    source, located = opening.text, opening.located
    limits = _Limits(opening.headers, opening.max_memory)
    if not located.path.is_dir():
        _refuse_partial_file(source, located.path)
        stored = _WeightFiles([located.path], None, stem_of(located.path.name))
        return _read_part(source, located, "", stored, limits)
    modules = read_modules(located.path)
    keys: dict[str, str] = {}
    for module in modules:
        keys.setdefault(module.subfolder, module.key)
    subfolders = [
        subfolder
        for subfolder in dict.fromkeys(("", *keys))
        if stored_weights_in(located.path / subfolder) is not None
    ]
    parts = [
        replace(_read_part(source, located, subfolder, None, limits), key=keys.get(subfolder, ""))
        for subfolder in subfolders or [""]
    ]
    mains = (part for part in parts if not part.subfolder or "model_type" in part.config)
    main = next(mains, parts[0])
    others = tuple(part for part in parts if part is not main)
    _refuse_ambiguous_names(parts)
    return replace(main, text=source, left_out=located.left_out, modules=modules, others=others)


def _refuse_ambiguous_names(parts: Sequence[Checkpoint]) -> None:
    """Raise `SourceError` if a tensor's name looks like that of a tensor in a module's folder."""
    prefixes = [(part, f"{part.subfolder}/" if part.subfolder else "") for part in parts]
    for part, prefix in prefixes:
        inner = tuple(
            other.removeprefix(prefix)
            for each, other in prefixes
            if each is not part and other.startswith(prefix)
        )
        for name in part.tensors.names:
            if "/" in name and name.startswith(inner):
                raise SourceError(
                    f"holds a tensor called {shown(name)}, which looks like one in a module's "
                    "folder, so that reports could not tell them apart",
                    subject=part.text,
                    remedy="rename it",
                )


@dataclass(slots=True)
class _Limits:
    """Bounds on a model's headers, over all of its parts."""

    headers: Headers
    """Headers decoded already."""
    max_memory: int | None
    """Budget of the whole process, in bytes."""
    num_header_bytes: int = 0
    """Header bytes read so far."""
    num_tensors: int = 0
    """Tensors found so far."""


def _read_part(
    source: str,
    located: LocalSource,
    subfolder: str,
    stored: "_WeightFiles | None",
    limits: _Limits,
) -> Checkpoint:
    """Read the headers of the weights in one folder of a model; `stored` is given for one file."""
    is_single_file = stored is not None
    root = located.path.parent if is_single_file else located.path
    named = f"{source}/{subfolder}" if subfolder else source
    stored = stored or _weight_files(named, root, subfolder, limits.max_memory)
    files = [
        replace(regular_file(named, root, path), commit=located.commit) for path in stored.paths
    ]
    read = _read_headers(named, root / subfolder, files, stored, limits)
    return Checkpoint(
        text=named,
        folder=root / subfolder,
        is_single_file=is_single_file,
        identity=SourceIdentity(read.files, located.hub_id, located.commit),
        metadata=read.metadata,
        config=read_config(root, subfolder),
        tensors=read.tensors,
        views=read.views,
        stem=stored.stem,
        subfolder=subfolder,
    )


def main_subfolder(folder: Path, modules: Sequence[Module]) -> str:
    """Return the folder of a model's config and main weights: "" or a module's."""
    subfolders = [module.subfolder for module in modules if module.kind != "Router"]
    if not subfolders or "" in subfolders:
        return ""
    return next(
        (subfolder for subfolder in subfolders if "model_type" in read_config(folder, subfolder)),
        subfolders[0],
    )


def checkpoint_folder(located: LocalSource) -> ModelFolder:
    """Return a model's folder, with the weight files that have names that loaders look for.

    Files in folders of sentence-transformers' modules are among them, with their indexes.
    """
    folder = located.path
    if not folder.is_dir():
        return ModelFolder(folder.parent, (folder.name,))
    names = {each.whole for each in ALL_WEIGHTS if (folder / each.whole).is_file()}
    for path in (folder / each.index for each in ALL_WEIGHTS):
        if path.is_file():
            refuse_link_outside(folder, path)
            names.update(read_index(path).values())
    for subfolder in module_subfolders(read_modules(folder)):
        stored = stored_weights_in(folder / subfolder)
        if stored is not None:
            inner = (folder / subfolder).glob(f"*{Path(stored.whole).suffix}")
            names.update(path.relative_to(folder).as_posix() for path in inner)
            names.add(f"{subfolder}/{stored.index}")
    return ModelFolder(folder, tuple(sorted(names)))


def check_room_for(num_tensors: int, source: str, *, max_memory: int | None) -> None:
    """Raise `BudgetError` if to plan with so many tensors might exceed the process's budget."""
    check_room(
        _MEMORY_PER_TENSOR * num_tensors,
        max_memory=max_memory,
        subject=source,
        purpose=f"to plan with its {num_tensors} tensors",
    )


def read_config(root: Path, subfolder: str = "") -> dict[str, Any]:
    """Return the content of config.json in a model's folder, or in a module's; empty without one.

    A link in it may only lead where any link of the model may.
    """
    path = root / subfolder / CONFIG_NAME
    if not os.path.lexists(path):
        return {}
    refuse_link_outside(root, path)
    config: dict[str, Any] = read_json(path)
    return config


def stored_weights_in(folder: Path) -> StoredWeights | None:
    """Return a folder's weights, or None if it has none with a name that is loaded."""

    def has(name: str) -> bool:
        return os.path.lexists(folder / name)

    found = stored_weights(has)
    has_both = (found is not None and found.stem == MODEL) and any(
        has(name) for name in (weights_name(DIFFUSERS), index_name(DIFFUSERS))
    )
    if has_both and "_class_name" in read_config(folder):
        return stored_weights(has, is_diffusers=True)
    return found


@dataclass(frozen=True, slots=True)
class _WeightFiles:
    """The weight files of one folder."""

    paths: list[Path]
    """Paths in name order."""
    weight_map: dict[str, str] | None
    """Tensor → file, by the index; None without one."""
    stem: str
    """Their stem."""
    index: str = ""
    """Name of the index that they have, or would have."""


def _weight_files(source: str, root: Path, subfolder: str, max_memory: int | None) -> _WeightFiles:
    """Return the weight files of a model's folder, or of one of its modules."""
    folder = root / subfolder
    stored = stored_weights_in(folder)
    if stored is None:
        from shardmix.conventions.folder_kinds import no_weights

        raise no_weights(_names_in(folder), source).of(source)
    # Both present: as in transformers, the single file counts.
    if os.path.lexists(folder / stored.whole):
        refuse_link_outside(root, folder / stored.whole)
        return _WeightFiles([folder / stored.whole], None, stored.stem, stored.index)
    index_path = folder / stored.index
    refuse_link_outside(root, index_path)
    weight_map = read_index(index_path, max_memory=max_memory)
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        refuse_link_outside(root, path)
        if not path.exists():
            raise SourceError(
                f"names {path.name}, which is not in the folder; a download may be incomplete",
                subject=index_path,
                remedy="fetch it again",
            )
    return _WeightFiles(paths, weight_map, stored.stem, stored.index)


def _refuse_partial_file(source: str, path: Path) -> None:
    """Raise `SourceError` if a file is no whole model: of another kind, or one of several."""
    if path.suffix not in (SUFFIX, *TORCH_SUFFIXES):
        from shardmix.conventions.folder_kinds import no_weights_file

        raise no_weights_file(path.name).of(source)
    shard = shard_name(path.name)
    if shard is not None:
        raise SourceError(
            f"is number {shard.number} of {shard.count} files that are a model together",
            subject=source,
            remedy=f"give their folder, {path.parent}, with the index in it (or rename the "
            "file, if it is a whole model)",
        )
    for index_path in (path.parent / each.index for each in ALL_WEIGHTS):
        if index_path.is_file():
            refuse_link_outside(path.parent, index_path)
            files = set(read_index(index_path).values())
            if path.name in files and len(files) > 1:
                raise SourceError(
                    f"is one of {len(files)} files that are a model together, by {index_path.name}",
                    subject=source,
                    remedy=f"give their folder, {path.parent}",
                )


def _names_in(folder: Path) -> list[str]:
    """Return the entries of a folder, and the first entries of its subfolders."""
    names = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            names.append(path.name)
            continue
        names.append(f"{path.name}/")
        with suppress(OSError):
            inner = itertools.islice(path.iterdir(), _MOST_NAMES_BELOW)
            names += [f"{path.name}/{found.name}{'/' * found.is_dir()}" for found in inner]
    return names


def regular_file(source: str, root: Path, path: Path) -> SourceFile:
    """Return a file of a model, as it is now. Raises `SourceError` if it is no regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(source, error, f"{path.name} cannot be read") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(
            f"{path.name} is not a regular file",
            subject=source,
            remedy="put the file itself there",
        )
    return SourceFile(
        path=str(path.absolute()),
        nbytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        name=path.relative_to(root).as_posix(),
        stamp=FileStamp.of(status),
    )


@dataclass(frozen=True, slots=True)
class _ReadHeaders:
    """The headers of one folder's weight files."""

    files: tuple[SourceFile, ...]
    """The files, now with their headers' digests."""
    metadata: tuple[Mapping[str, str], ...]
    """Metadata of each file."""
    tensors: TensorTable
    """The tensors in them."""
    views: Mapping[int, View]
    """Row of a tensor whose elements are in another order → the way that they lie."""


def _read_headers(
    source: str,
    folder: Path,
    files: Sequence[SourceFile],
    stored: _WeightFiles,
    limits: _Limits,
) -> _ReadHeaders:
    weight_map, index = stored.weight_map, stored.index
    known: list[SourceFile] = []
    metadata: list[Mapping[str, str]] = []
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    columns: list[tuple[npt.NDArray[Any], ...]] = []
    views: dict[int, View] = {}
    for number, (file, path) in enumerate(zip(files, stored.paths, strict=True)):
        read = read_torch_header if path.suffix in TORCH_SUFFIXES else limits.headers.read
        header = read(
            path,
            file.nbytes,
            num_before=limits.num_header_bytes,
            max_memory=limits.max_memory,
        )
        known.append(replace(file, header_sha256=header.sha256))
        metadata.append(header.metadata)
        limits.num_header_bytes += header.nbytes_read
        rows: slice | npt.NDArray[np.int64] = slice(None)
        if weight_map is not None:
            within = path.relative_to(folder)
            rows = _named_by_index(source, within, header.names, weight_map, index)
        chosen = range(len(header.names)) if isinstance(rows, slice) else rows.tolist()
        for row, view in header.views.items():
            if row in chosen:
                views[len(names) + chosen.index(row)] = view
        if isinstance(rows, slice):
            names += header.names
            shapes += header.shapes
        else:
            names += [header.names[row] for row in chosen]
            shapes += [header.shapes[row] for row in chosen]
        starts = header.starts[rows]
        numbers = np.full(len(starts), number, dtype=np.int32)
        columns.append((header.dtype_ranks[rows], numbers, starts, header.nbytes[rows]))
    if weight_map is not None and len(names) != len(weight_map):
        missing = sorted(set(weight_map) - set(names))[:3]
        raise SourceError(
            f"{index} names tensors that their files do not hold: {', '.join(missing)}",
            subject=source,
            remedy="fetch the checkpoint again",
        )
    limits.num_tensors += len(names)
    if limits.num_header_bytes > SHORT_HEADER_NBYTES:
        check_room_for(limits.num_tensors, source, max_memory=limits.max_memory)
    dtype_ranks, all_files, all_starts, nbytes = map(np.concatenate, zip(*columns, strict=True))
    tensors = TensorTable(tuple(names), tuple(shapes), dtype_ranks, all_files, all_starts, nbytes)
    if views:
        tensors = tensors.with_decoded(sorted(views))
    return _ReadHeaders(tuple(known), tuple(metadata), tensors, views)


def _named_by_index(
    source: str, file: Path, names: Sequence[str], weight_map: dict[str, str], index: str
) -> slice | npt.NDArray[np.int64]:
    """Return the rows for which the index names this file, in case two files store one name."""
    if not weight_map.keys() >= set(names):
        unnamed = next(name for name in names if name not in weight_map)
        raise SourceError(
            f"{file} holds {unnamed}, which {index} does not name; index and shards are from "
            "different checkpoints",
            subject=source,
            remedy="fetch them again",
        )
    named = list(map(weight_map.__getitem__, names))
    if named.count(str(file)) == len(names):
        return slice(None)
    return np.array([row for row, name in enumerate(named) if name == str(file)], dtype=np.int64)
