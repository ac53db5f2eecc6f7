"""Files of `torch.save`: where each tensor's elements lie, without running anything of the file.

A file is a zip archive whose storages are stored uncompressed, so each is a range of bytes, and a
pickle that describes tensors as views of storages. The pickle goes through a machine of its own: a
table of harmless opcodes, and a table of the few names that may be called, all of which only
describe tensors. Memory is bounded by the pickle's length. Knows bytes, not models. Format:
https://pytorch.org/docs/stable/notes/serialization.html
"""

import hashlib
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from shardmix.dtypes import BY_NAME
from shardmix.errors import SourceError, one_line, shown

MOST_PICKLE_NBYTES = 256 << 20
_MOST_DIMENSIONS = 64
_MOST_DEPTH = 4
_MOST_ARGUMENTS = 16
# The fewest bytes of a pickle for each object that it makes: 15 of a model's.
_LEAST_OBJECT_NBYTES = 6
_FREE_OBJECTS = 10_000
_LOCAL_HEADER_NBYTES = 30
_CENTRAL_HEADER_NBYTES = 46
_ENCRYPTED = 0x1
_HAS_DESCRIPTOR = 0x8
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_RESAVE = "load it with torch.load and save it with save_file of safetensors, or torch.save"

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""The usual names of the weights in a trainer's checkpoint."""


class Storage(NamedTuple):
    """A stretch of bytes that tensors are views of."""

    key: str
    """Its name in the archive."""
    dtype: str | None
    """Safetensors dtype of its elements; None if each tensor says it."""
    num_elements: int
    """Number of its elements; of bytes if it has no dtype."""


class StoredTensor(NamedTuple):
    """A tensor, as a view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """True if its elements follow one another in the order of its shape."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return math.prod(self.shape) == 0
            expected *= size
        return True


class StoredBytes(NamedTuple):
    """The bytes of a storage in a file."""

    start: int
    """Their first byte."""
    stop: int
    """The one past their last."""
    checksum: int
    """Their CRC-32; 0 if the writer took none."""
    changing: Sequence[slice]
    """Parts of the file that depend on them: checksums, and an identity made of these."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The tensors of a file, and the bytes that describe them."""

    tensors: Mapping[str, StoredTensor]
    """Name → tensor, in the file's order."""
    storage_starts: Mapping[str, int]
    """Storage's key → its first byte in the file."""
    header_nbytes: int
    """Bytes that were read to know this."""
    sha256: str
    """SHA-256 (hex) of these bytes."""


def named_dtype(torch_name: str) -> str | None:
    """Return the safetensors dtype of a name such as `torch.float32`, or None."""
    return _DTYPES.get(torch_name)


def read_torch_file(
    file: BinaryIO, *, file_nbytes: int, check_size: Callable[[int], None] = lambda nbytes: None
) -> TorchFile:
    """Return the tensors that an open file describes.

    `check_size` is called with the length of each part before it is read. Raises `SourceError` if
    it is no such file, or describes something else than tensors; the caller adds the file.
    """
    archive = Archive(file, file_nbytes, check_size)
    description = archive.read_pickle()
    tensors = dict(_named_tensors(_state(load_description(description))))
    starts = {}
    for name, tensor in tensors.items():
        key = tensor.storage.key
        if key not in starts:
            starts[key] = archive.storage_start(tensor.storage)
        check_within(name, tensor)
    digest = hashlib.sha256(description)
    digest.update(repr(sorted(starts.items())).encode())
    return TorchFile(tensors, starts, len(description), digest.hexdigest())


