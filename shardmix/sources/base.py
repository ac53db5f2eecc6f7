"""The seam to models that are read, `Source` and `TensorReader`; a new kind is a new file.

A source is an opened model: its tensors, by what they are once read, and readers for them. Most
tensors lie in a file as they are (`Source.extent`), and then workers read that file themselves, or
map it. All others are decoded by the source's own reader.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import Module
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.identity import SourceFile, SourceIdentity


@dataclass(frozen=True, slots=True)
class Extent:
    """The part of a file that holds a tensor's elements as they are."""

    file: SourceFile
    """The file."""
    offset: int
    """The tensor's first byte in it."""
    nbytes: int
    """The tensor's length in bytes."""


class TensorReader(Protocol):
    """Reads tensors of one source for one worker, in bounded memory."""

    @property
    def overhead_nbytes(self) -> int:
        """Memory that it takes at most, besides the caller's buffer; the memory budget counts it.

        Known as soon as it is open, and the same for all readers of a source.
        """

    def read(self, row: int, start: int, into: memoryview) -> None:
        """Fill `into`, bytes of whole elements, with elements of a tensor, from `start` on.

        Raises `SourceError`.
        """

    def prefetch(self, row: int, start: int, num_elements: int) -> None:
        """Announce elements that will be read soon. A hint, which may do nothing."""

    def close(self) -> None:
        """Give back files and memory."""


class Source(Protocol):
    """An opened model, or a module of one. Can be pickled, and is the same in another process."""

    @property
    def identity(self) -> SourceIdentity:
        """What its bytes are known by."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of config.json, as it is true of the tensors; empty if there is none."""

    @property
    def tensors(self) -> TensorTable:
        """The tensors, by what they are once read, in columns."""

    def extent(self, row: int) -> Extent | None:
        """Return where a tensor lies in a file as it is; None if it is decoded while it is read.

        The same as the columns of `tensors` say.
        """

    def open_reader(self) -> TensorReader:
        """Return a reader for one worker. Opens no file yet."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if it is not what it was when it was opened."""

    # What planning and scoring ask of the model around the tensors.

    @property
    def source(self) -> str:
        """The model as the user named it; of a module, with the module's folder behind it."""

    @property
    def folder(self) -> Path:
        """The folder with weights, config and tokenizer: the model's, or one of its modules'."""

    @property
    def root(self) -> Path:
        """The model's folder."""

    @property
    def is_single_file(self) -> bool:
        """The user named a file, not a folder."""

    @property
    def metadata(self) -> tuple[Mapping[str, str], ...]:
        """What the header of each of its files says of it besides the tensors.

        One for each file that `tensors.files` counts; the first ones of `identity.files` are these.
        """

    @property
    def stem(self) -> str:
        """What its weight files are called, of the names in `weight_names`."""

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The model's weight files, by path within its folder; and indexes of its modules."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Files of its repository on the Hub that were not fetched."""

    @property
    def place(self) -> str:
        """Where the folder is within the model's, with `/`; empty: it is the model's own."""

    @property
    def key(self) -> str:
        """What corresponds to this in another model: `Module.key`; empty if it is no module's."""

    @property
    def modules(self) -> tuple[Module, ...]:
        """All modules of a sentence-transformers model, in order."""

    @property
    def others(self) -> tuple["Source", ...]:
        """What further modules store of weights; empty for most models."""

    @property
    def parts(self) -> tuple["Source", ...]:
        """Everything that stores weights: first this, then the others."""


def stored_extent(identity: SourceIdentity, tensors: TensorTable, row: int) -> Extent | None:
    """Return where the columns say that a tensor lies as it is; None if it is decoded."""
    if tensors.is_decoded(row):
        return None
    file = identity.files[int(tensors.files[row])]
    return Extent(file, int(tensors.starts[row]), int(tensors.nbytes[row]))


class WrappedSource:
    """A source made of another one: the same, but for what a subclass says otherwise."""

    def __init__(self, inner: Source, tensors: TensorTable | None = None) -> None:
        self._inner = inner
        self._tensors = inner.tensors if tensors is None else tensors

    @property
    def identity(self) -> SourceIdentity:
        """That of the inner source."""
        return self._inner.identity

    @property
    def config(self) -> Mapping[str, Any]:
        """That of the inner source."""
        return self._inner.config

    @property
    def tensors(self) -> TensorTable:
        """Its own tensors."""
        return self._tensors

    def extent(self, row: int) -> Extent | None:
        """Return where a tensor lies in a file as it is; None if it is decoded."""
        return stored_extent(self.identity, self.tensors, row)

    def open_reader(self) -> TensorReader:
        """Return a reader of the inner source."""
        return self._inner.open_reader()

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the inner source is not what it was."""
        self._inner.check_unchanged()

    @property
    def source(self) -> str:
        """The inner source as the user named it."""
        return self._inner.source

    @property
    def folder(self) -> Path:
        """That of the inner source."""
        return self._inner.folder

    @property
    def root(self) -> Path:
        """That of the inner source."""
        return self._inner.root

    @property
    def is_single_file(self) -> bool:
        """Whether the user named a file."""
        return self._inner.is_single_file

    @property
    def metadata(self) -> tuple[Mapping[str, str], ...]:
        """That of the inner source's files."""
        return self._inner.metadata

    @property
    def stem(self) -> str:
        """That of the inner source."""
        return self._inner.stem

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Those of the inner source."""
        return self._inner.weight_names

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What of the inner source was not fetched."""
        return self._inner.left_out

    @property
    def place(self) -> str:
        """That of the inner source."""
        return self._inner.place

    @property
    def key(self) -> str:
        """That of the inner source."""
        return self._inner.key

    @property
    def modules(self) -> tuple[Module, ...]:
        """Those of the inner source."""
        return self._inner.modules

    @property
    def others(self) -> tuple[Source, ...]:
        """Those of the inner source, as they are."""
        return self._inner.others

    @property
    def parts(self) -> tuple[Source, ...]:
        """First this, then the others."""
        return (self, *self.others)
