"""The seam to models that are read, `Source` and `TensorReader`; a new kind is a new file.

A source is an opened model: a table of its tensors as they are once read, and readers for them.
Most tensors are stored in a file as they are (`Source.extent`); workers read or map that file
themselves. All others are decoded by the source's own reader.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import Module
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.headers import Headers
from shardmix.sources.identity import SourceFile, SourceIdentity
from shardmix.sources.located import LocalSource

MAX_MAPPED_AT_ONCE = 3
"""The most sources of one chunk that are mapped; further ones are read. Each mapping takes
memory."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The part of a file that stores a tensor's elements as they are."""

    file: SourceFile
    """The file."""
    offset: int
    """Offset of the tensor's first byte in it."""
    nbytes: int
    """The tensor's length in bytes."""


@dataclass(frozen=True, slots=True)
class Opening:
    """All that a kind of source is opened from."""

    text: str
    """The model as the user named it."""
    located: LocalSource
    """Its files on this machine."""
    headers: Headers
    """Headers that are known already."""
    max_memory: int | None
    """Bound on the process's memory, in bytes."""
    open_other: "Callable[[str], Source]"
    """Opens another model by its text, for a source that wraps one."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The folder of a model that only gives its config and other files; its weights stay unread."""

    path: Path
    """The folder."""
    weights: tuple[str, ...]
    """Its weight files and their indexes, by path within the folder."""


@dataclass(frozen=True, slots=True)
class SourceKind:
    """A kind of source; both functions return None for a model of another kind."""

    open: "Callable[[Opening], Source | None]"
    """Opens a model. Raises `SourceError` and `BudgetError`."""
    folder: Callable[[LocalSource], ModelFolder | None]
    """Finds the model's folder without opening it. Raises `SourceError`."""


