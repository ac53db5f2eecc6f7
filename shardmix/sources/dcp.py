"""A model in a distributed checkpoint of torch (DCP), as FSDP and tensor parallelism save it.

Each rank wrote files of records, and `.metadata` says which chunk of which tensor a record is. A
tensor in one chunk is a range of a file; others are put together from their chunks while they are
read. Opened by that description and the ends of each record; no element is read.
"""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shardmix.conventions.dcp_keys import model_keys
from shardmix.conventions.weight_names import DCP_METADATA
from shardmix.dtypes import DTYPE_RANK, tensor_nbytes
from shardmix.errors import SourceError, shown, unreadable
from shardmix.formats.dcp_chunks import check_chunks
from shardmix.formats.dcp_metadata import MOST_METADATA_NBYTES, Chunk, DcpMetadata, read_metadata
from shardmix.formats.strict_json import file_name_finding
from shardmix.formats.tensor_table import TensorTable
from shardmix.formats.torch_file import named_dtype
from shardmix.formats.torch_record import RecordReader
from shardmix.sources.base import Opening, Source, TensorReader, WrappedSource
from shardmix.sources.checkpoint import Checkpoint, check_room_for, read_config, regular_file
from shardmix.sources.chunks import Box, ChunkReader, StoredChunks
from shardmix.sources.identity import SourceFile, SourceIdentity
from shardmix.system.files import open_regular, read_regular, refuse_link_outside
from shardmix.system.memory import check_room

# A description below this size is read without asking for memory.
_LITTLE_NBYTES = 1_000_000
_REFETCH = "fetch it again"


class DcpSource(WrappedSource):
    """A model whose tensors many ranks stored in chunks."""

    def __init__(
        self,
        inner: Checkpoint,
        chunks: StoredChunks,
        path: Path,
        copies: tuple[tuple[str, ...], ...],
    ) -> None:
        super().__init__(inner)
        self._chunks = chunks
        self._path = path
        self._copies = copies

    @property
    def copies(self) -> tuple[tuple[str, ...], ...]:
        """Groups of tensors whose chunks have the same forms and checksums.

        A parameter that the model shares is stored by each of its names.
        """
        return self._copies

    @property
    def path(self) -> str:
        """Absolute path of the folder that the user named."""
        return str(self._path)

    @property
    def max_shard_size(self) -> str:
        """Size of shards as transformers writes them: files of ranks are none."""
        return "5GB"

    def open_reader(self) -> TensorReader:
        """Return a reader that puts tensors together."""
        return ChunkReader(self.identity.files, self.tensors, self._chunks)


def open_dcp(opening: Opening, folder: Path, root: Path) -> Source:
    """Open the checkpoint in `folder`; config and tokenizer of the model lie in `root`.

    Raises `SourceError` if files are missing, damaged or outside the folder, or if it is not clear
    which tensors are the model's; `BudgetError` if to read the description might take the process
    beyond the opening's memory.
    """
    located, max_memory = opening.located, opening.max_memory
    path = folder / DCP_METADATA
    refuse_link_outside(root, path)
    file = regular_file(opening.text, root, path)
    described, sha256 = _described(path, file.nbytes, max_memory)
    try:
        names = model_keys(described.tensors, described.others, described.paths)
        wanted, rows = _wanted_tensors(described, names)
    except SourceError as error:
        raise error.of(path) from None
    if file.nbytes > _LITTLE_NBYTES:
        check_room_for(len(wanted), opening.text, max_memory=max_memory)
    stored = _Stored(opening.text, folder, root, described, wanted, rows)
    files, places = stored.find()
    table, chunks = _in_order(wanted, places)
    files = [replace(file, header_sha256=sha256), *files]
    checkpoint = Checkpoint(
        text=opening.text,
        folder=root,
        is_single_file=False,
        identity=SourceIdentity(
            tuple(replace(each, commit=located.commit) for each in files),
            located.hub_id,
            located.commit,
        ),
        metadata=({"format": "pt"},) * len(files),
        config=read_config(root),
        tensors=table,
        left_out=located.left_out,
    )
    return DcpSource(checkpoint, chunks, located.path.absolute(), _copies(wanted, places))


