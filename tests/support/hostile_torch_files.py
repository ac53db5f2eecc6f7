"""Files of torch.save that a stranger might have made; each is refused in one clear line."""

import io
import os
import pickle
import struct
import zipfile

from tests.support.hostile_inputs import Case, a_folder


def _zip(content: bytes, storages=(("0", bytes(16)),), *, root="archive", **options) -> bytes:
    """Return an archive with this pickle and these storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", options.get("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr(f"{root}/data.pkl", content)
        archive.writestr(f"{root}/byteorder", options.get("byteorder", "little"))
        for key, data in storages:
            archive.writestr(f"{root}/data/{key}", data)
        for name in options.get("others", ()):
            archive.writestr(f"{root}/{name}", b"x")
    return buffer.getvalue()


def _value(each) -> bytes:
    """Return the instructions that push a value."""
    return pickle.dumps(each, 2)[2:-1]


def _tensor(
    *,
    key="0",
    count=4,
    offset=0,
    shape=(2, 2),
    strides=(2, 1),
    storage=b"ctorch\nFloatStorage\n",
) -> bytes:
    """Return the instructions that push a tensor, described so."""
    pid = b"(" + _value("storage") + storage + _value(key) + _value("cpu") + _value(count) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + pid
        + _value(offset)
        + _value(shape)
        + _value(strides)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def _described(**description) -> bytes:
    """Return the pickle of a state dict with one tensor."""
    return _state(_value("w") + _tensor(**description))


def _state(pairs: bytes) -> bytes:
    """Return the pickle of a dictionary of names and values."""
    return b"\x80\x02}(" + pairs + b"u."


class _Runs:
    def __reduce__(self):
        return os.system, ("touch /tmp/shardmix-was-here",)


def _cut(content: bytes, by: int) -> bytes:
    return content[:-by]


def _patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


_GOOD = _zip(_described())
_CENTRAL = b"PK\x01\x02"

FILES: tuple[tuple[str, bytes, str], ...] = (
    ("runs a program", _zip(pickle.dumps(_Runs(), 2)), "might run code"),
    ("runs a program in a value", _zip(pickle.dumps({"w": _Runs()}, 2)), "might run code"),
    ("names eval", _zip(b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR."), "might run code"),
    ("names getattr", _zip(b"\x80\x02cbuiltins\ngetattr\n."), "might run code"),
    ("names torch.load", _zip(b"\x80\x02ctorch\nload\n."), "might run code"),
    ("a number is called", _zip(b"\x80\x02K\x01)R."), "calls 1"),
    ("a dtype is called", _zip(b"\x80\x02ctorch\nfloat32\n)R."), "calls"),
    ("a whole model", _zip(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81."), "might run code"),
    ("an extension", _zip(b"\x80\x02\x82\x01."), "an instruction of pickle"),
    ("an instance", _zip(b"\x80\x02(ios\nsystem\n."), "an instruction of pickle"),
    ("a new object", _zip(b"\x80\x02ctorch\nSize\n)\x81."), "an instruction of pickle"),
    (
        "text without a bound",
        _zip(b"\x80\x02L" + b"9" * 5000 + b"L\n."),
        "an instruction of pickle",
    ),
    ("a large memo", _zip(b"\x80\x02}r\xff\xff\xff\xff."), "holds no state dict"),
    ("a long text, promised", _zip(b"\x80\x02X\xff\xff\xff\x7fabc"), "cannot be read"),
    ("a very long text, promised", _zip(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc"), "cannot be"),
    ("bytes, promised", _zip(b"\x80\x05\x96" + b"\xff" * 7 + b"\x7fabc"), "an instruction"),
    ("deep tuples", _zip(b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s."), "as a key"),
    ("deep lists", _zip(b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."), "no state dict"),
    ("an empty stack", _zip(b"\x80\x02."), "cannot be read"),
    ("nothing", _zip(b""), "cannot be read"),
    ("noise", _zip(bytes(range(128, 256)) * 4), "has"),
    ("a list", _zip(b"\x80\x02]" + _tensor() + b"a."), "holds no state dict"),
    (
        "no tensors",
        _zip(pickle.dumps({"epoch": 1}, 2)),
        "holds no state dict of tensors, under 'epoch'",
    ),
    (
        "a number among tensors",
        _zip(_state(_value("w") + _tensor() + _value("n") + _value(3))),
        "'n', which is no tensor",
    ),
    ("a number as a name", _zip(_state(_value(1) + _tensor())), "which is no text"),
    ("beyond the storage", _zip(_described(shape=(2, 3))), "reaches beyond its storage"),
    ("far beyond", _zip(_described(shape=(1, 1), offset=2**60)), "reaches beyond its storage"),
    ("strides beyond", _zip(_described(strides=(2**40, 1))), "reaches beyond its storage"),
    ("a negative offset", _zip(_described(offset=-1)), "which cannot be"),
    ("a negative stride", _zip(_described(strides=(2, -1))), "which cannot be"),
    ("strides of another shape", _zip(_described(strides=(1,))), "which cannot be"),
    ("a shape of texts", _zip(_described(shape=("2", 2))), "which cannot be"),
    ("a huge shape", _zip(_described(shape=(2**40, 2**40), strides=(0, 0))), "is too large"),
    ("a storage not there", _zip(_described(key="7")), "lacks the storage '7'"),
    ("a storage elsewhere", _zip(_described(key="../data.pkl")), "lacks the storage"),
    ("a short storage", _zip(_described(), [("0", bytes(15))]), "has 15 bytes of storage"),
    ("a quantised storage", _zip(_described(storage=b"ctorch\nQInt8Storage\n")), "might run code"),
    ("a storage of no type", _zip(_described(storage=b"K\x01")), "which is no storage"),
    ("a storage of -1", _zip(_described(count=-1)), "-1 elements"),
    ("compressed", _zip(_described(), compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    ("big-endian", _zip(_described(), byteorder="big"), "big-endian"),
    ("TorchScript", _zip(_described(), others=["constants.pkl"]), "TorchScript"),
    ("another archive", _zip(_described(), root="a/b/c"), "not an archive of torch.save"),
    ("cut short", _cut(_GOOD, 30), "damaged archive"),
    ("cut in half", _cut(_GOOD, len(_GOOD) // 2), "damaged archive"),
    ("a lost directory", _patched(_GOOD, _CENTRAL, b"PK\x01\x03"), "damaged archive"),
    ("before 1.6", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02.", "before version 1.6"),
    ("a plain pickle", pickle.dumps({"w": 1}), "is a pickle, which may run code"),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("a space", b" ", "does not begin as one"),
    ("a directory of 4 GiB", _GOOD[:-10] + struct.pack("<II", 2**32 - 2, 0) + bytes(2), "damaged"),
)


CASES = tuple(
    Case(
        f"torch file: {name}",
        a_folder({"model.safetensors": "", "pytorch_model.bin": content}),
        said,
    )
    for name, content, said in FILES
)
