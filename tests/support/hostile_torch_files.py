"""Files of torch.save that a stranger might have made; each is refused in one clear line."""

import io
import os
import pickle
import struct
import zipfile

from tests.support.hostile_inputs import Case, a_folder


def archive(content: bytes, storages=(("0", bytes(16)),), *, root="archive", **options) -> bytes:
    """Return an archive with this pickle and these storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", options.get("compression", zipfile.ZIP_STORED)) as made:
        made.writestr(f"{root}/data.pkl", content)
        made.writestr(f"{root}/byteorder", options.get("byteorder", "little"))
        for key, data in storages:
            made.writestr(f"{root}/data/{key}", data)
        for name in options.get("others", ()):
            made.writestr(f"{root}/{name}", b"x")
    return buffer.getvalue()


def _value(each) -> bytes:
    """Return the instructions that push a value."""
    return pickle.dumps(each, 2)[2:-1]


def a_tensor(
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
    return _state(_value("w") + a_tensor(**description))


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


_GOOD = archive(_described())
_CENTRAL = b"PK\x01\x02"


def moved_directory(content: bytes) -> bytes:
    """Return an archive whose directory says that it begins 300 bytes later than it does."""
    offset = int.from_bytes(content[-6:-2], "little")
    return content[:-6] + struct.pack("<I", offset + 300) + content[-2:]


FILES: tuple[tuple[str, bytes, str], ...] = (
    ("runs a program", archive(pickle.dumps(_Runs(), 2)), "might run code"),
    ("runs a program in a value", archive(pickle.dumps({"w": _Runs()}, 2)), "might run code"),
    ("names eval", archive(b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR."), "might run code"),
    ("names getattr", archive(b"\x80\x02cbuiltins\ngetattr\n."), "might run code"),
    ("names torch.load", archive(b"\x80\x02ctorch\nload\n."), "might run code"),
    ("a number is called", archive(b"\x80\x02K\x01)R."), "calls 1"),
    ("a dtype is called", archive(b"\x80\x02ctorch\nfloat32\n)R."), "calls"),
    (
        "a whole model",
        archive(b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81."),
        "might run code",
    ),
    ("an extension", archive(b"\x80\x02\x82\x01."), "an instruction of pickle"),
    ("an instance", archive(b"\x80\x02(ios\nsystem\n."), "an instruction of pickle"),
    ("a new object", archive(b"\x80\x02ctorch\nSize\n)\x81."), "an instruction of pickle"),
    (
        "text without a bound",
        archive(b"\x80\x02L" + b"9" * 5000 + b"L\n."),
        "an instruction of pickle",
    ),
    ("a large memo", archive(b"\x80\x02}r\xff\xff\xff\xff."), "holds no state dict"),
    ("a long text, promised", archive(b"\x80\x02X\xff\xff\xff\x7fabc"), "cannot be read"),
    (
        "a very long text, promised",
        archive(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fabc"),
        "cannot be",
    ),
    ("bytes, promised", archive(b"\x80\x05\x96" + b"\xff" * 7 + b"\x7fabc"), "an instruction"),
    ("deep tuples", archive(b"\x80\x02}" + b")" + b"\x85" * 9_000 + b"K\x01s."), "as a key"),
    ("deep lists", archive(b"\x80\x02" + b"]" * 9_000 + b"a" * 8_999 + b"."), "no state dict"),
    ("dicts without number", archive(b"\x80\x02" + b"}" * 1_500_000 + b"."), "too many objects"),
    ("marks without number", archive(b"\x80\x02" + b"(" * 1_500_000 + b"."), "too many objects"),
    (
        "sizes of one text",
        archive(
            b"\x80\x02]q\x00" + _value("x" * 1_000_000).replace(b"q\x00", b"q\x01") + b"0"
            b"(" + b"ctorch\nSize\nh\x01\x85R" * 10_000 + b"e."
        ),
        "a size made of a str",
    ),
    (
        "copies of one list of pairs",
        archive(
            b"\x80\x02]q\x00(" + b"X\x01\x00\x00\x00aK\x01\x86" * 3_000 + b"e0"
            b"]" + b"(ccollections\nOrderedDict\nh\x00\x85Rt" * 10_000 + b"."
        ),
        "as only Python 2 does",
    ),
    (
        "lists that double, called",
        archive(b"\x80\x02]" + b"q\x00(h\x00h\x00l".replace(b"l", b"t") * 60 + b")R."),
        "calls a large tuple",
    ),
    ("an empty stack", archive(b"\x80\x02."), "cannot be read"),
    ("nothing", archive(b""), "cannot be read"),
    ("noise", archive(bytes(range(128, 256)) * 4), "has"),
    ("a list", archive(b"\x80\x02]" + a_tensor() + b"a."), "holds no state dict"),
    (
        "no tensors",
        archive(pickle.dumps({"epoch": 1}, 2)),
        "holds no state dict of tensors, under 'epoch'",
    ),
    (
        "a number among tensors",
        archive(_state(_value("w") + a_tensor() + _value("n") + _value(3))),
        "'n', which is no tensor",
    ),
    ("a number as a name", archive(_state(_value(1) + a_tensor())), "which is no text"),
    ("beyond the storage", archive(_described(shape=(2, 3))), "reaches beyond its storage"),
    ("far beyond", archive(_described(shape=(1, 1), offset=2**60)), "reaches beyond its storage"),
    ("strides beyond", archive(_described(strides=(2**40, 1))), "reaches beyond its storage"),
    ("a negative offset", archive(_described(offset=-1)), "which cannot be"),
    ("a negative stride", archive(_described(strides=(2, -1))), "which cannot be"),
    ("strides of another shape", archive(_described(strides=(1,))), "which cannot be"),
    ("a shape of texts", archive(_described(shape=("2", 2))), "which cannot be"),
    ("a huge shape", archive(_described(shape=(2**40, 2**40), strides=(0, 0))), "is too large"),
    ("a storage not there", archive(_described(key="7")), "lacks the storage '7'"),
    ("a storage elsewhere", archive(_described(key="../data.pkl")), "lacks the storage"),
    ("a short storage", archive(_described(), [("0", bytes(15))]), "has 15 bytes of storage"),
    (
        "a quantised storage",
        archive(_described(storage=b"ctorch\nQInt8Storage\n")),
        "might run code",
    ),
    ("a storage of no type", archive(_described(storage=b"K\x01")), "which is no storage"),
    ("a storage of -1", archive(_described(count=-1)), "-1 elements"),
    (
        "compressed",
        archive(_described(), compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    ("big-endian", archive(_described(), byteorder="big"), "big-endian"),
    ("TorchScript", archive(_described(), others=["constants.pkl"]), "TorchScript"),
    ("another archive", archive(_described(), root="a/b/c"), "not an archive of torch.save"),
    ("cut short", _cut(_GOOD, 30), "damaged archive"),
    ("cut in half", _cut(_GOOD, len(_GOOD) // 2), "damaged archive"),
    ("a lost directory", _patched(_GOOD, _CENTRAL, b"PK\x01\x03"), "damaged archive"),
    ("before 1.6", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02.", "before version 1.6"),
    ("a plain pickle", pickle.dumps({"w": 1}), "is a pickle, which may run code"),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("a space", b" ", "does not begin as one"),
    ("entries before the file", moved_directory(_GOOD), "where its directory says"),
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
