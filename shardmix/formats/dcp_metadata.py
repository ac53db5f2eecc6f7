"""The `.metadata` file of torch's distributed checkpoints (DCP), read without running anything.

It is a pickle of a few dataclasses: the chunks of each tensor, the record that stores each chunk,
and the place of each tensor in the state dict that was saved. A machine of its own knows the
opcodes that such a pickle has, and the names of these classes; all that it makes are tuples,
numbers and texts. It is as large as there are chunks (150 bytes each), so the two forms in which
pickle writes chunks and records are read by patterns, without what they would leave in the memo.
Format: https://github.com/pytorch/pytorch/blob/main/torch/distributed/checkpoint/metadata.py
"""

import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardmix.errors import ShardmixError, SourceError, one_line, shown

MOST_METADATA_NBYTES = 1 << 30
"""A larger one is refused unread: it would be of seven million chunks."""
USUAL_MEMORY = 8
"""Bytes of memory for each of the file's: 3 measured, of 720,000 chunks."""
_MOST_MEMORY = 20  # if nothing comes in the usual forms; 11 measured
# The fewest bytes for each object that the pickle makes, of at most 100 bytes of memory.
_USUAL_OBJECT_NBYTES, _LEAST_OBJECT_NBYTES = 16, 6
_FREE_OBJECTS = 10_000
_MOST_STACKED = 10_000
_MOST_DIMENSIONS = 64
_MOST_ARGUMENTS = 64
_REFETCH = "fetch it again"

Position = tuple[int, ...]
"""Indexes of an element, or sizes, by dimension."""


class Chunk(NamedTuple):
    """A box of a tensor's elements."""

    offsets: Position
    sizes: Position


class ChunkedTensor(NamedTuple):
    """A tensor of a checkpoint, and the boxes that it is saved in."""

    dtype: str
    """Name in torch, such as `torch.float32`."""
    shape: Position
    chunks: Sequence[Chunk]


class _Index(NamedTuple):
    """The key of a record: a tensor, and the first element of one of its chunks."""

    name: str
    offsets: Position | None


class _Info(NamedTuple):
    """The place of a record."""

    path: str
    offset: int
    length: int
    transforms: str


class Records:
    """The records of chunks: file, offset and length of each. In columns."""

    def __init__(self) -> None:
        self.files: list[str] = []
        """Paths of files within the checkpoint's folder."""
        self.transformed: dict[int, str] = {}
        """Row of a record that is not stored as it is → the names of its transforms."""
        self.file_numbers = array("i")
        self.offsets = array("q")
        self.lengths = array("q")
        self._numbers: dict[str, int] = {}
        self._rows: dict[str, dict[Position, int]] = {}

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.offsets)

    def row(self, name: str, offsets: Position) -> int | None:
        """Return the row of the record of a chunk, or None."""
        return self._rows.get(name, {}).get(offsets)

    def add(self, name: str, at: Position | None, info: "_Info") -> None:
        """Add a record; `at` is None for one that holds no tensor, which is left out."""
        if at is None:
            return
        path, offset, length, transforms = info
        rows = self._rows.setdefault(name, {})
        if at in rows:
            raise _odd(f"stores the chunk of {shown(name)} at {list(at)} twice")
        if transforms:
            self.transformed[len(self.offsets)] = transforms
        rows[at] = len(self.offsets)
        number = self._numbers.get(path)
        if number is None:
            number = self._numbers[path] = len(self.files)
            self.files.append(path)
        self.file_numbers.append(number)
        self.offsets.append(offset)
        self.lengths.append(length)


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """The content of a `.metadata` file. Nothing of it is compared with one another yet."""

    tensors: Mapping[str, ChunkedTensor]
    """Key → tensor."""
    others: Sequence[str]
    """Keys of values that are no tensors."""
    paths: Mapping[str, tuple[str | int, ...]]
    """Key → its path in nested dictionaries and lists, of those for which that is known."""
    records: Records
    """The record of each chunk."""


