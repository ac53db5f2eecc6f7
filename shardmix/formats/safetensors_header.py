"""A safetensors header, decoded into columns and judged by the format's rules.

A long header is cut and decoded a piece at a time, so that a million tensors cost only their names
and columns. Knows bytes, not files. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import re
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from shardmix.dtypes import DTYPE_RANK, dtype_bits
from shardmix.errors import SourceError, one_line, shown
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES

_PIECE_NBYTES = 1 << 20  # some ten thousand tensors
_MOST_UNDIVIDED_NBYTES = 8 << 20
_METADATA = "__metadata__"
_ENTRY_END = re.compile(rb'\}\s*,\s*"')
_MOST_DIMENSIONS = 64
_LARGEST_COUNT = 2**63 - 1
_LARGEST_PRODUCT = 2**64 - 1  # the largest count of safetensors

_Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_COUNT)]


class _Entry(msgspec.Struct, gc=False):
    """One tensor of the JSON. All fields have defaults, since metadata also decodes as one."""

    dtype: str = ""
    shape: tuple[_Count, ...] | None = None
    data_offsets: tuple[_Count, _Count] | None = None
    """First and past-the-last byte, counted from the end of the header."""


@dataclass(frozen=True, slots=True)
class HeaderTable:
    """The tensors of one file, in the order of their data."""

    names: list[str]
    """Interned: they recur in every model of a merge."""
    shapes: list[tuple[int, ...]]
    dtype_ranks: npt.NDArray[np.uint8]
    """Index into `dtypes.DTYPES`."""
    metadata: dict[str, str]
    """The file's own entries, in its order."""
    starts: npt.NDArray[np.int64]
    """First byte, counted from the end of the header."""
    nbytes: npt.NDArray[np.int64]


def decode_header(header: bytes, *, file_nbytes: int) -> HeaderTable:
    """Return the tensors that a JSON header describes.

    Raises `SourceError` if the header does not parse, or is not valid: tensors must follow one
    another without a gap and fill the file. The error has only the finding; the caller adds the
    file.
    """
    columns = _Columns()
    try:
        for piece in _pieces(header):
            columns.add(piece)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"has a header that does not parse ({one_line(error)})", remedy="fetch it again"
        ) from None
    _refuse_a_name_twice(columns.names)
    return columns.table(before_data=HEADER_LENGTH_NBYTES + len(header), file_nbytes=file_nbytes)


def _pieces(header: bytes) -> Iterator[bytes]:
    """Split a JSON object between its entries into smaller objects.

    If the separator matches inside a tensor name, the piece before it is not valid JSON. We then
    decode the rest at once. So pieces that parse are the object's own.
    """
    start, opening = 0, b""
    while len(header) - start > _PIECE_NBYTES:
        ends = [end.start() for end in _ENTRY_END.finditer(header, start, start + _PIECE_NBYTES)]
        if not ends:
            break
        piece = opening + header[start : ends[-1] + 1] + b"}"
        try:
            msgspec.json.decode(piece, type=msgspec.Raw)
        except msgspec.DecodeError:
            break
        yield piece
        start, opening = header.index(b'"', ends[-1]), b"{"
    if len(header) - start > _MOST_UNDIVIDED_NBYTES:
        # If it does not parse, that is the error.
        msgspec.json.decode(opening + header[start:], type=msgspec.Raw)
        raise SourceError(
            "has a header that cannot be read in parts, for an entry of more than a megabyte or "
            'names with `},"` in them; no model has such',
            remedy="save it again with other names",
        )
    yield opening + header[start:]


@dataclass(frozen=True, slots=True)
class _Kind:
    """The values that all tensors of one dtype and shape share."""

    rank: int
    """Index into `dtypes.DTYPES`."""
    shape: tuple[int, ...]
    nbytes: int


