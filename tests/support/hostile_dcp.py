"""Distributed checkpoints that a stranger might have made; each is refused in one clear line.

Made without torch, whose memory is not theirs: instructions of pickle are put together by hand.
"""

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.hostile_inputs import Build, Case, Words, a_folder, a_model, merge
from tests.support.hostile_torch_files import a_tensor, archive, moved_directory

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_FILE = "__0_0.distcp"


def _value(each: object) -> bytes:
    """Return the instructions that push a plain value."""
    content = pickle.dumps(each, 4)
    start = 11 if content[2:3] == b"\x95" else 2
    return content[start:-1]


def _named(module: str, name: str) -> bytes:
    return _value(module) + _value(name) + b"\x93"


def _mapping(pairs: Mapping[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs.items()) + b"u"


def _list(items: Sequence[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _tuple(items: Sequence[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return _named(module, name) + _tuple(arguments) + b"R"


def _object(name: str, module: str = _METADATA, **state: bytes) -> bytes:
    pairs = {_value(key): value for key, value in state.items()}
    return _named(module, name) + b")\x81" + _mapping(pairs) + b"b"


def _size(numbers: object) -> bytes:
    return _call("torch", "Size", _value(numbers))


def _chunk(offsets: object = (0, 0), sizes: object = (2, 2)) -> bytes:
    return _object("ChunkStorageMetadata", offsets=_size(offsets), sizes=_size(sizes))


def _tensor(
    *chunks: bytes, size: object = (2, 2), dtype: bytes = _named("torch", "float32")
) -> bytes:
    made = _named(_METADATA, "TensorProperties") + b")\x81"
    properties = made + _tuple([dtype, b"N", b"\x89", b"N", b"\x89"]) + b"b"
    chunks = chunks or (_chunk(),)
    return _object(
        "TensorStorageMetadata", properties=properties, size=_size(size), chunks=_list(chunks)
    )


def _index(name: object = "model.w", offset: object = (0, 0), index: object = 0) -> bytes:
    return _object("MetadataIndex", fqn=_value(name), index=_value(index), offset=_size(offset))


_RECORD = archive(b"\x80\x02" + a_tensor() + b".")


def _info(
    path: object = _FILE, offset: object = 0, length: object = len(_RECORD), **more: bytes
) -> bytes:
    state = {"relative_path": _value(path), "offset": _value(offset), "length": _value(length)}
    return _object("_StorageInfo", _FILESYSTEM, **state, **more)


def _described(
    tensors: Mapping[str, bytes] | None = None,
    records: Mapping[bytes, bytes] | None = None,
    paths: Mapping[str, object] | None = None,
) -> bytes:
    """Return a `.metadata` file; as it should be, but for what is given."""
    tensors = {"model.w": _tensor()} if tensors is None else tensors
    records = {_index(): _info()} if records is None else records
    paths = {key: tuple(key.split(".", 1)) for key in tensors} if paths is None else paths
    content = _object(
        "Metadata",
        state_dict_metadata=_mapping({_value(key): each for key, each in tensors.items()}),
        planner_data=_mapping({_value(key): _value(path) for key, path in paths.items()}),
        storage_data=_mapping(records),
    )
    return b"\x80\x04" + content + b"."


def _checkpoint(description: bytes, record: bytes = _RECORD) -> Build:
    return a_folder({"model.safetensors": "", ".metadata": description, _FILE: record})


def _spoilt(change: "object", **files: bytes) -> Build:
    """Build a checkpoint that is as it should be, then let a function of its folder spoil it."""

    def build(folder: Path) -> Words:
        bad = folder / "bad"
        a_model(bad, {"model.safetensors": "", ".metadata": _described(), _FILE: _RECORD})
        change(bad)  # type: ignore[operator]
        return merge(folder)

    return build


def _link_out(bad: Path) -> None:
    (bad.parent / "secret").write_bytes(_RECORD)
    (bad / _FILE).unlink()
    (bad / _FILE).symlink_to("../secret")


def _link_description_out(bad: Path) -> None:
    (bad.parent / "secret").write_bytes(_described())
    (bad / ".metadata").unlink()
    (bad / ".metadata").symlink_to("../secret")


def _pipe(bad: Path) -> None:
    (bad / _FILE).unlink()
    os.mkfifo(bad / _FILE)


def _pipe_description(bad: Path) -> None:
    (bad / ".metadata").unlink()
    os.mkfifo(bad / ".metadata")


def _vast_description(bad: Path) -> None:
    os.truncate(bad / ".metadata", 1 << 33)


def _tensors(**tensors: bytes) -> bytes:
    return _described(tensors)


def _one(tensor: bytes) -> bytes:
    """Return the description of one tensor."""
    return _described({"model.w": tensor})


def _stored(info: bytes, index: bytes | None = None) -> bytes:
    """Return the description of a tensor that is stored there."""
    return _described(records={index or _index(): info})


_HALVES = (_chunk((0, 0), (1, 2)), _chunk((1, 0), (1, 2)))
_ROWS = [_chunk((0, column), (1, 1)) for column in range(4_100)]
_RUNS = "might run code"
_LARGE = 1_500_000

DESCRIPTIONS: tuple[tuple[str, bytes, str], ...] = (
    ("runs a program", _one(_call("posix", "system", _value("touch /tmp/was-here"))), _RUNS),
    ("runs a program as a whole", b"\x80\x04" + _call("os", "system", _value("x")) + b".", _RUNS),
    ("names eval", b"\x80\x04" + _call("builtins", "eval", _value("1")) + b".", _RUNS),
    ("names getattr", _one(_named("builtins", "getattr")), _RUNS),
    ("calls torch.load", _one(_call("torch", "load", _value("x"))), "calls 'torch.load'"),
    ("makes a torch.load", _one(_named("torch", "load") + b")\x81"), "makes 'torch.load'"),
    ("a dotted name", _one(_named("torch", "serialization.load")), _RUNS),
    ("another class of its module", _one(_object("TensorShard")), _RUNS),
    ("a class, called", _one(_call(_METADATA, "Metadata")), "calls"),
    ("arguments to a class", _one(_named(_METADATA, "Metadata") + b"K\x01\x85\x81"), "makes"),
    ("a number, called", _one(b"K\x01)R"), "calls a int"),
    ("a checkpoint of Megatron", _one(_object("X", "megatron.core.strategies")), "Megatron-Core"),
    ("protocol 2", pickle.dumps({"a": 1}, 2), "is no pickle of protocol 4 or 5"),
    ("nothing", b" ", "is no pickle"),
    ("no value", b"\x80\x04.", "cannot be read"),
    ("noise", b"\x80\x04" + bytes(range(128, 256)), "an instruction of pickle"),
    ("a name in one instruction", b"\x80\x04cos\nsystem\n.", "an instruction of pickle (0x63)"),
    ("an extension", b"\x80\x04\x82\x01.", "an instruction of pickle (0x82)"),
    ("a persistent id", b"\x80\x04K\x01Q.", "an instruction of pickle (0x51)"),
    ("a memo's number set", b"\x80\x04}r\xff\xff\xff\xff.", "an instruction of pickle (0x72)"),
    ("a memo's entry not there", b"\x80\x04}j\xff\xff\xff\xff.", "entry 4294967295"),
    ("a long text, promised", b"\x80\x04X\xff\xff\xff\x7fabc", "beyond the end"),
    ("a frame of any length", b"\x80\x04\x95" + b"\xff" * 8 + b".", "cannot be read"),
    ("dicts without number", b"\x80\x04" + b"}" * _LARGE + b".", "too many objects"),
    ("lists without number", b"\x80\x04](" + b"]" * _LARGE + b"e.", "too many objects"),
    ("dicts in one list", b"\x80\x04]" + b"}a" * _LARGE + b".", "too many objects"),
    ("tuples in tuples", b"\x80\x04)" + b"\x85" * _LARGE + b".", "too many objects"),
    ("marks without number", b"\x80\x04" + b"(" * _LARGE + b".", "cannot be read"),
    ("a stack without end", b"\x80\x04" + b")" * _LARGE + b".", "describes no checkpoint"),
    (
        "sizes of one text",
        b"\x80\x04" + _value("x" * 1_000_000) + b"0" + b"](" + _named("torch", "Size") * 9 + b"e.",
        "an instruction of pickle (0x30)",
    ),
    ("a size of a text", _one(_tensor(size="22")), "no tuple of whole numbers"),
    ("a size of floats", _one(_tensor(size=(2.0, 2))), "an instruction of pickle (0x47)"),
    ("a size of truths", _one(_tensor(size=(True, 4))), "no tuple of whole numbers"),
    ("a negative size", _one(_tensor(size=(-2, -2))), "no tuple of whole numbers"),
    ("a size of 1,000 bits", _one(_tensor(size=(2**1000, 0))), "no tuple of whole numbers"),
    ("a hundred dimensions", _one(_tensor(size=(1,) * 100)), "of 100 dimensions"),
    (
        "lists that double",
        b"\x80\x04"
        + b"]\x94"
        + b"".join(b"](h%ch%ce\x94" % (n, n) for n in range(60))
        + b"K\x01R.",
        "calls a list",
    ),
    ("a list in itself", b"\x80\x04]\x94h\x00ah\x00ah\x00.", "describes no checkpoint"),
    ("a tuple as a key", b"\x80\x04}(" + b")\x85" * 1_000 + b"K\x01u.", "cannot be read"),
    ("a state set twice", _one(_tensor() + b"}b"), "set twice"),
    (
        "a state of a list",
        _one(_named(_METADATA, "ChunkStorageMetadata") + b")\x81]b"),
        "a list as",
    ),
    ("a state without an object", b"\x80\x04}}b.", "a _Dict that is set"),
    ("a tensor of nothing", _one(b"N"), "is no tensor and no bytes"),
    ("a tensor of a chunk", _one(_chunk()), "is no tensor and no bytes"),
    ("chunks of a chunk", _one(_tensor(b"K\x01")), "something else than chunks"),
    ("an empty checkpoint", _described({}, {}), "holds no state dict of tensors"),
    ("only the optimizer", _described({"optim.w": _tensor()}), "under 'optim'"),
    ("two models", _described({"model.w": _tensor(), "module.w": _tensor()}), "'model', 'module'"),
    (
        "tensors elsewhere as well",
        _described({"w": _tensor(), "ema.w": _tensor()}),
        "holds tensors under 'ema' beside others",
    ),
    (
        "bytes among tensors",
        _described({"model.w": _tensor(), "model.x": _object("BytesStorageMetadata")}),
        "holds 'x' among the model's tensors",
    ),
    ("a path of another name", _described(paths={"model.w": ("model", "v")}), "was saved at"),
    ("a path of numbers in lists", _described(paths={"model.w": [1]}), "has no path"),
    ("a chunk beyond", _one(_tensor(_chunk((0, 1)))), "reaches beyond it"),
    ("a chunk far beyond", _one(_tensor(_chunk((2**61, 0)))), "reaches beyond it"),
    ("a chunk before", _one(_tensor(_chunk((-1, 0)))), "no tuple of whole numbers"),
    ("a chunk of one dimension", _one(_tensor(_chunk((0,), (4,)))), "a chunk of 1 dimensions"),
    ("a gap", _one(_tensor(_HALVES[1])), "has 4 elements, but 2 in its 1 chunks"),
    ("a chunk twice", _one(_tensor(*_HALVES, _HALVES[0])), "but 6 in its 3 chunks"),
    ("an overlap for a gap", _one(_tensor(_HALVES[0], _HALVES[0])), "chunks that overlap"),
    (
        "an overlap of columns",
        _one(_tensor(_chunk((0, 0), (2, 3)), _chunk((0, 2), (2, 1)), size=(2, 4))),
        "chunks that overlap",
    ),
    (
        "four thousand chunks in no grid",
        _one(_tensor(*_ROWS, _chunk((1, 0), (1, 4_100)), size=(2, 4_100))),
        "chunks that form no grid",
    ),
    (
        "a huge shape",
        _one(_tensor(_chunk((0, 0), (2**40, 2**40)), size=(2**40, 2**40))),
        "is too large",
    ),
    ("another shape than stored", _one(_tensor(_chunk((0, 0), (4, 1)), size=(4, 1))), "[4, 1]"),
    (
        "another dtype than stored",
        _one(_tensor(dtype=_named("torch", "int32"))),
        "is of F32 [2, 2], and should be of I32 [2, 2]",
    ),
    ("a quantised dtype", _one(_tensor(dtype=_named("torch", "qint8"))), "which safetensors lacks"),
    ("a dtype of text", _one(_tensor(dtype=_value("torch.float32"))), "without a dtype"),
    ("no record", _described(records={}), "has no record of its chunk"),
    ("a record elsewhere", _stored(_info(), _index(offset=(1, 0))), "has no record of its chunk"),
    ("a record of another name", _stored(_info(), _index("model.v")), "has no record"),
    (
        "a record twice",
        _described(records={_index(): _info(), _index(index=1): _info(offset=1)}),
        "at [0, 0] twice",
    ),
    ("a record that is a chunk", _stored(_chunk()), "an index without a record"),
    ("a record before the file", _stored(_info(offset=-1)), "at -1, which cannot be"),
    ("a record of -1 bytes", _stored(_info(length=-1)), "has a record of -1 bytes"),
    ("a record of no bytes", _stored(_info(length=0)), "does not begin as one"),
    ("a record beyond the file", _stored(_info(length=10**6)), "the file ends before"),
    ("a record far beyond", _stored(_info(offset=2**61)), "the file ends before"),
    ("a record within a record", _stored(_info(offset=4, length=90)), "does not begin as one"),
    ("a record cut short", _stored(_info(length=len(_RECORD) - 30)), "damaged archive"),
    ("a text as an offset", _stored(_info(offset="0")), "at '0', which cannot be"),
    (
        "compressed by an extension",
        _stored(_info(transform_descriptors=_list([_value("stream.zstd")]))),
        "by an extension ('stream.zstd')",
    ),
    ("a file above", _stored(_info("../secret")), "lies outside the model's folder"),
    ("a file anywhere", _stored(_info("/etc/passwd")), "lies outside the model's folder"),
    ("a file that clears the screen", _stored(_info("\x1b[2J")), "control characters"),
    ("a file without a name", _stored(_info("")), "is no file name"),
    ("a file not there", _stored(_info("__7_0.distcp")), "which is not in the folder"),
    ("the folder itself", _stored(_info(".")), "is no file name"),
    ("a path of a number", _stored(_info(7)), "a int as a path"),
)
_TENSORS = archive(b"\x80\x02}(" + _value("w") + a_tensor() + b"u.")
RECORDS: tuple[tuple[str, bytes, str], ...] = (
    ("no archive", bytes(len(_RECORD)), "does not begin as one"),
    (
        "compressed",
        archive(b"\x80\x02" + a_tensor() + b".", compression=zipfile.ZIP_DEFLATED),
        "comp",
    ),
    ("entries before the record", moved_directory(_RECORD), "where its directory says"),
    ("a state dict", _TENSORS, "that is not of one tensor"),
    ("runs a program", archive(b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R."), _RUNS),
    ("beyond its storage", archive(b"\x80\x02" + a_tensor(offset=1) + b"."), "reaches beyond"),
    ("a short storage", archive(b"\x80\x02" + a_tensor() + b".", [("0", b"abc")]), "has 3 bytes"),
    ("no storage", archive(b"\x80\x02" + a_tensor(key="7") + b"."), "lacks the storage '7'"),
    ("a description at length", archive(b"\x80\x02" + b"N0" * 90_000 + b"."), "no model has such"),
)

CASES = (
    *(
        Case(f"distributed: {name}", _checkpoint(content), said)
        for name, content, said in DESCRIPTIONS
    ),
    *(
        Case(f"record: {name}", _checkpoint(_stored(_info(length=len(content))), content), said)
        for name, content, said in RECORDS
    ),
    Case("distributed: a link out", _spoilt(_link_out), "outside the model's folder"),
    Case("distributed: a description elsewhere", _spoilt(_link_description_out), "outside the mod"),
    Case("distributed: a pipe", _spoilt(_pipe), "is not a regular file"),
    Case("distributed: a pipe as description", _spoilt(_pipe_description), "is not a regular file"),
    Case("distributed: 8 GiB of description", _spoilt(_vast_description), "more than the"),
)
