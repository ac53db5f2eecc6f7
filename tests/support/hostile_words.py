"""Recipes, examples, sources and outputs that are none."""

import os
from collections.abc import Callable
from pathlib import Path

from tests.support.hostile_inputs import Build, Case, Words, a_model, a_recipe, merge

_A, _B = "{model: a, parameters: {weight: 0.5}}", "{model: b, parameters: {weight: 0.5}}"
_MODELS = f"models: [{_A}, {_B}]\n"
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def _weight(weight: str) -> str:
    return f"models: [{{model: a, parameters: {{weight: {weight}}}}}, {_B}]"


def _source(source: str) -> str:
    return f"models: [{{model: {source}, parameters: {{weight: 0.5}}}}, {_B}]"


def _switch(value: str) -> str:
    return f"{_MODELS}parameters: {{normalize: {value}}}"


def _quantize(value: str) -> str:
    return f"{_MODELS}quantize: {value}"


_RECIPES: list[tuple[str, str | bytes, str, int]] = [
    ("empty", "", "must be a mapping with models", 2),
    ("nothing but a comment", "# models", "must be a mapping with models", 2),
    ("two documents", f"{_MODELS}---\n{_MODELS}", "expected a single document", 2),
    ("a list", "- a\n- b", "must be a mapping with models, merge_method", 2),
    ("a text", "models", "must be a mapping with models", 2),
    ("a NUL", "models: []\0", "special characters are not allowed", 2),
    ("an escape", "models: \x1b[2J", "special characters are not allowed", 2),
    ("not UTF-8", b"models: \xff\xfe", "not valid YAML", 2),
    ("half of UTF-16", b"\xff\xfem\0o", "not valid YAML", 2),
    ("a tab", "models:\n\t- a", "cannot start any token", 2),
    ("never closed", "models: [{", "not valid YAML", 2),
    ("a text never closed", 'models: "' + "x" * 1000, "not valid YAML", 2),
    ("deep lists", "models: " + "[" * 60_000, "not valid YAML", 2),
    ("deep mappings", "models: " + "{a: " * 30_000, "not valid YAML", 2),
    ("deep indentation", "".join(" " * n + "a:\n" for n in range(400)), "not valid YAML", 2),
    ("deep dashes", "- " * 60_000, "not valid YAML", 2),
    ("too large", _MODELS + "#" * 200_000, "more than the 131072 allowed", 2),
    ("a bomb of aliases", _BOMB + "models: *i", "aliases (*name) are not for recipes", 2),
    ("a bomb in a weight", f"{_BOMB}models: [{{model: a, parameters: *i}}]", "aliases (*name)", 2),
    ("an alias of itself", "models: &a [*a]", "aliases (*name) are not for recipes", 2),
    ("an alias of nothing", "models: *a", "aliases (*name) are not for recipes", 2),
    ("a merge key", f"<<: {{a: 1}}\n<<: {{b: 1}}\n{_MODELS}", "'<<' is given twice", 2),
    ("a Python object", "models: !!python/object/apply:os.system [echo]", "not valid YAML", 2),
    ("a Python name", "models: !!python/name:os.system", "not valid YAML", 2),
    ("a tag of its own", "models: !mine []", "not valid YAML", 2),
    ("an impossible date", _weight("2020-13-45"), "not valid YAML", 2),
    ("an empty base-60 number", _weight("!!int ''"), "not valid YAML", 2),
    ("an empty float", _weight("!!float ''"), "not valid YAML", 2),
    ("a bool that is none", "normalize: !!bool maybe", "not valid YAML", 2),
    ("a timestamp that is none", "config_from: !!timestamp never", "not valid YAML", 2),
    ("binary", f"{_MODELS}config_from: !!binary aGk=", "`config_from` is b'hi', not text", 2),
    ("a code point beyond Unicode", 'config_from: "\\U00110000"', "not valid YAML", 2),
    ("a key that is a list", "? [a]\n: b", "not valid YAML", 2),
    ("a key that is null", "null: 1", "unknown key None", 2),
    ("a key that is NaN", ".nan: 1", "unknown key nan", 2),
    ("a key of escapes", '"\\e[2J": 1', "unknown key '\\x1b[2J'", 2),
    ("a key of line breaks", '"a\\nerror: b": 1', "unknown key 'a\\nerror: b'", 2),
    ("a key of 100,000 letters", f"? {'k' * 100_000}\n: 1", "unknown key 'kkk", 2),
    ("a key of 100,000 bits", f"? 0x{'f' * 25_000}\n: 1", "unknown key a large int", 2),
    ("a key twice", f"{_MODELS}{_MODELS}", "key 'models' is given twice", 2),
    ("a source twice", "models: [{model: a, model: b}]", "key 'model' is given", 2),
    ("an unknown key", f"{_MODELS}dytpe: float16", "did you mean 'dtype'", 2),
    ("no models", "dtype: float16", "`models` must be a list", 2),
    ("models in a mapping", "models: {a: 0.5, b: 0.5}", "`models` must be a list", 2),
    ("models in a set", "models: !!set {a, b}", "`models` must be a list", 2),
    ("a model that is a text", "models: [a, b]", "models[1]: must be a mapping", 2),
    ("a model that is null", "models: [null]", "models[1]: must be a mapping", 2),
    ("one model", f"models: [{_A}]", "1 model given", 2),
    ("no weight", f"models: [{{model: a}}, {_B}]", "`weight` is missing", 2),
    ("a weight that is a text", _weight("half"), "weight 'half' is not a number", 2),
    ("a weight that is a bool", _weight("true"), "weight True is not a number", 2),
    ("a weight that is a list of lists", _weight("[[0.5]]"), "weight [0.5] is not a number", 2),
    ("a weight that is a date", _weight("2020-01-01"), "is not a number", 2),
    ("a weight that is infinite", _weight(".inf"), "weight inf is not a finite number", 2),
    ("a weight that is not a number", _weight(".nan"), "weight nan is not a finite number", 2),
    ("a weight beyond float32", _weight("1e39"), "is not a finite number", 2),
    ("a weight of 100,000 bits", _weight("0x" + "f" * 25_000), "weight a large int is not a", 2),
    ("a weight of 50,000 digits", _weight("9" * 50_000), "not valid YAML", 2),
    ("a weight of 1,000 sixties", _weight("1" + ":1" * 1000), "is not a number", 2),
    ("a weight of escapes", _weight('"\\e]0;x\\a"'), "weight '\\x1b]0;x\\x07' is not", 2),
    ("a weight of 100,000 letters", _weight("w" * 100_000), "weight 'www", 2),
    ("weights that sum to 0", _weight("-0.5"), "weights: sum to 0", 2),
    ("a source that is a number", _source("010"), "`model` is 8, not text", 2),
    ("a source that is a date", _source("2024-01-01"), "`model` is datetime.date(", 2),
    ("a source that is a list", _source("[a]"), "`model` is ['a'], not text", 2),
    ("a source that is bytes", _source("!!binary aGk="), "`model` is b'hi', not text", 2),
    ("a source of blanks", _source("'  '"), "a source is empty", 2),
    ("a source with a NUL", _source('"a\\0b"'), "a\\x00b: no such file or folder", 1),
    ("a source of escapes", _source('"\\e[2J"'), "\\x1b[2J: no such file or folder", 1),
    ("a source of line breaks", _source('"a\\nerror: b"'), "a\\nerror: b: no such file", 1),
    ("a source written backwards", _source('"\\u202Egnp"'), "\\u202egnp: no such file", 1),
    ("a source of half a pair", _source('"\\uD800"'), "\\ud800: is not valid Unicode", 2),
    ("a source of 100,000 letters", _source("s" * 100_000), "ss [...] ss", 1),
    ("a home of nobody", _source("~nobody-of-this-name/a"), "cannot be a path", 1),
    ("a revision of escapes", _source('"org/a@\\e[2J"'), "org/a@\\x1b[2J", 1),
    ("an unknown dtype", f"{_MODELS}dtype: bfloat", "did you mean 'bfloat16'", 2),
    ("a dtype that is a list", f"{_MODELS}dtype: [float16]", "`dtype` is ['float16'], not text", 2),
    ("a dtype of escapes", f'{_MODELS}dtype: "\\e[2J"', "dtype '\\x1b[2J': must be one of", 2),
    ("an unknown quantisation", _quantize("fp8_block"), "did you mean 'fp8-blocks'", 2),
    ("a quantisation that is a bool", _quantize("true"), "`quantize` is True, not text", 2),
    ("a quantisation that is a list", _quantize("[fp8-blocks]"), "['fp8-blocks'], not text", 2),
    ("a quantisation that is empty", _quantize("''"), "quantize '': must be fp8-blocks", 2),
    ("a quantisation of escapes", _quantize('"\\e[2J"'), "quantize '\\x1b[2J': must be", 2),
    ("a quantisation of 100,000 letters", _quantize("q" * 100_000), "quantize 'qqq", 2),
    ("a switch that is a text", _switch("maybe"), "must be true or false", 2),
    ("a switch of 100,000 bits", _switch(f"0x{'f' * 25_000}"), "is a large int; it", 2),
    ("a size that is a bool", f"{_MODELS}max_shard_size: true", "size True", 2),
    ("a size below zero", f"{_MODELS}max_shard_size: -5", "size -5: must be more than zero", 2),
    ("a size of 100,000 bits", f"{_MODELS}max_shard_size: 0x{'f' * 25_000}", "size a large int", 2),
    ("a size far below zero", f"{_MODELS}max_shard_size: -0x{'f' * 25_000}", "size a large int", 2),
    ("a size that is a list", f"{_MODELS}max_shard_size: [1, 2]", "size [1, 2]: not a size", 2),
    ("a type of model that is none", f"{_MODELS}model_type: '\\e'", "must be one of decoder", 2),
]