def _described(path: Path, nbytes: int, max_memory: int | None) -> tuple[DcpMetadata, str]:
    """Return the description of a checkpoint, and its SHA-256 (hex)."""

    def check(needed: int) -> None:
        # The planner's check, which names the least that works, is enough for small ones.
        if nbytes > _LITTLE_NBYTES:
            purpose = "to read the description of its chunks"
            check_room(needed, max_memory=max_memory, subject=path, purpose=purpose)

    try:
        check(nbytes)
        content = read_regular(path, max_nbytes=MOST_METADATA_NBYTES)
        return read_metadata(content, check_room=check), hashlib.sha256(content).hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None
    except SourceError as error:
        raise error.of(path) from None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tensor of the model."""

    name: str
    dtype: str
    """Its safetensors dtype."""
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]
    """Its chunks, without empty ones."""


def _wanted_tensors(
    described: DcpMetadata, names: Mapping[str, str]
) -> tuple[list[_Wanted], list[int]]:
    """Return the tensors with these keys → names, and the row of each chunk's record.

    Raises `SourceError` if chunks do not fill a tensor, or if one is stored nowhere.
    """
    records, known = described.records, set()
    found: list[_Wanted] = []
    rows: list[int] = []
    for key, name in names.items():
        tensor = described.tensors[key]
        dtype = named_dtype(tensor.dtype)
        if dtype is None:
            raise SourceError(
                f"{shown(name)} is of {shown(tensor.dtype)}, which safetensors lacks",
                remedy="save it in another dtype",
            )
        form = tensor.shape, tuple(tensor.chunks)
        if form not in known:
            try:
                check_chunks(*form)
            except SourceError as error:
                raise error.of(shown(name)) from None
            known.add(form)
        if tensor_nbytes(dtype, tensor.shape) >= 2**62:
            raise SourceError(f"{shown(name)} {list(tensor.shape)} is too large", remedy=_REFETCH)
        chunks = [chunk for chunk in tensor.chunks if 0 not in chunk.sizes]
        found.append(_Wanted(name, dtype, tensor.shape, chunks))
        for chunk in chunks:
            row = records.row(key, chunk.offsets)
            if row is None:
                raise SourceError(
                    f"{shown(name)} has no record of its chunk at {list(chunk.offsets)}",
                    remedy=_REFETCH,
                )
            if row in records.transformed:
                raise SourceError(
                    f"{shown(name)} is stored by an extension ({records.transformed[row]}), "
                    "such as compression, not as it is",
                    remedy="save it again without extensions of the writer",
                )
            rows.append(row)
    return found, rows


@dataclass(frozen=True, slots=True)
class _Places:
    """The place of each chunk, in the order of tensors."""

    files: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    """First element's first byte in the file."""
    forms: npt.NDArray[np.int32]
    boxes: Sequence[Box]
    are_contiguous: npt.NDArray[np.bool_]
    """By form: True if elements lie in the order of the chunk's shape."""
    checksums: npt.NDArray[np.uint32]
    """CRC-32 of the chunk's bytes; 0 if unknown."""


class _Stored:
    """The records of wanted tensors, in the files of a checkpoint."""

    def __init__(
        self,
        text: str,
        folder: Path,
        root: Path,
        described: DcpMetadata,
        wanted: Sequence[_Wanted],
        rows: Sequence[int],
    ) -> None:
        self._text, self._folder, self._root = text, folder, root
        self._records = records = described.records
        self._owners = [each for each in wanted for _ in each.chunks]
        self._chunks = [chunk for each in wanted for chunk in each.chunks]
        chosen = np.array(rows, np.int64)
        self._numbers = np.frombuffer(records.file_numbers, np.int32)[chosen]
        self._offsets = np.frombuffer(records.offsets, np.int64)[chosen]
        self._lengths = np.frombuffer(records.lengths, np.int64)[chosen]
        self._starts = np.zeros(len(chosen), np.int64)
        self._files = np.zeros(len(chosen), np.int32)
        self._forms = np.zeros(len(chosen), np.int32)
        self._checksums = np.zeros(len(chosen), np.uint32)
        self._boxes: dict[Box, int] = {}
        self._are_contiguous: list[bool] = []

    def find(self) -> tuple[list[SourceFile], _Places]:
        """Return the files, and the place of each chunk in them, by the ends of its record.

        Files are numbered from 1: number 0 is the description.

        Raises `SourceError` if a file is not there, or a record is not the chunk's.
        """
        numbers = np.flatnonzero(np.bincount(self._numbers)).tolist() if len(self._numbers) else []
        files: list[SourceFile] = []
        for number in sorted(numbers, key=self._records.files.__getitem__):
            own = np.flatnonzero(self._numbers == number)
            own = own[np.argsort(self._offsets[own], kind="stable")]
            self._files[own] = 1 + len(files)
            files.append(self._find_in(self._records.files[number], own))
        return files, _Places(
            self._files,
            self._starts,
            self._forms,
            list(self._boxes),
            np.array(self._are_contiguous, np.bool_),
            self._checksums,
        )

    def _find_in(self, name: str, own: npt.NDArray[np.int64]) -> SourceFile:
        """Find chunks in a file, and return it with the digest of what was found."""
        finding = file_name_finding(name)
        if finding is not None:
            raise SourceError(
                f"names a file {shown(name)}, which {finding}",
                subject=self._folder / DCP_METADATA,
                remedy=_REFETCH,
            )
        path = self._folder / name
        refuse_link_outside(self._root, path)
        if not path.exists():
            raise SourceError(
                f"names {shown(name)}, which is not in the folder; a copy or download may be "
                "incomplete",
                subject=self._folder / DCP_METADATA,
                remedy=_REFETCH,
            )
        file = regular_file(self._text, self._root, path)
        digest = hashlib.sha256()
        reader = RecordReader()
        try:
            with open_regular(path) as opened:
                descriptor = opened.fileno()
                columns = (self._offsets[own].tolist(), self._lengths[own].tolist())
                for chunk, offset, length in zip(own.tolist(), *columns, strict=True):
                    if offset + length > file.nbytes:
                        raise self._odd(
                            chunk, f"should end at byte {offset + length}, the file ends before"
                        )
                    self._find_chunk(chunk, descriptor, offset, length, reader)
        except OSError as error:
            raise unreadable(path, error) from None
        except SourceError as error:
            raise error.of(path) from None
        for column in (self._offsets, self._lengths, self._starts, self._checksums):
            digest.update(column[own].tobytes())
        return replace(file, header_sha256=digest.hexdigest())

    def _find_chunk(
        self, number: int, descriptor: int, offset: int, length: int, reader: RecordReader
    ) -> None:
        wanted, chunk = self._owners[number], self._chunks[number]
        try:
            record, checksum = reader.read(descriptor, offset, length)
        except SourceError as error:
            raise error.of(self._subject(number)) from None
        tensor = record.tensor
        if tensor.dtype != wanted.dtype or tensor.shape != chunk.sizes:
            raise self._odd(
                number,
                f"is of {tensor.dtype} {list(tensor.shape)}, and should be of {wanted.dtype} "
                f"{list(chunk.sizes)}",
            )
        self._starts[number] = offset + record.first
        self._checksums[number] = checksum
        box = Box(*chunk, tensor.strides)
        form = self._boxes.get(box)
        if form is None:
            form = self._boxes[box] = len(self._boxes)
            self._are_contiguous.append(tensor.is_contiguous)
        self._forms[number] = form

    def _subject(self, number: int) -> str:
        wanted, chunk = self._owners[number], self._chunks[number]
        return f"the record of {shown(wanted.name)} at {list(chunk.offsets)}"

    def _odd(self, number: int, finding: str) -> SourceError:
        return SourceError(finding, subject=self._subject(number), remedy=_REFETCH)


