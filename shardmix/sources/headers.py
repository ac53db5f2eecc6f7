"""Reads the headers of weight files, and decodes each of them once.

Fine-tunes of one model mostly have its header, byte for byte.
"""

import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from shardmix.errors import SourceError, one_line, unreadable
from shardmix.formats.safetensors_header import HeaderTable, decode_header
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES, header_nbytes
from shardmix.system.files import open_regular
from shardmix.system.memory import check_room

# Memory of decoding for each byte of a header: 3 to 5 measured, and 11 if each tensor has the
# shortest of names and a shape of its own.
_MEMORY_PER_HEADER_BYTE = 12
SHORT_HEADER_NBYTES = 1_000_000
"""Up to this size, some ten thousand tensors, the planner's check of memory is the only one.

That check names the least that works. Up to this size safetensors' parser, which takes 13 bytes for
each of the header's, judges a file as well; our rules are the same.
"""


class Headers:
    """Headers that were read, by their digest: a known one is not decoded again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], HeaderTable] = {}

    def read(
        self, path: Path, file_nbytes: int, *, num_before: int, max_memory: int | None
    ) -> tuple[HeaderTable, int, str]:
        """Return a file's tensors, the offset of its data, and its header's SHA-256.

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
        return table, HEADER_LENGTH_NBYTES + length, sha256


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
