"""Reads the headers of weight files, in both formats, and decodes each of safetensors once.

Fine-tunes of one model mostly have its header, byte for byte.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shardmix.dtypes import BY_NAME, DTYPE_RANK, tensor_nbytes
from shardmix.errors import SourceError, one_line, unreadable
from shardmix.formats.safetensors_header import HeaderTable, decode_header
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES, header_nbytes
from shardmix.formats.tensor_table import View
from shardmix.system.files import open_regular
from shardmix.system.memory import check_room

# Memory of decoding for each byte of a header: 3 to 5 measured, and 11 if each tensor has the
# shortest of names and a shape of its own.
_MEMORY_PER_HEADER_BYTE = 12
# Of a pickle that describes tensors, or of an archive's directory: 12 measured.
_MEMORY_PER_PICKLE_BYTE = 20
SHORT_HEADER_NBYTES = 1_000_000
"""Up to this size, some ten thousand tensors, the planner's check of memory is the only one.

That check names the least that works. Up to this size safetensors' parser, which takes 13 bytes for
each of the header's, judges a file as well; our rules are the same.
"""


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The tensors of one file, and what was read to know them."""

    names: Sequence[str]
    """Names, row by row."""
    shapes: Sequence[tuple[int, ...]]
    """Shapes."""
    dtype_ranks: npt.NDArray[np.uint8]
    """Index into `dtypes.DTYPES`."""
    starts: npt.NDArray[np.int64]
    """First byte in the file."""
    nbytes: npt.NDArray[np.int64]
    """Bytes of the elements."""
    metadata: Mapping[str, str]
    """The file's own entries."""
    nbytes_read: int
    """Size of the header."""
    sha256: str
    """SHA-256 (hex) of the header."""
    views: Mapping[int, View] = field(default_factory=dict)
    """Row of a tensor whose elements are in another order → the way that they lie."""


class Headers:
    """Headers that were read, by their digest: a known one is not decoded again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], HeaderTable] = {}

    def read(
        self, path: Path, file_nbytes: int, *, num_before: int, max_memory: int | None
    ) -> FileHeader:
        """Return the header of a file in safetensors.

        `num_before` counts the header bytes of the checkpoint's files before this one. Raises
        `SourceError` if it is no safetensors file, `BudgetError` if decoding it might take the
        process beyond `max_memory` (bytes).
        """
        try:
            with open_regular(path) as file:
                length = header_nbytes(file.read(HEADER_LENGTH_NBYTES), file_nbytes=file_nbytes)
                if num_before + length > SHORT_HEADER_NBYTES:
                    check_room(
                        _MEMORY_PER_HEADER_BYTE * length,
                        max_memory=max_memory,
                        subject=path,
                        purpose=f"to decode its header of {length} bytes",
                    )
                header = file.read(length)
            sha256 = hashlib.sha256(header).hexdigest()
            table = self._known.get((sha256, file_nbytes))
            if table is None:
                table = decode_header(header, file_nbytes=file_nbytes)
                if length <= SHORT_HEADER_NBYTES:
                    _let_safetensors_judge(path, header, file_nbytes)
                self._known[sha256, file_nbytes] = table
        except SourceError as error:
            raise error.of(path) from None
        except SafetensorError as error:
            raise SourceError(
                f"not a valid safetensors file ({one_line(error)})",
                subject=path,
                remedy="fetch it again",
            ) from None
        except OSError as error:
            raise unreadable(path, error) from None
        data_start = HEADER_LENGTH_NBYTES + length
        return FileHeader(
            table.names,
            table.shapes,
            table.dtype_ranks,
            table.starts + data_start,
            table.nbytes,
            table.metadata,
            data_start,
            sha256,
        )


def read_torch_header(
    path: Path, file_nbytes: int, *, num_before: int, max_memory: int | None
) -> FileHeader:
    """Return the description of the tensors in a file of `torch.save`, without running it.

    Arguments and errors are those of `Headers.read`.
    """

    def check_size(nbytes: int) -> None:
        if num_before + nbytes > SHORT_HEADER_NBYTES:
            check_room(
                _MEMORY_PER_PICKLE_BYTE * nbytes,
                max_memory=max_memory,
                subject=path,
                purpose=f"to read its description of {nbytes} bytes",
            )

    # Imported here: few models need it.
    from shardmix.formats.torch_file import read_torch_file

    try:
        with open_regular(path) as file:
            found = read_torch_file(file, file_nbytes=file_nbytes, check_size=check_size)
    except SourceError as error:
        raise error.of(path) from None
    except OSError as error:
        raise unreadable(path, error) from None
    tensors = list(found.tensors.values())
    widths = [BY_NAME[tensor.dtype].bits // 8 for tensor in tensors]
    starts = [
        found.storage_starts[tensor.storage.key] + tensor.offset * width
        for tensor, width in zip(tensors, widths, strict=True)
    ]
    return FileHeader(
        names=[sys.intern(name) for name in found.tensors],
        shapes=[tensor.shape for tensor in tensors],
        dtype_ranks=np.array([DTYPE_RANK[tensor.dtype] for tensor in tensors], np.uint8),
        starts=np.array(starts, np.int64),
        nbytes=np.array(
            [tensor_nbytes(tensor.dtype, tensor.shape) for tensor in tensors], np.int64
        ),
        metadata={"format": "pt"},
        nbytes_read=found.header_nbytes,
        sha256=found.sha256,
        views={
            row: View(start, tensor.strides)
            for row, (tensor, start) in enumerate(zip(tensors, starts, strict=True))
            if not tensor.is_contiguous
        },
    )


def _let_safetensors_judge(path: Path, header: bytes, file_nbytes: int) -> None:
    """Pass a header to safetensors' own parser; raise `SafetensorError` if it objects.

    safetensors maps a file that it opens, and a file that shrinks in that moment would kill the
    process. So, if the system can, it gets a file in memory: that header, and a hole for the data.
    """
    if not hasattr(os, "memfd_create"):
        with safe_open(path, framework="np"):
            return
    descriptor = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, len(header).to_bytes(HEADER_LENGTH_NBYTES, "little") + header)
        os.truncate(descriptor, file_nbytes)
        with safe_open(f"/proc/self/fd/{descriptor}", framework="np"):
            return
    finally:
        os.close(descriptor)