def _copies(wanted: Sequence[_Wanted], places: _Places) -> tuple[tuple[str, ...], ...]:
    """Return the names of tensors of one dtype whose chunks have the same forms and checksums."""
    groups: dict[tuple[str, bytes], list[str]] = defaultdict(list)
    described = np.stack((places.forms, places.checksums.astype(np.int64)), axis=1)
    end = 0
    for each in wanted:
        own, end = slice(end, end + len(each.chunks)), end + len(each.chunks)
        if each.chunks and places.checksums[own].all():
            groups[each.dtype, described[own].tobytes()].append(each.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _in_order(wanted: Sequence[_Wanted], places: _Places) -> tuple[TensorTable, StoredChunks]:
    """Return the tensors in the order of their first chunks, and the chunks of those in several."""
    counts = np.array([len(each.chunks) for each in wanted], np.int64)
    firsts = np.cumsum(counts) - counts
    is_stored, is_one = counts > 0, counts == 1
    # An empty tensor is stored nowhere: it counts to the description.
    files, starts = np.zeros(len(wanted), np.int32), np.zeros(len(wanted), np.int64)
    files[is_stored] = places.files[firsts[is_stored]]
    starts[is_stored] = places.starts[firsts[is_stored]]
    is_split = counts > 1
    is_split[is_one] = ~places.are_contiguous[places.forms[firsts[is_one]]]
    order = np.lexsort((starts, files))
    ordered = [wanted[number] for number in order.tolist()]
    table = TensorTable(
        names=tuple(sys.intern(each.name) for each in ordered),
        shapes=tuple(each.shape for each in ordered),
        dtype_ranks=np.array([DTYPE_RANK[each.dtype] for each in ordered], np.uint8),
        files=files[order],
        starts=starts[order],
        nbytes=np.array([tensor_nbytes(each.dtype, each.shape) for each in ordered], np.int64),
    )
    if is_split.any():
        table = table.with_decoded(np.flatnonzero(is_split[order]))
    in_chunks = np.where(is_split, counts, 0)[order]
    ends = np.concatenate(([0], np.cumsum(in_chunks)))
    # Chunk i of the tensor in row r has the number firsts[r] + i among all.
    chosen = np.arange(ends[-1]) + np.repeat(firsts[order] - ends[:-1], in_chunks)
    return table, StoredChunks(
        ends, places.files[chosen], places.starts[chosen], places.forms[chosen], places.boxes
    )
