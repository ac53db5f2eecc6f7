"""Records of torch's distributed checkpoints: each is a whole file of `torch.save` of one tensor.

Records of one kind differ in their elements and checksums only. So one of them is taken apart, and
the others are compared with it: a hundred thousand are judged in seconds.
"""

import math
import os
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, cast

from shardmix.dtypes import BY_NAME
from shardmix.errors import SourceError
from shardmix.formats.torch_file import Archive, StoredTensor, check_within, load_description

_MOST_ENDS_NBYTES = 1 << 13
_MOST_KINDS = 1 << 10
_MOST_DESCRIPTION_NBYTES = 1 << 16
_MOST_OF_ONE_LENGTH = 8


class Record(NamedTuple):
    """The tensor of a record."""

    tensor: StoredTensor
    first: int
    """First element's first byte, from the record's first."""


class _Kind(NamedTuple):
    """A record that was taken apart, and that others are compared with."""

    record: Record
    head: bytes
    """Its bytes before the storage."""
    tail_nbytes: int
    """Number of those after it."""
    kept: Sequence[slice]
    """Parts of those after it that do not depend on the elements."""
    tail: bytes
    """The content of these parts."""
    checksum: slice
    """A place of the checksum, in the bytes after the storage."""
    has_checksum: bool
    """True if it is one of the tensor's elements only."""


class RecordReader:
    """Reads records, and remembers their kinds."""

    def __init__(self) -> None:
        self._kinds: dict[int, list[_Kind]] = {}
        self._num_kinds = 0

    def read(self, descriptor: int, offset: int, length: int) -> tuple[Record, int]:
        """Return a record of an open file, and the CRC-32 of its elements.

        That is 0 if it is unknown: its writer took none, or not of these elements only. Raises
        `SourceError` if the record is no file of `torch.save` of one tensor, and `OSError`.
        """
        kinds = self._kinds.get(length, ())
        head = os.pread(descriptor, max(map(_head_nbytes, kinds)), offset) if kinds else b""
        for kind in kinds:
            if head.startswith(kind.head):
                tail = os.pread(descriptor, kind.tail_nbytes, offset + length - kind.tail_nbytes)
                if b"".join(map(tail.__getitem__, kind.kept)) == kind.tail:
                    if not kind.has_checksum:
                        return kind.record, 0
                    return kind.record, int.from_bytes(tail[kind.checksum], "little")
        return self._take_apart(descriptor, offset, length)

    def _take_apart(self, descriptor: int, offset: int, length: int) -> tuple[Record, int]:
        window = cast("BinaryIO", _Window(descriptor, offset, length))
        archive = Archive(window, length, most_nbytes=_MOST_DESCRIPTION_NBYTES)
        tensor = load_description(archive.read_pickle())
        if not isinstance(tensor, StoredTensor):
            raise SourceError(
                "has a record that is not of one tensor",
                remedy="save it again with torch.distributed.checkpoint.save",
            )
        check_within("a record", tensor)
        start, stop, checksum, changing = archive.stored(tensor.storage)
        width = BY_NAME[tensor.dtype].bits // 8
        record = Record(tensor, start + tensor.offset * width)
        has_checksum = stop - start == math.prod(tensor.shape) * width
        tail_nbytes = length - stop
        parts = [slice(part.start - stop, part.stop - stop) for part in changing]
        known = self._kinds.get(length, [])
        if (
            max(start, tail_nbytes) <= _MOST_ENDS_NBYTES
            and len(known) < _MOST_OF_ONE_LENGTH
            and self._num_kinds < _MOST_KINDS
            and all(part.start >= 0 for part in parts)
        ):
            head = os.pread(descriptor, start, offset)
            tail = os.pread(descriptor, tail_nbytes, offset + stop)
            kept = _between(parts, tail_nbytes)
            content = b"".join(map(tail.__getitem__, kept))
            kind = _Kind(record, head, tail_nbytes, kept, content, parts[0], has_checksum)
            self._kinds.setdefault(length, known).append(kind)
            self._num_kinds += 1
        return record, checksum if has_checksum else 0


def _head_nbytes(kind: _Kind) -> int:
    return len(kind.head)


def _between(parts: Sequence[slice], nbytes: int) -> list[slice]:
    """Return what lies between and around parts."""
    kept, at = [], 0
    for part in sorted(parts, key=lambda part: part.start):
        kept.append(slice(at, part.start))
        at = part.stop
    return [*kept, slice(at, nbytes)]


class _Window:
    """A part of an open file, as a file."""

    def __init__(self, descriptor: int, offset: int, nbytes: int) -> None:
        self._descriptor, self._offset, self._nbytes = descriptor, offset, nbytes
        self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte, as files do."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._nbytes}[whence]
        if origin + offset < 0:
            raise ValueError("a byte before the first")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        """Return the next byte's number."""
        return self._at

    def seekable(self) -> bool:
        """Return True."""
        return True

    def read(self, count: int = -1) -> bytes:
        """Return so many of the next bytes, or all."""
        left = max(0, self._nbytes - self._at)
        count = left if count < 0 else min(count, left)
        content = os.pread(self._descriptor, count, self._offset + self._at)
        self._at += len(content)
        return content