def _to_dev_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _to_a_model_not_utf_8(path: Path) -> None:
    path.symlink_to(a_model(path.with_name("m\udcff")))


def _recipe_that_is(make: Callable[[Path], object]) -> Build:
    def build(folder: Path) -> Words:
        make(folder / "recipe.yaml")
        return ["merge", str(folder / "recipe.yaml"), "-o", str(folder / "output" / "out")]

    return build


def _output(name: str) -> Build:
    def build(folder: Path) -> Words:
        a_model(folder / "bad")
        words = merge(folder)
        words[words.index("-o") + 1] = name if name.startswith("~") else f"{folder}/output/{name}"
        return words

    return build


def _words(*words: str) -> Build:
    return lambda folder: [*words, "-o", str(folder / "output" / "out")]


def _a_source(name: str, make: Callable[[Path], object]) -> Build:
    """Build something that is no model, and name it as one."""

    def build(folder: Path) -> Words:
        make(folder / name)
        words = merge(folder)
        return ["merge", f"{folder / name}=0.5", *words[2:]]

    return build


def _examples(content: bytes | None, name: str = "examples.jsonl") -> Build:
    def build(folder: Path) -> Words:
        path = Path(name) if content is None else folder / name
        if content is not None:
            path.write_bytes(content)
        words = ["merge", "a", "b", "-o", str(folder / "output" / "out")]
        return [*words, "--weights-from", str(path), "--model-type", "decoder"]

    return build


