"""Model folders that nobody should trust: index, config, modules, links, and what is no file."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

from tests.support.hostile_inputs import (
    INDEX,
    SHARD,
    WEIGHTS,
    Build,
    Case,
    Words,
    a_folder,
    a_model,
    a_weight_map,
    an_index,
    changed,
    merge,
)

_NO_MAP = "has no weight_map from tensor names to files"
_OUTSIDE = "lies outside the model's folder"
_LINKED = "outside the model's folder; links are followed only in the Hub's cache"
_GOOD_MAP = f'"weight_map":{{"w":"{SHARD}"}}'

_INDEXES: list[tuple[str, str | bytes, str]] = [
    ("empty", " ", "not valid JSON"),
    ("cut short", '{"weight_map":{"w":', "not valid JSON"),
    ("an array", "[]", _NO_MAP),
    ("no weight_map", '{"metadata":{}}', _NO_MAP),
    ("weight_map is null", '{"weight_map":null}', _NO_MAP),
    ("weight_map is a list", '{"weight_map":["w"]}', _NO_MAP),
    ("weight_map is empty", '{"weight_map":{}}', _NO_MAP),
    ("a file that is a number", '{"weight_map":{"w":1}}', _NO_MAP),
    ("a file that is a list", f'{{"weight_map":{{"w":["{SHARD}"]}}}}', _NO_MAP),
    ("a file that is null", '{"weight_map":{"w":null}}', _NO_MAP),
    ("not UTF-8", b'{"weight_map":{"\xff":"a.safetensors"}}', "not valid JSON"),
    ("a byte order mark", b"\xef\xbb\xbf{" + _GOOD_MAP.encode() + b"}", "not valid JSON"),
    ("half a surrogate pair", '{"weight_map":{"\\udc80":"a.safetensors"}}', "not valid JSON"),
    ("deep", "[" * 100_000 + "]" * 100_000, "has no weight_map"),
    ("deep beside the map", f'{{"x":{"[" * 9000}{"]" * 9000},{_GOOD_MAP}}}', "recursion depth"),
    ("NaN", f'{{"x":NaN,{_GOOD_MAP}}}', "not valid JSON"),
    ("a tensor twice", f'{{"weight_map":{{"w":"{SHARD}","w":"{SHARD}"}}}}', "'w' is given twice"),
    ("a tensor twice, escaped", '{"weight_map":{"w":"x","\\u0077":"y"}}', "'w' is given twice"),
    ("two maps", f"{{{_GOOD_MAP},{_GOOD_MAP}}}", "'weight_map' is given twice"),
    ("two maps, one escaped", f'{{{_GOOD_MAP},"weight\\u005fmap":{{}}}}', "'weight_map' is given"),
]

_SHARD_NAMES = [
    ("a folder up", "../good/model.safetensors", _OUTSIDE),
    ("far up", "../" * 40 + "etc/passwd.safetensors", _OUTSIDE),
    ("down and up", "a/../../good/model.safetensors", _OUTSIDE),
    ("up within the folder", f"a/../{SHARD}", _OUTSIDE),
    ("absolute", "/etc/passwd.safetensors", _OUTSIDE),
    ("absolute, two slashes", "//etc/passwd.safetensors", _OUTSIDE),
    ("backslashes", "..\\good\\model.safetensors", _OUTSIDE),
    ("empty", "", "names '', which is no file name"),
    ("the folder itself", ".", "names '.', which is no file name"),
    ("a pickle", "pytorch_model.bin", "which is not a .safetensors file"),
    ("a device", "/dev/zero", _OUTSIDE),
    ("a NUL", f"{SHARD}\0.safetensors", "has control characters in it"),
    ("a line break", "a\nb.safetensors", "has control characters in it"),
    ("an escape", "\x1b[2J.safetensors", "'\\x1b[2J.safetensors', which has control characters"),
    ("written backwards", "\u202estensor.safetensors", "has control characters in it"),
    ("absent", "model-00002-of-00002.safetensors", "which is not in the folder"),
    ("a name too long", "a" * 5000 + ".safetensors", "File name too long"),
]

_CONFIGS: list[tuple[str, str | bytes, str]] = [
    ("empty", " ", "config.json: not valid JSON"),
    ("cut short", '{"model_type": "llama"', "config.json: not valid JSON"),
    ("an array", "[]", "must hold a JSON object, not list"),
    ("null", "null", "must hold a JSON object, not NoneType"),
    ("not UTF-8", b'{"a": "\xff"}', "config.json: not valid JSON"),
    ("a byte order mark", b"\xef\xbb\xbf{}", "config.json: not valid JSON"),
    ("deep", '{"a":' * 100_000 + "1" + "}" * 100_000, "config.json: not valid JSON"),
    ("65 levels", '{"a":' * 65 + "1" + "}" * 65, "nests deeper than 64 levels"),
    ("900 levels", "[" * 900 + "]" * 900, "must hold a JSON object, not list"),
    ("900 levels below", '{"a":' + "[" * 900 + "]" * 900 + "}", "nests deeper than 64 levels"),
    ("a key twice", '{"dtype":"float32","dtype":"int4"}', "key 'dtype' is given twice"),
    ("a nested key twice", '{"text_config":{"a":1,"a":2}}', "key 'a' is given twice"),
    ("half a surrogate pair", '{"a":"\\ud800"}', "surrogates not allowed"),
    ("a key that is half a pair", '{"\\udfff":1}', "surrogates not allowed"),
    ("a number of 5,000 digits", '{"a":' + "9" * 5000 + "}", "config.json: not valid JSON"),
    ("five megabytes", '{"a":"' + "x" * 5_000_000 + '"}', "more than the 4000000 allowed"),
    ("quantised", '{"quantization_config":{"quant_method":"gptq"}}', "is quantised (gptq"),
    ("quantised by an escape", '{"quantization_config":{"quant_method":"\\u001b[2J"}}', "\\x1b[2J"),
    ("quantised by a list", '{"quantization_config":[4]}', "is quantised (unknown method"),
    ("quantised at length", f'{{"quantization":{{"quant_method":"{"q" * 9999}"}}}}', "qq [...]"),
]

_MODULES: list[tuple[str, str, str]] = [
    ("an object", "{}", "must hold a JSON list, not dict"),
    ("cut short", "[", "modules.json: not valid JSON"),
    ("numbers", "[3]", "has a module without a path"),
    ("a path that is a number", '[{"path":3}]', "has a module without a path"),
    ("a folder up", '[{"path":"../good"}]', _OUTSIDE),
    ("absolute", '[{"path":"/etc"}]', _OUTSIDE),
    ("down and up", '[{"path":"a/../../b"}]', _OUTSIDE),
    ("backslashes", '[{"path":"..\\\\good"}]', _OUTSIDE),
    ("a NUL", '[{"path":"a\\u0000"}]', "names the folder 'a\\x00', which has control"),
    ("an escape", '[{"path":"\\u001b[2J"}]', "names the folder '\\x1b[2J', which has control"),
    ("half a surrogate pair", '[{"path":"\\ud800"}]', "surrogates not allowed"),
    ("deep", "[" * 100_000 + "]" * 100_000, "modules.json: not valid JSON"),
]


def _replaced(name: str, make: Callable[[Path], object]) -> Build:
    """Build a sharded model in which something else has taken a file's place."""

    def change(folder: Path) -> None:
        if name in (SHARD, INDEX):
            (folder / "model.safetensors").rename(folder / SHARD)
            (folder / INDEX).write_text(f"{{{_GOOD_MAP}}}")
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)

    return changed(change)