class _Columns:
    """The tensors decoded so far, a few bytes each beside the name."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._metadata: dict[str, str] = {}
        self._starts, self._stops = array("q"), array("q")
        self._kind_of = array("i")
        self._kinds: list[_Kind] = []
        self._known_kinds: dict[tuple[str, tuple[int, ...] | None], int] = {}

    def add(self, piece: bytes) -> None:
        """Decode the entries of one piece."""
        entries, metadata = _decode_entries(piece)
        self._metadata |= metadata
        for name, entry in entries.items():
            key = (entry.dtype, entry.shape)
            kind = self._known_kinds.get(key)
            if kind is None:
                self._kinds.append(_judged_kind(name, entry))
                kind = self._known_kinds[key] = len(self._kinds) - 1
            if entry.data_offsets is None:
                raise _without_a_field(name)
            self.names.append(name)
            self._kind_of.append(kind)
            self._starts.append(entry.data_offsets[0])
            self._stops.append(entry.data_offsets[1])

    def table(self, *, before_data: int, file_nbytes: int) -> HeaderTable:
        """Return all tensors in data order; raise `SourceError` if they do not fill the file."""
        starts, stops, kind_of = map(np.asarray, (self._starts, self._stops, self._kind_of))
        described = int(stops.max()) if len(stops) else 0
        expected_nbytes = before_data + described
        if file_nbytes < expected_nbytes:
            raise SourceError(
                f"has a header that describes {expected_nbytes} bytes but the file has "
                f"{file_nbytes}, {expected_nbytes - file_nbytes} too few; a download may have "
                "been cut off",
                remedy="fetch it again",
            )
        num_extra = file_nbytes - expected_nbytes
        if num_extra > 0:
            raise SourceError(
                f"has {num_extra} byte{'s' * (num_extra > 1)} too many at its end: its header "
                f"describes {expected_nbytes} bytes but the file has {file_nbytes}; something was "
                "appended to it, or header and data are of two files",
                remedy="fetch it again, or save it again",
            )
        names = self.names
        order = np.lexsort((stops, starts))
        if (order[:-1] > order[1:]).any():
            names = [names[row] for row in order.tolist()]
            starts, stops, kind_of = starts[order], stops[order], kind_of[order]
        nbytes = np.array([kind.nbytes for kind in self._kinds], dtype=np.uint64)[kind_of]
        _check_offsets(names, starts, stops, nbytes)
        ranks = np.array([kind.rank for kind in self._kinds], dtype=np.uint8)
        return HeaderTable(
            names=list(map(sys.intern, names)),
            shapes=[self._kinds[kind].shape for kind in kind_of.tolist()],
            dtype_ranks=ranks[kind_of],
            metadata=self._metadata,
            starts=starts,
            nbytes=nbytes.astype(np.int64),
        )


def _decode_entries(piece: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Return the tensors of a piece, and the metadata if it is there."""
    try:
        entries = msgspec.json.decode(piece, type=dict[str, _Entry])
    except msgspec.ValidationError:
        # Perhaps only metadata with a key named like a tensor's field: decode it separately.
        raw = msgspec.json.decode(piece, type=dict[str, msgspec.Raw])
        if _METADATA not in raw:
            raise
        entries = {
            name: _Entry() if name == _METADATA else msgspec.json.decode(raw[name], type=_Entry)
            for name in raw
        }
    # Each entry has a brace. If there are more, a name may occur twice.
    if piece.count(b"{") != len(entries) + 1:
        json.loads(piece, object_pairs_hook=_refuse_duplicates)
    if entries.pop(_METADATA, None) is None:
        return entries, {}
    raw = msgspec.json.decode(piece, type=dict[str, msgspec.Raw])
    metadata = msgspec.json.decode(raw[_METADATA], type=dict[str, str] | None)
    return entries, metadata or {}


def _refuse_a_name_twice(names: list[str]) -> None:
    """Raise `SourceError` if a name occurs in two pieces; within one it was checked before."""
    hashes = np.fromiter(map(hash, names), dtype=np.int64, count=len(names))
    hashes.sort()
    repeated = set(hashes[1:][hashes[:-1] == hashes[1:]].tolist())
    if repeated:
        _refuse_duplicates([(name, None) for name in names if hash(name) in repeated])


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise SourceError(
                f"has a header that names {shown(key)} twice", remedy="fetch it again"
            )
        seen.add(key)


def _judged_kind(name: str, entry: _Entry) -> _Kind:
    if entry.shape is None or not entry.dtype:
        raise _without_a_field(name)
    if entry.dtype not in DTYPE_RANK:
        raise SourceError(
            f"has a tensor, {shown(name)}, of the dtype {shown(entry.dtype)}, which safetensors "
            "does not know",
            remedy="fetch it again, or convert it",
        )
    if len(entry.shape) > _MOST_DIMENSIONS:
        raise SourceError(
            f"has a tensor, {shown(name)}, of {len(entry.shape)} dimensions; numpy and torch know "
            f"{_MOST_DIMENSIONS} at most",
            remedy="fetch it again",
        )
    num_elements = 1
    for length in entry.shape:
        num_elements *= length
        if num_elements > _LARGEST_PRODUCT:
            break
    bits = num_elements * dtype_bits(entry.dtype)
    if bits > _LARGEST_PRODUCT:
        raise SourceError(
            f"has a tensor, {shown(name)}, of the shape {shown(list(entry.shape))}, which is more "
            "than any file holds",
            remedy="fetch it again",
        )
    if bits % 8:
        raise SourceError(
            f"has a tensor, {shown(name)}, of {math.prod(entry.shape)} elements of {entry.dtype}, "
            "which end within a byte",
            remedy="fetch it again",
        )
    return _Kind(DTYPE_RANK[entry.dtype], entry.shape, bits // 8)


def _without_a_field(name: str) -> SourceError:
    return SourceError(
        f"has a header entry, {shown(name)}, without a dtype, shape and data_offsets",
        remedy="fetch it again",
    )


def _check_offsets(
    names: list[str],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
    nbytes: npt.NDArray[np.uint64],
) -> None:
    """Raise `SourceError` unless tensors follow one another, each of its own size."""
    before = np.concatenate((np.zeros(min(len(stops), 1), dtype=np.int64), stops[:-1]))
    for is_wrong, rule in (
        (stops < starts, "ends before it begins"),
        (starts < before, "overlaps the one before it"),
        (starts > before, "leaves a gap after the one before it"),
        (
            (stops - starts).astype(np.uint64) != nbytes,
            "has another size than its dtype and shape come to",
        ),
    ):
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            raise SourceError(
                f"has a header in which {shown(names[at])}, bytes {starts[at]} to {stops[at]}, "
                f"{rule}",
                remedy="fetch it again",
            )
