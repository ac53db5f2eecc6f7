"""The safetensors byte layout: the length of a header, and headers encoded.

Knows bytes, not files, and neither torch nor numpy. A file is `<u64 header length><JSON
header><tensor data>`; a tensor's `data_offsets` count from the first byte after the header. Format:
https://github.com/huggingface/safetensors#format
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgspec

from shardmix.dtypes import DTYPE_RANK, tensor_nbytes
from shardmix.errors import SourceError

HEADER_LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000  # the limit of the safetensors library

# First bytes of other kinds of files under this name, what they are, and the remedy.
_FETCH = "fetch the file itself again"
_CONVERT = "convert it to safetensors"
_OTHER_KINDS = (
    (b"<", "a web page (HTML or XML)", _FETCH),
    (b'{"', "JSON text, such as a server's answer", _FETCH),
    (b"PK\x03\x04", "a zip archive, as torch.save writes", _CONVERT),
    (b"\x80\x02", "a pickle, as torch.save once wrote", _CONVERT),
    (b"GGUF", "a GGUF file", _CONVERT),
    (b"version ", "a Git LFS pointer", "run `git lfs pull` there"),
    (b"\x89HDF", "an HDF5 file, as Keras writes", _CONVERT),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it."""

    name: str
    dtype: str
    """The safetensors name of the dtype, such as "BF16"."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    nbytes: int
    """Length in bytes."""

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


def header_nbytes(prefix: bytes, *, file_nbytes: int) -> int:
    """Return the length of the JSON header from a file's first 8 bytes.

    Raises `SourceError` for another kind of file, and for a length that cannot be true, so that
    nobody allocates memory for a damaged file. The error has only the finding; the caller adds the
    file.
    """
    length = int.from_bytes(prefix, "little")
    most = min(MAX_HEADER_NBYTES, file_nbytes - HEADER_LENGTH_NBYTES)
    if len(prefix) == HEADER_LENGTH_NBYTES and length <= most:
        return length
    for opening, kind, remedy in _OTHER_KINDS:
        if prefix.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(opening):
            raise SourceError(f"is {kind}, not a safetensors file", remedy=remedy)
    if len(prefix) < HEADER_LENGTH_NBYTES:
        size = f"is {file_nbytes} bytes long, too short for" if file_nbytes else "is empty, not"
        raise SourceError(
            f"{size} a safetensors file; a download may have been cut off",
            remedy="fetch it again",
        )
    if MAX_HEADER_NBYTES < length <= file_nbytes - HEADER_LENGTH_NBYTES:
        raise SourceError(
            f"has a header of {length} bytes; safetensors allows {MAX_HEADER_NBYTES} at most",
            remedy="save it in several files",
        )
    finding = "it is not a safetensors file"
    if length <= MAX_HEADER_NBYTES:
        finding = "a download may have been cut off"
    raise SourceError(
        f"claims a header of {length} bytes but the file has {file_nbytes}; {finding}",
        remedy="fetch it again",
    )


@dataclass(frozen=True, slots=True)
class OutputHeader:
    """The first bytes of an output file, and the offset of each tensor."""

    encoded: bytes
    """Length prefix, JSON and padding: the file's first bytes."""
    names: tuple[str, ...]
    """Its tensors, in data order."""
    offsets: tuple[int, ...]
    """Offset of each tensor in the file, and one more, the end of the last one."""

    @property
    def file_nbytes(self) -> int:
        """Size of the whole file."""
        return self.offsets[-1]


def encode_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> OutputHeader:
    """Lay out (name, dtype, shape) triples as `safetensors.torch.save_file` does, byte for byte.

    Tensors go by dtype, the widest first, then by name; the header is padded with spaces to a
    multiple of 8 bytes, so that the data is aligned. Metadata keeps its order, which the library
    leaves to chance.
    """
    ordered = sorted(tensors, key=lambda item: (-DTYPE_RANK[item[1]], item[0]))
    sizes = [tensor_nbytes(dtype, shape) for _, dtype, shape in ordered]
    bounds = list(accumulate(sizes, initial=0))
    entries: dict[str, object] = {"__metadata__": metadata}
    for (name, dtype, shape), offsets in zip(ordered, pairwise(bounds), strict=True):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % 8)
    encoded = len(text).to_bytes(HEADER_LENGTH_NBYTES, "little") + text
    return OutputHeader(
        encoded=encoded,
        names=tuple(name for name, _, _ in ordered),
        offsets=tuple(len(encoded) + bound for bound in bounds),
    )