def read_metadata(
    content: bytes, *, check_room: Callable[[int], None] = lambda nbytes: None
) -> DcpMetadata:
    """Return the content of a `.metadata` file.

    `check_room` is called with the bytes of memory that this may take. Raises `SourceError` if it
    is anything else, or damaged; the caller adds the file.
    """
    check_room(USUAL_MEMORY * len(content))
    try:
        try:
            value = _Machine(content, uses_patterns=True).run()
        except _Unusual:
            check_room(_MOST_MEMORY * len(content))
            value = _Machine(content, uses_patterns=False).run()
    except ShardmixError:
        raise
    # Whatever the stack lacks or holds: it is damaged, or made to be odd.
    except Exception as error:
        raise SourceError(
            f"has a description that cannot be read ({one_line(error)})", remedy=_REFETCH
        ) from None
    if not isinstance(value, _Object) or not isinstance(value.state, DcpMetadata):
        raise SourceError("describes no checkpoint of torch", remedy=_REFETCH)
    return value.state


class _Unusual(Exception):  # noqa: N818 - no error: the pickle is read in another way
    """A pickle that does not come in the usual forms, or gets what they left out of the memo."""


class _Object:
    """An object of the pickle, and what its state stands for once it is set."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None


class _Dict(dict[Any, Any]):
    """A dictionary of the pickle, or of records if its keys are indexes of chunks."""

    __slots__ = ("records",)

    def __init__(self) -> None:
        super().__init__()
        self.records: Records | None = None

    def put(self, items: Sequence[Any]) -> None:
        """Add keys and values, which alternate."""
        if len(items) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str):
                self[key] = value
            elif isinstance(key, _Index):
                self._put_record(key, value)
            elif isinstance(key, _Object) and isinstance(key.state, _Index):
                self._put_record(key.state, value.state if isinstance(value, _Object) else value)
            else:
                # Python hashes tuples in tuples without a bound.
                raise TypeError(f"a {type(key).__name__} as a key")

    def _put_record(self, index: "_Index", info: Any) -> None:
        if not isinstance(info, _Info):
            raise TypeError("an index without a record")
        if self.records is None:
            self.records = Records()
        self.records.add(index.name, index.offsets, info)


# The classes of such a pickle, each by what becomes of its state.

_METADATA, _TENSOR, _PROPERTIES, _CHUNK, _BYTES, _INDEX, _INFO, _META = (
    *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
    *("BytesStorageMetadata", "MetadataIndex", "_StorageInfo", "StorageMeta"),
)
_MODULE = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    **{
        f"{_MODULE}.{name}": name
        for name in (_METADATA, _TENSOR, _PROPERTIES, _CHUNK, _BYTES, _INDEX, _META)
    },
    f"{_FILESYSTEM}.{_INFO}": _INFO,
}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _odd(finding: str) -> SourceError:
    return SourceError(finding, remedy=_REFETCH)


def _state_dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} as a state")
    return value


def _position(value: Any) -> Position:
    if not isinstance(value, _Size):
        raise TypeError(f"a {type(value).__name__} as a size")
    return value.numbers


def _chunk(state: Any) -> Chunk:
    state = _state_dict(state)
    offsets, sizes = _position(state["offsets"]), _position(state["sizes"])
    return Chunk(offsets, sizes)


def _tensor(state: Any) -> ChunkedTensor:
    state = _state_dict(state)
    properties, chunks = state["properties"], state["chunks"]
    if not (isinstance(properties, _Object) and isinstance(properties.state, str)):
        raise TypeError("a tensor without properties")
    if not isinstance(chunks, list):
        raise TypeError("a tensor without a list of chunks")
    found = [
        chunk.state if isinstance(chunk, _Object) and chunk.kind == _CHUNK else chunk
        for chunk in chunks
    ]
    if not all(isinstance(chunk, Chunk) for chunk in found):
        raise TypeError("a tensor of something else than chunks")
    return ChunkedTensor(properties.state, _position(state["size"]), found)


def _properties(state: Any) -> str:
    if not isinstance(state, tuple) or not state or not isinstance(state[0], _Name):
        raise TypeError("a tensor without a dtype")
    return state[0].text


def _index(state: Any) -> _Index:
    state = _state_dict(state)
    name, at = state["fqn"], state.get("offset")
    if not isinstance(name, str):
        raise TypeError(f"a {type(name).__name__} as a name")
    return _Index(name, None if at is None else _position(at))


def _info(state: Any) -> _Info:
    state = _state_dict(state)
    path, offset, length = state["relative_path"], state["offset"], state["length"]
    transforms = state.get("transform_descriptors") or []
    if not isinstance(path, str):
        raise TypeError(f"a {type(path).__name__} as a path")
    if not isinstance(transforms, list | tuple):
        raise TypeError(f"a {type(transforms).__name__} as transforms")
    return _Info(path, *_extent(offset, length), ", ".join(map(shown, transforms[:3])))


def _metadata(state: Any) -> DcpMetadata:
    state = _state_dict(state)
    described, stored = state["state_dict_metadata"], state.get("storage_data")
    if not isinstance(described, _Dict) or not isinstance(stored, _Dict):
        raise TypeError("no tensors, or no records")
    tensors, others = {}, []
    for key, value in described.items():
        if isinstance(value, _Object) and value.kind == _TENSOR and value.state is not None:
            tensors[key] = value.state
        elif isinstance(value, _Object) and value.kind == _BYTES:
            others.append(key)
        else:
            raise TypeError(f"{shown(key)} is no tensor and no bytes")
    paths = state.get("planner_data")
    found = paths if isinstance(paths, _Dict) else {}
    for key, path in found.items():
        is_path = isinstance(path, tuple) and all(isinstance(part, str | int) for part in path)
        if not is_path or not path:
            raise TypeError(f"{shown(key)} has no path")
    return DcpMetadata(tensors, others, found, stored.records or Records())


_BUILT: dict[str, Callable[[Any], Any]] = {
    _METADATA: _metadata,
    _TENSOR: _tensor,
    _PROPERTIES: _properties,
    _CHUNK: _chunk,
    _BYTES: lambda _: None,
    _INDEX: _index,
    _INFO: _info,
    _META: lambda _: None,
}


@dataclass(frozen=True, slots=True)
class _Name:
    """A name of the pickle: a class, a function of the table below, or a dtype."""

    text: str


@dataclass(frozen=True, slots=True)
class _Size:
    """A torch.Size."""

    numbers: Position


def _size(value: Any = ()) -> _Size:
    if not isinstance(value, tuple) or not all(map(_is_count, value)):
        raise _odd("has a size that is no tuple of whole numbers")
    if len(value) > _MOST_DIMENSIONS:
        raise _odd(f"has a size of {len(value)} dimensions; no tensor has such")
    return _Size(value)


def _nothing(*_: Any) -> None:
    """Stand for a value that says nothing of weights: a layout, a memory format, a path."""


_CALLED: dict[str, Callable[..., Any]] = {
    "torch.Size": _size,
    "torch.serialization._get_layout": _nothing,
    f"{_MODULE}._MEM_FORMAT_ENCODING": _nothing,
    **{
        f"{module}.{name}": _nothing
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}

_SIZE_NAME, _INFO_NAME = _Name("torch.Size"), _Name(f"{_FILESYSTEM}.{_INFO}")
_CHUNK_WORDS = ("offsets", _SIZE_NAME, "sizes", _SIZE_NAME)
_RECORD_WORDS = (
    *("fqn", "index", "offset", _SIZE_NAME, _INFO_NAME),
    *("relative_path", "offset", "length"),
)

# The forms in which pickle writes them. A memo's entry is got by one byte or four; an integer has
# one byte, two, four, or says how many.
_GET = rb"(h[\s\S]|j[\s\S]{4})"
_INT = rb"(?:K[\s\S]|M[\s\S]{2}|J[\s\S]{4}|\x8a\x05[\s\S]{5}|\x8a\x06[\s\S]{6})"
_SIZE = _GET + rb"(" + _INT + rb"{1,3})[\x85-\x87]\x94\x85\x94R\x94"
_BEGUN = rb"\)\x81\x94\}\x94\("
_CHUNK_FORM = re.compile(_BEGUN + _GET + _SIZE + _GET + _SIZE + rb"ub")
# From the memo, or written here and memoized; up to the first end that lets the rest follow.
_TEXT = rb"(h[\s\S]|j[\s\S]{4}|\x8c[\s\S]{2,256}?\x94)"
_RECORD_FORM = re.compile(
    # The index: its name, a number that is only a hint, and the chunk's first element.
    _BEGUN
    + _GET
    + _TEXT
    + _GET
    + rb"(?:"
    + _INT
    + rb"|N)"
    + _GET
    + _SIZE
    + rb"ub"
    # The place: path, offset and length.
    + _GET
    + _BEGUN
    + _GET
    + _TEXT
    + _GET
    + rb"("
    + _INT
    + rb")"
    + _GET
    + rb"("
    + _INT
    + rb")ub"
)
_MOST_KNOWN = 100_000
_INT_NBYTES = {0x4B: 2, 0x4D: 3, 0x4A: 5}  # BININT1, BININT2, BININT
# REDUCE, NEWOBJ, TUPLE1, TUPLE2, TUPLE3, TUPLE, EMPTY_DICT and EMPTY_LIST.
_MAKING = frozenset((0x52, 0x81, 0x85, 0x86, 0x87, 0x74, 0x7D, 0x5D))


class _Machine:
    """Carries out a pickle of protocol 4 or 5, of known opcodes and names."""

    def __init__(self, content: bytes, *, uses_patterns: bool) -> None:
        self._content = content
        self._uses_patterns = uses_patterns
        self._memo: dict[int, Any] = {}
        self._num_memoized = 0
        self._chunk_name: _Name | None = None
        self._known_gets: set[tuple[bytes, ...]] = set()
        self._texts: dict[bytes, str] = {}
        self._sizes: dict[bytes, Position] = {}
        self._chunks: dict[tuple[bytes, bytes], Chunk] = {}

    def run(self) -> Any:
        """Return the value that the pickle stands for."""
        content, memo = self._content, self._memo
        if content[:1] != b"\x80" or content[1:2] not in (b"\x04", b"\x05"):
            raise SourceError(
                "is no pickle of protocol 4 or 5, as torch writes it", remedy=_REFETCH
            )
        stack: list[Any] = []
        marks: list[int] = []
        num_made = 0
        per_object = _USUAL_OBJECT_NBYTES if self._uses_patterns else _LEAST_OBJECT_NBYTES
        most_made = _FREE_OBJECTS + len(content) // per_object
        at, end = 2, len(content)
        from_bytes = int.from_bytes
        while True:
            code = content[at]
            at += 1
            if code == 0x94:  # MEMOIZE
                memo[self._num_memoized] = stack[-1]
                self._num_memoized += 1
            elif code in (0x68, 0x6A):  # BINGET, LONG_BINGET
                width = 1 if code == 0x68 else 4
                number = from_bytes(content[at : at + width], "little")
                at += width
                value = memo.get(number, _Unusual)
                if value is _Unusual:
                    if self._uses_patterns and number < self._num_memoized:
                        raise _Unusual
                    raise KeyError(f"entry {number}")
                stack.append(value)
                if type(value) is _Name and self._uses_patterns:
                    at = self._by_pattern(value, at, stack)
            elif code == 0x4B:  # BININT1
                stack.append(content[at])
                at += 1
            elif code == 0x4D:  # BININT2
                stack.append(from_bytes(content[at : at + 2], "little"))
                at += 2
            elif code == 0x4A:  # BININT
                stack.append(from_bytes(content[at : at + 4], "little", signed=True))
                at += 4
            elif code == 0x8A:  # LONG1
                stop = at + 1 + content[at]
                stack.append(from_bytes(content[at + 1 : stop], "little", signed=True))
                at = stop
            elif code in _MAKING:
                num_made += 1
                if num_made > most_made or len(stack) > _MOST_STACKED:
                    if self._uses_patterns:
                        raise _Unusual
                    raise ValueError("too many objects")
                _make(code, stack, marks)
            elif code == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif code == 0x28:  # MARK
                marks.append(len(stack))
            elif code == 0x75:  # SETITEMS
                first = marks.pop()
                items = stack[first:]
                del stack[first:]
                _of(stack[-1], _Dict).put(items)
            elif code == 0x73:  # SETITEM
                item = stack[-2:]
                del stack[-2:]
                _of(stack[-1], _Dict).put(item)
            elif code == 0x62:  # BUILD
                state, target = stack.pop(), _of(stack[-1], _Object)
                if target.state is not None:
                    raise ValueError("an object whose state is set twice")
                target.state = _BUILT[target.kind](state)
                if target.kind != _METADATA and isinstance(state, _Dict):
                    state.clear()  # the memo still holds it
            elif code == 0x65:  # APPENDS
                first = marks.pop()
                items = stack[first:]
                del stack[first:]
                _of(stack[-1], list).extend(items)
            elif code == 0x61:  # APPEND
                item = stack.pop()
                _of(stack[-1], list).append(item)
            elif code in (0x8C, 0x58):  # SHORT_BINUNICODE, BINUNICODE
                width = 1 if code == 0x8C else 4
                stop = at + width + from_bytes(content[at : at + width], "little")
                if stop > end:
                    raise EOFError("a text beyond the end")
                stack.append(content[at + width : stop].decode())
                at = stop
            elif code == 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                stack.append(_named(module, name))
            elif code in (0x88, 0x89):  # NEWTRUE, NEWFALSE
                stack.append(code == 0x88)
            elif code == 0x4E:  # NONE
                stack.append(None)
            elif code == 0x95:  # FRAME
                at += 8
            elif code == 0x2E:  # STOP
                return stack.pop()
            else:
                raise SourceError(
                    f"has an instruction of pickle ({code:#04x}) that no checkpoint has",
                    remedy=_REFETCH,
                )

    def _by_pattern(self, named: _Name, at: int, stack: list[Any]) -> int:
        """Read a chunk, or an index and its record, if they come in their usual form.

        Pushes them in place of their class, and returns where the pickle goes on.
        """
        if named is self._chunk_name or named.text == f"{_MODULE}.{_CHUNK}":
            self._chunk_name = named
            found = _CHUNK_FORM.match(self._content, at)
            if found is None:
                return at
            offsets, sizes = found.group(3, 6)
            if not self._stand_for(found.group(1, 2, 4, 5), _CHUNK_WORDS):
                return at
            chunk = self._chunks.get((offsets, sizes))
            if chunk is None:
                _forget_many(self._chunks)
                chunk = Chunk(self._numbers(offsets), self._numbers(sizes))
                self._chunks[offsets, sizes] = chunk
            stack[-1] = chunk
            self._num_memoized += 8
            return found.end()
        if named.text == f"{_MODULE}.{_INDEX}":
            return self._record_by_pattern(at, stack)
        return at

    def _record_by_pattern(self, at: int, stack: list[Any]) -> int:
        found = _RECORD_FORM.match(self._content, at)
        if found is None:
            return at
        if not self._stand_for(found.group(1, 3, 4, 5, 7, 8, 10, 12), _RECORD_WORDS):
            return at
        num_before = self._num_memoized
        self._num_memoized += 2
        name = self._text(found.group(2))
        self._num_memoized += 5
        path = self._text(found.group(9))
        if type(name) is not str or type(path) is not str:
            self._num_memoized = num_before
            return at
        offset, length = _integer(found.group(11)), _integer(found.group(13))
        stack[-1] = _Index(name, self._numbers(found.group(6)))
        stack.append(_Info(path, *_extent(offset, length), ""))
        return found.end()

    def _text(self, pushed: bytes) -> Any:
        """Return a text from the memo, or one that is written here; None if its length is wrong."""
        if pushed[0] != 0x8C:
            return self._got(pushed)
        if pushed[1] != len(pushed) - 3:
            return None
        text = self._texts.get(pushed)
        if text is None:
            _forget_many(self._texts)
            text = self._texts[pushed] = pushed[2:-1].decode()
        self._memo[self._num_memoized] = text
        self._num_memoized += 1
        return text

    def _got(self, get: bytes) -> Any:
        """Return what an instruction gets from the memo; None if it is not there."""
        return self._memo.get(int.from_bytes(get[1:], "little"))

    def _stand_for(self, gets: tuple[bytes, ...], words: tuple[Any, ...]) -> bool:
        """Return True if instructions get these words from the memo, whose entries never change."""
        if gets not in self._known_gets:
            if tuple(map(self._got, gets)) != words:
                return False
            self._known_gets.add(gets)
        return True

    def _numbers(self, ints: bytes) -> Position:
        """Return the integers that instructions push, which are counts."""
        known = self._sizes.get(ints)
        if known is None:
            _forget_many(self._sizes)
            known = self._sizes[ints] = _size(_integers(ints)).numbers
        return known


def _make(code: int, stack: list[Any], marks: list[int]) -> None:
    """Carry out an instruction that makes an object."""
    if 0x85 <= code <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
        count = code - 0x84
        if len(stack) < count:
            raise IndexError("an empty stack")
        stack[-count:] = [tuple(stack[-count:])]
    elif code == 0x52:  # REDUCE
        arguments, called = stack.pop(), stack.pop()
        stack.append(_call(called, arguments))
    elif code == 0x81:  # NEWOBJ
        arguments, named = stack.pop(), stack.pop()
        if not isinstance(named, _Name) or named.text not in _CLASSES or arguments != ():
            raise _unknown("makes", named)
        stack.append(_Object(_CLASSES[named.text]))
    elif code == 0x7D:  # EMPTY_DICT
        stack.append(_Dict())
    elif code == 0x5D:  # EMPTY_LIST
        stack.append([])
    else:  # TUPLE
        first = marks.pop()
        stack[first:] = [tuple(stack[first:])]


def _forget_many(known: dict[Any, Any]) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()


def _integers(pushed: bytes) -> tuple[int, ...]:
    found, at = [], 0
    while at < len(pushed):
        code = pushed[at]
        stop = at + (2 + pushed[at + 1] if code == 0x8A else _INT_NBYTES[code])
        found.append(_integer(pushed[at:stop]))
        at = stop
    return tuple(found)


def _integer(pushed: bytes) -> int:
    """Return the integer that an instruction pushes."""
    code = pushed[0]
    if code == 0x8A:  # LONG1
        return int.from_bytes(pushed[2:], "little", signed=True)
    return int.from_bytes(pushed[1:], "little", signed=code == 0x4A)


def _extent(offset: int, length: int) -> tuple[int, int]:
    if not (_is_count(offset) and _is_count(length)):
        raise _odd(f"has a record of {shown(length)} bytes at {shown(offset)}, which cannot be")
    return offset, length


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} that is set")
    return value


def _named(module: Any, name: Any) -> _Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is no text")
    full = f"{module}.{name}"
    if module.startswith("megatron."):
        raise SourceError(
            "is a checkpoint of Megatron-Core, whose tensors have other names and shapes",
            remedy="export it to Hugging Face's format first",
        )
    if (
        full not in _CLASSES
        and full not in _CALLED
        and not (module == "torch" and name.isidentifier())
    ):
        raise _unknown("names", _Name(full))
    return _Name(full)


def _call(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name) or called.text not in _CALLED:
        raise _unknown("calls", called)
    if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
        raise TypeError("odd arguments")
    return _CALLED[called.text](*arguments)


def _unknown(does: str, what: Any) -> SourceError:
    name = shown(what.text) if isinstance(what, _Name) else f"a {type(what).__name__}"
    return SourceError(
        f"{does} {name}, which is no part of a distributed checkpoint and might run code",
        remedy="save it with torch.distributed.checkpoint.save, of tensors in plain dictionaries",
    )