class Archive:
    """The zip archive around a pickle and its storages."""

    def __init__(
        self,
        file: BinaryIO,
        file_nbytes: int,
        check_size: Callable[[int], None] = lambda nbytes: None,
        *,
        most_nbytes: int = MOST_PICKLE_NBYTES,
    ) -> None:
        """Open an archive; `most_nbytes` bounds its pickle and its directory."""
        self._file = file
        self._most_nbytes = most_nbytes
        self._check_size = check_size
        self._file_nbytes = file_nbytes
        file.seek(0)
        start = file.read(64)
        if not start.startswith(b"PK\x03\x04"):
            raise _no_zip(start)
        try:
            self._zip = zipfile.ZipFile(_Bounded(file, check_size, most_nbytes))
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError) as error:
            raise SourceError(
                f"is a damaged archive of torch.save ({one_line(error)})", remedy="fetch it again"
            ) from None
        self._entries = {entry.filename: entry for entry in self._zip.infolist()}
        pickles = [name for name in self._entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or pickles[0].count("/") > 1:
            what = "a TorchScript program or another archive" if self._entries else "empty"
            raise SourceError(
                f"is {what}, not an archive of torch.save (it has {len(pickles)} files data.pkl)",
                remedy="save the model's state dict",
            )
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}constants.pkl" in self._entries:
            raise SourceError(
                "is a TorchScript program", remedy="save the state dict of the model that it is of"
            )

    def read_pickle(self) -> bytes:
        """Return the pickle that describes the tensors."""
        order = self._entries.get(f"{self._root}byteorder")
        if order is not None and self._content(order, 16).strip() != b"little":
            raise SourceError(
                "is of a machine with big-endian numbers", remedy="save it again on another one"
            )
        return self._content(self._entries[f"{self._root}data.pkl"], self._most_nbytes)

    def storage_start(self, storage: Storage) -> int:
        """Return a storage's first byte in the file; raise `SourceError` if it is not all there."""
        return self._start(self._storage_entry(storage))

    def stored(self, storage: Storage) -> "StoredBytes":
        """Return the bytes of a storage, and the parts of the file that depend on them.

        Raises `SourceError` if they are not all there.
        """
        entry = self._storage_entry(storage)
        entries = [entry, self._entries.get(f"{self._root}.data/serialization_id")]
        named = {each.filename: self._start(each) for each in entries if each is not None}
        start = named[entry.filename]
        parts = []
        for each in (each for each in entries if each is not None):
            stop = named[each.filename] + each.file_size
            if each is not entry:
                parts.append(slice(named[each.filename], stop))
            if each.flag_bits & _HAS_DESCRIPTOR:
                parts.append(slice(stop + 4, stop + 8))
            else:
                parts.append(slice(each.header_offset + 14, each.header_offset + 18))
        at = max(0, self._zip.start_dir)
        for each in self._zip.infolist():
            self._file.seek(at)
            header = self._file.read(_CENTRAL_HEADER_NBYTES)
            if each.filename in named:
                parts.append(slice(at + 16, at + 20))
            lengths = (int.from_bytes(header[i : i + 2], "little") for i in (28, 30, 32))
            at += _CENTRAL_HEADER_NBYTES + sum(lengths)
        return StoredBytes(start, start + entry.file_size, entry.CRC, parts)

    def _storage_entry(self, storage: Storage) -> zipfile.ZipInfo:
        entry = self._entries.get(f"{self._root}data/{storage.key}")
        if entry is None:
            raise SourceError(
                f"lacks the storage {shown(storage.key)}, which a tensor is in",
                remedy="fetch it again",
            )
        width = 1 if storage.dtype is None else BY_NAME[storage.dtype].bits // 8
        if entry.file_size < storage.num_elements * width:
            raise SourceError(
                f"has {entry.file_size} bytes of storage {shown(storage.key)}, which should have "
                f"{storage.num_elements * width}",
                remedy="fetch it again",
            )
        return entry

    def _content(self, entry: zipfile.ZipInfo, most_nbytes: int) -> bytes:
        if entry.file_size > most_nbytes:
            raise SourceError(
                f"has a description of {entry.file_size} bytes; no model has such",
                remedy="fetch it again",
            )
        self._check_size(entry.file_size)
        self._file.seek(self._start(entry))
        return self._file.read(entry.file_size)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Return the first byte of an entry's content, which must be stored as it is."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
            raise SourceError(
                f"stores {shown(entry.filename)} compressed or encrypted, as torch.save never does",
                remedy="save it again",
            )
        # A damaged directory may say that an entry begins before the file, or anywhere.
        is_within = 0 <= entry.header_offset <= self._file_nbytes
        self._file.seek(entry.header_offset if is_within else self._file_nbytes)
        header = self._file.read(_LOCAL_HEADER_NBYTES)
        if len(header) < _LOCAL_HEADER_NBYTES or not header.startswith(b"PK\x03\x04"):
            raise SourceError(
                f"has no {shown(entry.filename)} where its directory says", remedy="fetch it again"
            )
        name_nbytes = int.from_bytes(header[26:28], "little")
        extra_nbytes = int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER_NBYTES + name_nbytes + extra_nbytes
        if entry.compress_size != entry.file_size or start + entry.file_size > self._file_nbytes:
            raise SourceError(
                f"ends before the end of {shown(entry.filename)}; it was cut short",
                remedy="fetch it again",
            )
        return start