class TensorReader(Protocol):
    """Reads tensors of one source for one worker, in bounded memory."""

    @property
    def overhead_nbytes(self) -> int:
        """Upper bound of its memory besides the caller's buffer; the memory budget counts it.

        Known as soon as it is open, and the same for all readers of a source.
        """

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into`, a buffer of whole elements, with elements of a tensor from `start` on.

        Raises `SourceError`.
        """

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon. A hint, which may do nothing."""

    def close(self) -> None:
        """Close files and free memory."""


class Readers(Protocol):
    """The readers of one worker: sources made of one base share its reader."""

    def reader_of(self, source: "Source") -> TensorReader:
        """Return the reader of a base."""


class Source(Protocol):
    """An opened model, or a module of one. Can be pickled, for use in another process."""

    @property
    def identity(self) -> SourceIdentity:
        """Identity of its bytes."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of config.json, true of the tensors; empty if there is none."""

    @property
    def tensors(self) -> TensorTable:
        """The tensors as they are once read, in columns."""

    def extent(self, row: int) -> Extent | None:
        """Return the part of a file that stores a tensor as it is; None if the tensor is decoded.

        It agrees with the columns of `tensors`.
        """

    @property
    def holds_changes(self) -> bool:
        """True if its floats are changes to a base model, not a model's values."""

    def changes_to(self, base: "Source") -> "Source | None":
        """Return this model's changes to a base model as a source.

        None if they are known only by reading both models and subtracting.
        """

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker. Opens no file yet."""

    def open_shared_reader(self, shared: "Readers") -> TensorReader:
        """Return the same; what it reads of a base, it reads by `shared`, with its other sources'.

        Most sources are made of no other.
        """

    @property
    def uses_kernels(self) -> bool:
        """True if its readers compile kernels by LLVM, whose memory must be counted."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if it changed since it was opened."""

    # The parts of a model besides its tensors, for planning and scoring.

    @property
    def text(self) -> str:
        """The model as the user named it; for a module, followed by the module's folder."""

    @property
    def public_name(self) -> str:
        """Its name for publication: Hub id, or its own name without a path."""

    @property
    def folder(self) -> Path:
        """The folder with weights, config and tokenizer: the model's, or one of its modules'."""

    @property
    def root(self) -> Path:
        """The model's folder."""

    @property
    def path(self) -> str:
        """A text that opens it again, from any folder: an absolute path, for most."""

    @property
    def is_single_file(self) -> bool:
        """True if the user named a file, not a folder."""

    @property
    def metadata(self) -> tuple[Mapping[str, str], ...]:
        """Metadata in the header of each of its files.

        One for each file that `tensors.files` counts; these are the first ones of `identity.files`.
        """

    @property
    def stem(self) -> str:
        """Stem of its weight files, one of those in `weight_names`."""

    @property
    def copies(self) -> Sequence[Collection[str]]:
        """Groups of tensors with the same bytes, as far as checksums in the files tell."""

    @property
    def max_shard_size(self) -> str | None:
        """Size of the shards of an output that takes its layout; None if its files are shards."""

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The model's weight files, by path within its folder; and indexes of its modules."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Files of its repository on the Hub that were not fetched."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the user about the source itself."""

    @property
    def subfolder(self) -> str:
        """Path of the folder within the model's, with `/`; empty for the model's own."""

    @property
    def key(self) -> str:
        """Key of the same part in another model: `Module.key`; empty if it is not a module."""

    @property
    def modules(self) -> tuple[Module, ...]:
        """All modules of a sentence-transformers model, in order."""

    @property
    def others(self) -> tuple["Source", ...]:
        """Sources of further modules with weights; empty for most models."""

    @property
    def parts(self) -> tuple["Source", ...]:
        """All parts with weights: first this one, then the others."""


def stored_extent(identity: SourceIdentity, tensors: TensorTable, row: int) -> Extent | None:
    """Return the extent of a tensor by the columns; None if it is decoded."""
    if tensors.is_decoded(row):
        return None
    file = identity.files[int(tensors.files[row])]
    return Extent(file, int(tensors.starts[row]), int(tensors.nbytes[row]))


class WrappedSource:
    """A source made of another one, equal except for what a subclass overrides."""

    def __init__(self, inner: Source, tensors: TensorTable | None = None) -> None:
        self._inner = inner
        self._tensors = inner.tensors if tensors is None else tensors

    @property
    def identity(self) -> SourceIdentity:
        """Identity of the inner source."""
        return self._inner.identity

    @property
    def config(self) -> Mapping[str, Any]:
        """Config of the inner source."""
        return self._inner.config

    @property
    def tensors(self) -> TensorTable:
        """Its own tensors."""
        return self._tensors

    def extent(self, row: int) -> Extent | None:
        """Return the part of a file that stores a tensor as it is; None if it is decoded."""
        return stored_extent(self.identity, self.tensors, row)

    @property
    def holds_changes(self) -> bool:
        """True if the inner source's floats are changes to a base model."""
        return self._inner.holds_changes

    def changes_to(self, base: Source) -> Source | None:
        """Return None: its own tensors need not be the inner source's."""
        return None

    def open_reader(self) -> TensorReader:
        """Return a reader of the inner source."""
        return self._inner.open_reader()

    def open_shared_reader(self, shared: Readers) -> TensorReader:
        """Return a reader of its own."""
        return self.open_reader()

    @property
    def uses_kernels(self) -> bool:
        """True if readers of the inner source compile kernels."""
        return self._inner.uses_kernels

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the inner source changed."""
        self._inner.check_unchanged()

    @property
    def text(self) -> str:
        """Text of the inner source."""
        return self._inner.text

    @property
    def public_name(self) -> str:
        """Public name of the inner source."""
        return self._inner.public_name

    @property
    def folder(self) -> Path:
        """Folder of the inner source."""
        return self._inner.folder

    @property
    def root(self) -> Path:
        """Root of the inner source."""
        return self._inner.root

    @property
    def path(self) -> str:
        """Path of the inner source."""
        return self._inner.path

    @property
    def is_single_file(self) -> bool:
        """True if the user named a file."""
        return self._inner.is_single_file

    @property
    def metadata(self) -> tuple[Mapping[str, str], ...]:
        """Metadata of the inner source's files."""
        return self._inner.metadata

    @property
    def stem(self) -> str:
        """Stem of the inner source."""
        return self._inner.stem

    @property
    def copies(self) -> Sequence[Collection[str]]:
        """No groups: its own tensors need not be the inner source's."""
        return ()

    @property
    def max_shard_size(self) -> str | None:
        """Size of shards of the inner source."""
        return self._inner.max_shard_size

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Weight files of the inner source."""
        return self._inner.weight_names

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Files of the inner source that were not fetched."""
        return self._inner.left_out

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the inner source."""
        return self._inner.warnings

    @property
    def subfolder(self) -> str:
        """Subfolder of the inner source."""
        return self._inner.subfolder

    @property
    def key(self) -> str:
        """Key of the inner source."""
        return self._inner.key

    @property
    def modules(self) -> tuple[Module, ...]:
        """Modules of the inner source."""
        return self._inner.modules

    @property
    def others(self) -> tuple[Source, ...]:
        """Other parts of the inner source, unchanged."""
        return self._inner.others

    @property
    def parts(self) -> tuple[Source, ...]:
        """All parts: first this one, then the others."""
        return (self, *self.others)