def _socket(path: Path) -> None:
    # By a short name: the address of a socket has about a hundred bytes.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _link_to_a_file_outside(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(WEIGHTS)
    path.symlink_to(elsewhere)


# What may take a file's place, and what is said of it for weights and index; for the others.
_NO_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a folder", Path.mkdir, "not a regular file"),
    ("a pipe", os.mkfifo, "not a regular file"),
    ("a socket", _socket, "not a regular file"),
    ("a link to /dev/zero", _link("/dev/zero"), _LINKED),
    ("a link to /etc/passwd", _link("/etc/passwd"), "is a link to /etc/passwd, " + _LINKED),
    ("a link to a file beside", _link_to_a_file_outside, _LINKED),
    ("a relative link up", _link("../good/config.json"), _LINKED),
    ("a link to nothing", _link("gone"), ""),
    ("a link to itself", lambda path: path.symlink_to(path), ""),
]
_PLACES = ("model.safetensors", SHARD, INDEX, "config.json", "tokenizer.json", "modules.json")


def _in_a_module(make: Callable[[Path], object]) -> Build:
    def change(folder: Path) -> None:
        (folder / "modules.json").write_text('[{"path":"1_Pooling"}]')
        (folder / "1_Pooling").mkdir()
        make(folder / "1_Pooling" / "weights")

    return changed(change)