class _Bounded:
    """A file that refuses to be read in pieces of any size, as a hostile directory would have."""

    def __init__(self, file: BinaryIO, check_size: Callable[[int], None], most_nbytes: int) -> None:
        self._file = file
        self._check_size = check_size
        self._most_nbytes = most_nbytes
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        most = self._most_nbytes
        self._check_size(min(max(count, 0), most))
        content = self._file.read(min(count, most) if count >= 0 else most)
        if len(content) == most:
            raise ValueError("its directory is too large")
        return content


def _no_zip(start: bytes) -> SourceError:
    if _LEGACY_MAGIC in start:
        return SourceError(
            "is a file of torch.save before version 1.6, which is read only by running it",
            remedy=_RESAVE,
        )
    if start.startswith(b"\x80"):
        return SourceError("is a pickle, which may run code", remedy=_RESAVE)
    return SourceError(
        "is not a file of torch.save (it does not begin as one)",
        remedy="fetch it again (a small file may be a git-lfs pointer)",
    )


# What a pickle may name. All of it only describes.


class _State(dict[Any, Any]):
    """A dictionary of the pickle; what is set on it beside its entries is left out."""

    def __setitem__(self, key: Any, value: Any) -> None:
        # Python hashes tuples in tuples without a bound: a hostile key would end the process.
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError(f"a {type(key).__name__} as a key")
        super().__setitem__(key, value)


@dataclass(frozen=True, slots=True)
class _StorageType:
    """The type of a storage."""

    dtype: str | None


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise SourceError("describes a tensor without a storage", remedy="fetch it again")
    return _checked(StoredTensor(storage, storage.dtype, offset, shape, strides))


def _rebuild_tensor_of_dtype(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = None,
    hooks: Any = None,
    dtype: Any = None,
    *_: Any,
) -> StoredTensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, str):
        raise SourceError("describes a tensor without a storage", remedy="fetch it again")
    return _checked(StoredTensor(storage, dtype, offset, shape, strides))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _ordered(pairs: Any = ()) -> _State:
    # Python 3 sets the entries afterwards. A list of them could be named again and again, and each
    # call would copy it.
    if pairs != ():
        raise SourceError("makes a dictionary as only Python 2 does", remedy=_RESAVE)
    return _State()


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, tuple):  # a text would become as many objects, at each call
        raise TypeError(f"a size made of a {type(sizes).__name__}")
    return sizes


_DTYPES = {
    f"torch.{dtype.torch_name}": dtype.name for dtype in BY_NAME.values() if dtype.torch_name
}
_STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": None,
}
_CALLED: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
}


class _Machine(pickle._Unpickler):
    """Carries out a pickle of known opcodes and names.

    Python's own machine, not C's: its memo is a dictionary, so that no index makes it large.
    """

    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    stack: list[Any]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.num_left = _FREE_OBJECTS + len(content) // _LEAST_OBJECT_NBYTES

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name of the pickle stands for here."""
        full = f"{module}.{name}"
        if full in _CALLED:
            return _CALLED[full]
        if full in _DTYPES:
            return _DTYPES[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise SourceError(
            f"names {shown(full)}, which is no part of a tensor and might run code",
            remedy=f"save a file with tensors alone: {_RESAVE}",
        )

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a pickle refers to."""
        is_storage = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
        if not is_storage or not isinstance(pid[1], _StorageType) or not isinstance(pid[2], str):
            raise SourceError(
                f"refers to {shown(pid)}, which is no storage", remedy="fetch it again"
            )
        if not _is_count(pid[4]):
            raise SourceError(f"has a storage of {shown(pid[4])} elements", remedy="fetch it again")
        return Storage(pid[2], pid[1].dtype, pid[4])

    def load_reduce(self) -> None:
        """Call a function of our table."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not callable(function) or function not in _CALLED.values():
            raise SourceError(
                f"calls {shown(function)}, which is no part of a tensor",
                remedy=f"save a file with tensors alone: {_RESAVE}",
            )
        if len(arguments) > _MOST_ARGUMENTS:
            raise ValueError(f"{len(arguments)} arguments")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        """Leave out what is set on an object, such as `_metadata` on a state dict."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _State):
            raise SourceError(
                f"sets the state of {shown(self.stack[-1])}, which is no part of a tensor",
                remedy=f"save a file with tensors alone: {_RESAVE}",
            )

    def load_empty_dictionary(self) -> None:
        """Push a dictionary."""
        self.append(_State())

    def load_frame(self) -> None:
        """Skip the length of a frame, which only hints at buffering."""
        self.read(8)


