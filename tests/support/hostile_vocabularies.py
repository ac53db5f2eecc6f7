"""Tokenizers that nobody should map rows by, and requests that name what is not there."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.support.hostile_inputs import Build, Case, Words, safetensors_file

_WORDS = {"<unk>": 0, "a": 1, "b": 2, "c": 3}
_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 6,
    "hidden_size": 2,
}
_SHAPES = {"model.embed_tokens.weight": [6, 2], "lm_head.weight": [6, 2], "model.norm.weight": [2]}
_TOKENIZER = "tokenizer.json"


def _weights(shapes: Mapping[str, list[int]], dtype: str = "F32") -> bytes:
    header, stop = {}, 0
    for name, shape in shapes.items():
        start = stop
        stop += {"F32": 4, "I64": 8}[dtype] * (shape[0] * shape[1] if len(shape) > 1 else shape[0])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    return safetensors_file(json.dumps(header), stop)


def _tokenizer(vocab: object = _WORDS, added: object = (), kind: str = "WordLevel") -> str:
    model = {"type": kind, "vocab": vocab, "unk_token": "<unk>"}
    return json.dumps({"added_tokens": added, "model": model})


def _added(*pairs: tuple[str, int]) -> list[dict[str, object]]:
    return [{"id": number, "content": content, "special": True} for content, number in pairs]


def _model(folder: Path, files: Mapping[str, str | bytes]) -> str:
    folder.mkdir()
    whole: dict[str, str | bytes] = {
        "model.safetensors": _weights(_SHAPES),
        "config.json": json.dumps(_CONFIG),
        _TOKENIZER: _tokenizer(),
        **files,
    }
    for name, content in whole.items():
        if content:
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(data)
    return str(folder)


def _words(folder: Path, *more: str) -> Words:
    return ["-o", str(folder / "output" / "out"), *more]


def _files(files: Mapping[str, str | bytes], source: str = "base") -> Build:
    """Build a model of these files, which is merged with a good one."""

    def build(folder: Path) -> Words:
        bad, good = _model(folder / "bad", files), _model(folder / "good", {})
        return [
            *("merge", f"{good}=0.5", f"{bad}=0.5"),
            *_words(folder, "--tokenizer-source", source),
        ]

    return build


def _options(*options: str) -> Build:
    """Build two good models, merged with these options."""

    def build(folder: Path) -> Words:
        models = [f"{_model(folder / name, {})}=0.5" for name in ("one", "two")]
        return ["merge", *models, *_words(folder, *options)]

    return build


def _recipe(tokenizer: object, **others: object) -> Build:
    """Build a recipe of two good models, `ONE` and `TWO`, with this `tokenizer`."""

    def build(folder: Path) -> Words:
        names = {name: _model(folder / name.lower(), {}) for name in ("ONE", "TWO")}
        models = [{"model": name, "parameters": {"weight": 1}} for name in names]
        text = json.dumps({"models": models, "tokenizer": tokenizer, **others})
        for name, path in names.items():
            text = text.replace(f'"{name}"', json.dumps(path))
        (folder / "recipe.yaml").write_text(text)
        return ["merge", str(folder / "recipe.yaml"), *_words(folder)]

    return build


def _linked(folder: Path) -> Words:
    words = _files({_TOKENIZER: ""})(folder)
    (folder / "elsewhere.json").write_text(_tokenizer())
    (folder / "bad" / _TOKENIZER).symlink_to(folder / "elsewhere.json")
    return words


def _deep(folder: Path) -> Words:
    """Name ids in lists within lists, in the model that gives the config."""
    bad = _model(folder / "bad", {"generation_config.json": _DEEP})
    good = _model(folder / "good", {})
    more = _words(folder, "--tokenizer-source", good)
    return ["merge", f"{bad}=0.5", f"{good}=0.5", *more]


def _one_token(source: object, **more: object) -> dict[str, object]:
    return {"source": "base", "tokens": {"a": {"source": source, **more}}}


_TWICE = json.dumps({"model": {"type": "WordLevel", "vocab": {}}}).replace("{}", '{"a": 0, "a": 1}')
_HIDDEN = "\x1b[2J\u202e"
_DEEP = '{"eos_token_id": ' + "[" * 5_000 + "]" * 5_000 + "}"

CASES = tuple(
    Case(f"vocabulary: {name}", build, said, status)
    for name, build, said, status in (
        (
            "two tokens of one id",
            _files({_TOKENIZER: _tokenizer({"a": 0, "b": 1, "c": 1})}),
            "3 tokens but 2 ids",
            1,
        ),
        ("one token twice", _files({_TOKENIZER: _TWICE}), 'its token "a" has two ids', 1),
        (
            "an added token of two ids",
            _files({_TOKENIZER: _tokenizer(added=_added(("a", 4)))}),
            'the added token "a" is 4, but a tokenizer numbers it 1',
            1,
        ),
        (
            "an added token on another's id",
            _files(
                {
                    _TOKENIZER: "",
                    "vocab.json": json.dumps(_WORDS),
                    "added_tokens.json": '{"<x>": 2}',
                }
            ),
            "id 2 stands for a token of vocab.json and for the added token",
            1,
        ),
        (
            "added ids with a gap",
            _files({_TOKENIZER: _tokenizer(added=_added(("<x>", 5)))}),
            "is 5, but a tokenizer numbers it 4",
            1,
        ),
        (
            "a negative id",
            _files({_TOKENIZER: _tokenizer({"a": -1, "b": 0})}),
            "2 tokens but 1 ids",
            1,
        ),
        (
            "an id beyond the embedding",
            _files({_TOKENIZER: _tokenizer({**_WORDS, "d": 6})}),
            "has ids up to 6, but its embedding only 6 rows",
            1,
        ),
        (
            "an id beyond everything",
            _files({_TOKENIZER: _tokenizer({**_WORDS, "d": 9_999_999_999})}),
            "has ids up to 9999999999",
            1,
        ),
        ("no tokens", _files({_TOKENIZER: _tokenizer({})}), "holds no tokens", 1),
        ("no vocabulary", _files({_TOKENIZER: "{}"}), "is not a tokenizer's", 1),
        ("no tokenizer", _files({_TOKENIZER: ""}), "has no tokenizer", 1),
        (
            "pieces only",
            _files({_TOKENIZER: "", "spiece.model": b"\x0a\x02\x0a\x00"}),
            "has only spiece.model",
            1,
        ),
        ("a link elsewhere", _linked, "outside", 1),
        (
            "gaps before new tokens",
            _files({_TOKENIZER: _tokenizer({"<unk>": 0, "z": 1}, _added(("<x>", 2)))}, "union"),
            "were learned apart",
            1,
        ),
        (
            "control characters",
            _files({_TOKENIZER: _tokenizer({"<unk>": 0, _HIDDEN: 1})}, "union"),
            r"\x1b[2J\u202e",
            1,
        ),
        (
            "two sizes of one model",
            _files({"model.safetensors": _weights({**_SHAPES, "lm_head.weight": [7, 2]})}),
            "rows for different numbers of tokens",
            1,
        ),
        (
            "rows of integers",
            _files({"model.safetensors": _weights(_SHAPES, "I64")}),
            "holds no floats",
            1,
        ),
        (
            "no rows of tokens",
            _files({"model.safetensors": _weights({"model.norm.weight": [2]})}),
            "has no tensor that is known to have a row for each token",
            1,
        ),
        (
            "a tensor of an unknown class",
            _files(
                {
                    "config.json": json.dumps({**_CONFIG, "architectures": ["Own"]}),
                    "model.safetensors": _weights({**_SHAPES, "model.mystery": [6, 2]}),
                }
            ),
            "model.mystery [6, 2] may have a row for each of 6 tokens or not",
            1,
        ),
        ("ids in a list without end", _deep, "not valid JSON", 1),
        (
            "a model that is not merged",
            _options("--tokenizer-source", "./three"),
            "names ./three, which is none of the models",
            2,
        ),
        (
            "a multiple of zero",
            _options("--tokenizer-source", "base", "--pad-to-multiple-of", "0"),
            "`pad_to_multiple_of` is 0",
            2,
        ),
        (
            "a negative multiple",
            _options("--tokenizer-source", "base", "--pad-to-multiple-of", "-64"),
            "`pad_to_multiple_of` is -64",
            2,
        ),
        (
            "an absurd multiple",
            _options("--tokenizer-source", "base", "--pad-to-multiple-of", "1000000000"),
            "`pad_to_multiple_of` is 1000000000",
            2,
        ),
        (
            "a multiple for nothing",
            _options("--pad-to-multiple-of", "64"),
            "would change nothing without a source of the tokenizer",
            2,
        ),
        ("two sources", _recipe({}, tokenizer_source="base"), "are both given", 2),
        (
            "a token that no model has",
            _recipe({"source": "base", "tokens": {"<new>": {"source": "ONE"}}}),
            'has no token "<new>"',
            2,
        ),
        (
            "a row of no token",
            _recipe(_one_token({"kind": "model_token", "model": "ONE", "token": "zz"})),
            'has no token "zz"',
            2,
        ),
        (
            "a row beyond the last",
            _recipe(_one_token({"kind": "model_token", "model": "TWO", "token_id": 6})),
            "token_id 6 is beyond the 6 rows",
            2,
        ),
        (
            "an id of many digits",
            _recipe(_one_token({"kind": "model_token", "model": "TWO", "token_id": 10**400})),
            "is beyond the 6 rows",
            2,
        ),
        (
            "a row of a model that is not merged",
            _recipe(_one_token("three")),
            "names three, which is none of the models",
            2,
        ),
        (
            "a token without a source",
            _recipe({"source": "base", "tokens": {"a": {"force": True}}}),
            "`source` is missing",
            2,
        ),
    )
)