def _as_a_folder(name: str) -> Build:
    def change(folder: Path) -> None:
        (folder / "modules.json").write_text('[{"path":"1_Pooling"}]')
        (folder / name).symlink_to("/etc")

    return changed(change)


def _hub_cache(link: str, blobs: str | None = None) -> Build:
    """Build a model as the Hub's cache has it, but for where its weights' link leads."""

    def build(folder: Path) -> Words:
        repository = folder / "models--org--name"
        snapshot = a_model(repository / "snapshots" / "c0ffee", {"model.safetensors": ""})
        (folder / "secret").write_bytes(WEIGHTS)
        if blobs is None:
            (repository / "blobs").mkdir()
        else:
            (repository / "blobs").symlink_to(blobs)
        (snapshot / "model.safetensors").symlink_to(link)
        return ["merge", f"{snapshot}=0.5", *merge(folder)[2:]]

    return build


def _base_of(make: Callable[[Path], object]) -> Build:
    """Build a merge whose auxiliary_files come from a third model, that is spoilt."""

    def build(folder: Path) -> Words:
        a_model(folder / "bad")
        make(a_model(folder / "base"))
        return merge(folder, "--config-from", str(folder / "base"))

    return build


_FOLDERS: list[tuple[str, Build, str]] = [
    ("a pipe among a module's files", _in_a_module(os.mkfifo), "is not a regular file"),
    ("a socket among them", _in_a_module(_socket), "is not a regular file"),
    ("a link out among them", _in_a_module(_link("/etc/passwd")), _LINKED),
    ("a link to a folder among them", _in_a_module(_link("/usr")), _LINKED),
    ("a link in circles among them", _in_a_module(_link("..")), "is not a regular file"),
    ("a module's folder that is a link", _as_a_folder("1_Pooling"), _LINKED),
    ("a folder of templates that is one", _as_a_folder("additional_chat_templates"), _LINKED),
    ("a file name with an escape", a_folder({"\x1b[2J.json": "{}"}), "control characters in its"),
    ("a file name with a line break", a_folder({"a\nerror: b.txt": "x"}), "a\\nerror: b.txt: has"),
    ("a snapshot that links to a file outside", _hub_cache("../../../secret"), _LINKED),
    ("a snapshot that links far up", _hub_cache("/etc/passwd"), _LINKED),
    ("a snapshot whose blobs are a link", _hub_cache("../../blobs/secret", ".."), _LINKED),
    ("pickles alone", a_folder({"model.safetensors": "", "model.pkl": "x"}), "only as pickle"),
    ("GGUF alone", a_folder({"model.safetensors": "", "q4.gguf": "GGUF"}), "only as GGUF"),
    (
        "nothing at all",
        a_folder({"model.safetensors": ""}),
        "weights: neither model.safetensors nor",
    ),
    ("a base with a pipe", _base_of(lambda f: os.mkfifo(f / "vocab.txt")), "not a regular file"),
    ("a base with a link out", _base_of(lambda f: (f / "a.py").symlink_to("/etc/passwd")), _LINKED),
    (
        "a base with a link to itself",
        _base_of(lambda f: (f / "a.py").symlink_to("a.py")),
        "a.py: is",
    ),
]

CASES: list[Case] = [
    *(Case(f"index: {name}", an_index(content), said) for name, content, said in _INDEXES),
    *(Case(f"shard: {name}", a_weight_map({"w": file}), said) for name, file, said in _SHARD_NAMES),
    Case("index: another tensor", a_weight_map({"v": SHARD}), "holds w, which"),
    Case("index: more tensors", a_weight_map({"v": SHARD, "w": SHARD}), "do not hold: v;"),
    Case("index: more, escaped", a_weight_map({"\x1b[2J": SHARD, "w": SHARD}), "hold: \\x1b[2J;"),
    *(Case(f"config: {n}", a_folder({"config.json": c}), said) for n, c, said in _CONFIGS),
    *(Case(f"modules: {n}", a_folder({"modules.json": c}), said) for n, c, said in _MODULES),
    *(
        Case(f"{place}: {name}", _replaced(place, make), said or place)
        for place in _PLACES
        for name, make, said in _NO_FILES
    ),
    *(Case(f"folder: {name}", build, said) for name, build, said in _FOLDERS),
]