_ALLOWED = (
    *("PROTO", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT"),
    *("BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS", "BINGET", "LONG_BINGET"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "DUP"),
)
_OURS = (
    (pickle.REDUCE, _Machine.load_reduce),
    (pickle.BUILD, _Machine.load_build),
    (pickle.EMPTY_DICT, _Machine.load_empty_dictionary),
    (pickle.FRAME, _Machine.load_frame),
)
# They take a byte of the pickle and a hundred of memory.
_MAKING = ("MARK", "EMPTY_LIST", "EMPTY_DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE")


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return an instruction that may be carried out only so many times."""

    def load_counted(machine: _Machine) -> None:
        machine.num_left -= 1
        if machine.num_left < 0:
            raise ValueError("too many objects for its length")
        load(machine)

    return load_counted


def _dispatch() -> dict[int, Callable[[pickle.Unpickler], None]]:
    codes = [getattr(pickle, name)[0] for name in _ALLOWED]
    found: dict[int, Any] = {code: pickle._Unpickler.dispatch[code] for code in codes}
    found |= {code[0]: function for code, function in _OURS}
    making = [getattr(pickle, name)[0] for name in _MAKING]
    return found | {code: _counted(found[code]) for code in making}


_Machine.dispatch = _dispatch()


def load_description(content: bytes) -> Any:
    """Return what a pickle describes: containers, numbers, texts and `StoredTensor`.

    Raises `SourceError` if it does anything else, or is damaged.
    """
    try:
        return _Machine(content).load()
    except SourceError:
        raise
    except KeyError as error:
        code = error.args[0]
        what = f"an instruction of pickle ({code:#04x})" if isinstance(code, int) else "a name"
        raise SourceError(
            f"has {what} that no state dict has", remedy=f"save tensors alone: {_RESAVE}"
        ) from None
    # Whatever the stack lacks or holds: it is damaged, or made to be odd.
    except Exception as error:
        raise SourceError(
            f"has a description that cannot be read ({one_line(error)})", remedy="fetch it again"
        ) from None


def _state(value: Any) -> Mapping[Any, Any]:
    """Return the state dict in what a file holds: itself, or under one of the usual names."""
    for _ in range(_MOST_DEPTH):
        if not isinstance(value, dict):
            break
        if any(isinstance(each, StoredTensor) for each in value.values()):
            return value
        inner = [value[key] for key in STATE_DICT_KEYS if isinstance(value.get(key), dict)]
        if len(inner) != 1:
            break
        value = inner[0]
    found = f", under {', '.join(map(shown, list(value)[:3]))}" if isinstance(value, dict) else ""
    raise SourceError(
        f"holds no state dict of tensors{found}",
        remedy=f"save the model's state dict alone: {_RESAVE}",
    )


def _named_tensors(state: Mapping[Any, Any]) -> Iterator[tuple[str, StoredTensor]]:
    for name, value in state.items():
        if not isinstance(name, str):
            raise SourceError(
                f"names a tensor {shown(name)}, which is no text", remedy="save it with other names"
            )
        if isinstance(value, StoredTensor):
            yield name, value
        elif value is not None and not name.endswith("_extra_state"):
            raise SourceError(
                f"holds {shown(name)}, which is no tensor",
                remedy=f"save the model's state dict alone: {_RESAVE}",
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _checked(tensor: StoredTensor) -> StoredTensor:
    """Return a tensor whose numbers are numbers. Raises `SourceError`."""
    _, _, offset, shape, strides = tensor
    are_counts = (
        _is_count(offset)
        and isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= _MOST_DIMENSIONS
        and all(map(_is_count, (*shape, *strides)))
    )
    if not are_counts:
        raise SourceError(
            f"describes a tensor of shape {shown(shape)} and strides {shown(strides)} from "
            f"{shown(offset)}, which cannot be",
            remedy="fetch it again",
        )
    return tensor


def check_within(name: str, tensor: StoredTensor) -> None:
    """Raise `SourceError` if a tensor reaches beyond its storage."""
    storage, dtype, offset, shape, strides = tensor
    width = BY_NAME[dtype].bits // 8
    available = storage.num_elements * (1 if storage.dtype is None else width)
    is_empty = 0 in shape
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if not is_empty and (offset + last + 1) * width > available:
        raise SourceError(
            f"{shown(name)} {list(shape)} reaches beyond its storage of {available} bytes",
            remedy="fetch it again",
        )
    if math.prod(shape) * width >= 2**62:
        raise SourceError(f"{shown(name)} {list(shape)} is too large", remedy="fetch it again")