CASES: list[Case] = [
    *(Case(f"recipe: {name}", a_recipe(text), said, code) for name, text, said, code in _RECIPES),
    Case("recipe: a pipe", _recipe_that_is(os.mkfifo), "not a regular file", 2),
    Case("recipe: a folder", _recipe_that_is(Path.mkdir), "not a regular file", 2),
    Case("recipe: /dev/zero", _recipe_that_is(_to_dev_zero), "not a regular file", 2),
    Case("recipe: itself", _recipe_that_is(lambda p: p.symlink_to(p)), "symbolic links", 2),
    Case("source: a pipe", _a_source("m.safetensors", os.mkfifo), "is not a regular file"),
    Case("source: a pipe of no suffix", _a_source("m", os.mkfifo), "not a .safetensors file"),
    Case("source: a pickle", _a_source("m.bin", Path.touch), "not a file of torch.save"),
    Case(
        "source: a device by link", _a_source("m.safetensors", _to_dev_zero), "not a regular file"
    ),
    Case("source: a name not UTF-8", _a_source("m\udcff", a_model), "m\\udcff: is not valid", 2),
    Case("source: a link to such a name", _a_source("m", _to_a_model_not_utf_8), "is not valid"),
    Case("source: a name of escapes", _a_source("\x1b[2J\n", Path.mkdir), "\\x1b[2J\\n: is empty"),
    Case("words: escapes", _words("merge", "\x1b[2J=x", "b=1"), "\\x1b[2J=x: weight 'x' is not", 2),
    Case("words: line breaks", _words("merge", "a\nb"), "'a\\nb': no weight given", 2),
    Case("words: a device", _words("plan", "/dev/zero=1", "/dev/zero=0"), "not a .safetensors"),
    Case("output: escapes", _output("\x1b[2J.safetensors"), "\\x1b[2J.safetensors: names a file"),
    Case("output: line breaks", _output("a\nb/c.safetensors"), "a\\nb/c.safetensors: names a file"),
    Case("output: not UTF-8", _output("\udcff"), "cannot be a path"),
    Case("output: the input", _output("../bad"), "exists"),
    Case("output: below the input", _output("../bad/deep/out"), "lies inside it"),
    Case("output: a name too long", _output("o" * 300), "has a name of 300 bytes"),
    Case("output: a home of nobody", _output("~nobody-of-this-name/out"), "cannot be a path"),
    Case("output: below a file", _output("../bad/config.json/out"), "Not a directory"),
    Case("examples: /dev/zero", _examples(None, "/dev/zero"), "neither a file nor a pipe", 2),
    Case("examples: a folder", _examples(None, "/"), "neither a file nor a pipe", 2),
    Case("examples: large", _examples(b" " * 9_000_000), "has more than 8000000 bytes", 2),
    Case("examples: not UTF-8", _examples(b"\xff"), "is not UTF-8 text", 2),
    Case("examples: deep", _examples(b"[" * 100_000), "line 1: not valid JSON", 2),
    Case("examples: a huge number", _examples(b"9" * 5000), "line 1: not valid JSON", 2),
    Case("examples: escapes", _examples(b'{"\\u001b[2J":1}'), "it has '\\x1b[2J'", 2),
    Case("examples: half a pair", _examples(b'{"output":"\\ud800"}'), "not valid Unicode", 2),
]
