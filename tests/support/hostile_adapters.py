"""Adapters that nobody should trust: configs, matrices and names that contradict one another."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.support.hostile_inputs import Build, Case, Words, safetensors_file

_CONFIG: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
_SHAPES = {"q.lora_A.weight": [2, 6], "q.lora_B.weight": [4, 2]}
_BASE = {"q.weight": [4, 6], "q.bias": [4], "e.weight": [9, 6], "s.weight": [6, 6], "x": [2, 4, 6]}
_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"


def _weights(shapes: Mapping[str, list[int]], dtype: str = "F32") -> bytes:
    """Return a file of zeros of these shapes."""
    header: dict[str, object] = {}
    stop, width = 0, {"F32": 4, "U8": 1}[dtype]
    for name, shape in shapes.items():
        start, count = stop, width
        for size in shape:
            count *= size
        stop = start + count
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    return safetensors_file(json.dumps(header), stop)


def _pair(folder: Path, files: Mapping[str, bytes | str]) -> Words:
    """Make a base and an adapter of these files, and return the words that merge them."""
    for name, more in {"base": {"model.safetensors": _weights(_BASE)}, "lora": files}.items():
        (folder / name).mkdir()
        for path, content in more.items():
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name / path).write_bytes(data)
    return ["merge", f"{folder}/base+{folder}/lora=0.5", f"{folder}/base=0.5", *_output(folder)]


def _output(folder: Path) -> Words:
    return ["-o", str(folder / "output" / "out")]


def _an_adapter(
    shapes: Mapping[str, list[int]] = _SHAPES, *, dtype: str = "F32", **config: object
) -> Build:
    """Build an adapter of these tensors, with other keys in its config."""
    content = json.dumps({**_CONFIG, **config})
    named = {f"base_model.model.{name}": shape for name, shape in shapes.items()}

    def build(folder: Path) -> Words:
        return _pair(folder, {_CONFIG_FILE: content, _FILE: _weights(named, dtype)})

    return build


def _files(files: Mapping[str, bytes | str]) -> Build:
    return lambda folder: _pair(folder, files)


def _linked(folder: Path) -> Words:
    words = _pair(folder, {_CONFIG_FILE: json.dumps(_CONFIG)})
    (folder / "elsewhere").write_bytes(_weights(_SHAPES))
    (folder / "lora" / _FILE).symlink_to(folder / "elsewhere")
    return words


def _as_models(folder: Path) -> Words:
    _an_adapter()(folder)
    return ["merge", f"{folder}/lora=0.5", f"{folder}/base=0.5", *_output(folder)]


def _text(ending: str) -> Build:
    def build(folder: Path) -> Words:
        _an_adapter()(folder)
        return ["merge", f"{folder}/base{ending}=0.5", f"{folder}/base=0.5", *_output(folder)]

    return build


_PATTERN = "a simple pattern"
_CONFIGS: list[tuple[str, dict[str, object], str]] = [
    ("another kind", {"peft_type": "IA3"}, "not applied here: IA³"),
    ("a kind that is a list", {"peft_type": []}, "not applied here: []"),
    ("no kind", {"peft_type": None}, "not applied here: None"),
    ("a variant that acts on tokens", {"alora_invocation_tokens": [1]}, "aLoRA"),
    ("layers that are replicated", {"layer_replication": [[0, 1]]}, "replicated layers"),
    ("a changed base", {"init_lora_weights": "pissa_niter_4"}, "its initialisation changed"),
    ("alpha that is NaN", {"lora_alpha": float("nan")}, "lora_alpha: nan; it must be a finite"),
    ("alpha that is infinite", {"lora_alpha": float("inf")}, "it must be a finite number"),
    ("alpha that is text", {"lora_alpha": "8"}, "it must be a finite number"),
    ("rank 0", {"r": 0}, "r: 0; it must be a whole number"),
    ("rank -1", {"r": -1}, "r: -1; it must be a whole number"),
    ("a rank without end", {"r": 10**30}, "it must be a whole number"),
    ("a rank that is true", {"r": True}, "r: True; it must be a whole number"),
    ("another rank than the matrices'", {"r": 3}, "have rank 2, and its config says 3"),
    ("a rank pattern that says another", {"rank_pattern": {"q": 1}}, "its config says 1"),
    ("rank patterns in a list", {"rank_pattern": ["q"]}, "a mapping of patterns"),
    ("a pattern that is no regex", {"rank_pattern": {"(": 2}}, "a regular expression"),
    ("a pattern that never ends", {"alpha_pattern": {"(a+)+b": 2}}, _PATTERN),
    ("a pattern of many stars", {"alpha_pattern": {".*.*.*.*x": 2}}, _PATTERN),
    ("a pattern a mile long", {"alpha_pattern": {"a" * 9999: 2}}, _PATTERN),
    ("alpha of a pattern that is NaN", {"alpha_pattern": {"q": float("nan")}}, "a finite number"),
    ("rows of tokens that are negative", {"trainable_token_indices": [-1]}, "a list of rows"),
    ("rows of tokens twice", {"trainable_token_indices": [1, 1]}, "a list of rows, each once"),
    ("DoRA without magnitudes", {"use_dora": True}, "lacks DoRA's magnitudes of q.weight"),
    ("a switch that is text", {"use_rslora": "yes"}, "it must be true or false"),
]
_A, _B = _SHAPES.items()
_TENSORS: list[tuple[str, dict[str, list[int]], dict[str, object], str]] = [
    ("no tensors", {}, {}, "changes nothing"),
    ("A without B", dict([_A]), {}, "holds lora_A of q but not its lora_B"),
    ("B without A", dict([_B]), {}, "holds lora_B of q but not its lora_A"),
    ("two ranks", dict([_A, ("q.lora_B.weight", [4, 3])]), {}, "has rank 2, and B 3"),
    ("a shape of another base", dict([("q.lora_A.weight", [2, 7]), _B]), {}, "does not fit"),
    ("a module that the base lacks", {"z" + k: v for k, v in _SHAPES.items()}, {}, "has no zq"),
    ("A in one dimension", dict([("q.lora_A.weight", [12]), _B]), {}, "no matrix"),
    ("A that is empty", dict([("q.lora_A.weight", [0, 6]), _B]), {}, "no matrix"),
    (
        "a rank beyond the matrix",
        {"q.lora_A.weight": [7, 6], "q.lora_B.weight": [4, 7]},
        {"r": 7},
        "by matrices of rank 7, beyond the matrix",
    ),
    (
        "two adapters in one file",
        {
            f"q.{kind}.{name}.weight": v
            for name in "mn"
            for kind, v in (("lora_A", [2, 6]), ("lora_B", [4, 2]))
        },
        {},
        "twice, for two adapters",
    ),
    ("magnitudes unasked", {**_SHAPES, "q.lora_magnitude_vector": [4]}, {}, "use_dora: false"),
    (
        "magnitudes of another length",
        {**_SHAPES, "q.lora_magnitude_vector": [5]},
        {"use_dora": True},
        "magnitudes for q.weight; DoRA has 4",
    ),
    ("an unknown part", {**_SHAPES, "q.lora_C.weight": [4]}, {}, "no part of a LoRA adapter"),
    ("a bias of another length", {**_SHAPES, "q.lora_B.bias": [5]}, {}, "shapes must be the same"),
    ("a resized embedding", {"e.weight": [12, 6]}, {}, "the vocabulary was resized"),
    ("a module of another shape", {"e.modules_to_save.weight": [9, 7]}, {}, "must be the base's"),
    (
        "tokens beyond the vocabulary",
        {"e.token_adapter.trainable_tokens_delta": [1, 6]},
        {"trainable_token_indices": [9]},
        "replaces row 9 of e.weight, which has 9",
    ),
    (
        "tokens without a list",
        {"e.token_adapter.trainable_tokens_delta": [1, 6]},
        {},
        "not those that its config lists",
    ),
    (
        "experts that do not divide",
        {"x.lora_A.weight": [3, 6], "x.lora_B.weight": [4, 3]},
        {"target_parameters": ["x"]},
        "x",
    ),
]
_FOLDERS: list[tuple[str, Build, str]] = [
    ("no config", _files({_FILE: _weights(_SHAPES)}), f"it has no {_CONFIG_FILE}"),
    ("no weights", _files({_CONFIG_FILE: json.dumps(_CONFIG)}), f"has no {_FILE}"),
    (
        "a pickle",
        _files({_CONFIG_FILE: json.dumps(_CONFIG), "adapter_model.bin": b"\x80\x02"}),
        "adapter_model.bin",
    ),
    ("a model", _files({"config.json": "{}"}), "is a model"),
    ("a config that is no JSON", _files({_CONFIG_FILE: "{", _FILE: b""}), "not valid JSON"),
    ("weights cut short", _files({_CONFIG_FILE: json.dumps(_CONFIG), _FILE: b"1"}), "too short"),
    ("a link to elsewhere", _linked, "links are followed only in the Hub's cache"),
    ("codes for matrices", _an_adapter(dtype="U8"), "are floats of 16 bits or more"),
    ("adapters as models", _as_models, "give each with its base model, as BASE+ADAPTER"),
    ("no such adapter", _text("+./none"), "no such file or folder"),
    ("nothing after the plus", _text("+"), "or no adapter after it"),
]

CASES = (
    *(Case(f"adapter: {name}", _an_adapter(**config), said) for name, config, said in _CONFIGS),
    *(
        Case(f"adapter: {name}", _an_adapter(shapes, **config), said)
        for name, shapes, config, said in _TENSORS
    ),
    *(Case(f"adapter: {name}", build, said) for name, build, said in _FOLDERS),
)
