"""Fuzzes what reads files of strangers, guided by coverage: any exception but ours is a crash.

    python -m tests.hostile.fuzz header --seconds 600

A target takes bytes for the content of one file and opens it as `shardmix` would. Seeds are small
valid files, made anew for each run; inputs that crashed are kept in the work directory.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shardmix", "yaml", "json"]):
    from shardmix.conventions.naming import declared_quantisation, ties_word_embeddings
    from shardmix.conventions.vocabularies import read_tokenizer_json
    from shardmix.dtypes import DTYPES, tensor_nbytes
    from shardmix.errors import ShardmixError
    from shardmix.formats import safetensors_header, strict_json
    from shardmix.matching.config_fit import config_misfits
    from shardmix.matching.configs import NamedConfig, config_differences
    from shardmix.matching.tensors import check_mergeable
    from shardmix.recipe.build import build_recipe
    from shardmix.scoring.examples import load_examples
    from shardmix.scoring.options import check_options
    from shardmix.sources import auxiliary_files
    from shardmix.sources.checkpoint import read_config
    from shardmix.sources.resolve import open_source

import safetensors
from safetensors.numpy import save

Target = Callable[[bytes, Path], None]


def header(content: bytes, folder: Path) -> None:
    """A JSON header, in as many pieces as there can be; what we accept safetensors must, too."""
    header_json = content[1:]
    numbers = map(int, re.findall(rb"\d{1,5}", header_json))
    # Or hardly any would be of the right length.
    nbytes = content[0] if content[:1] > b"\x20" else max(numbers, default=0)
    safetensors_header._PIECE_NBYTES = 64
    file_nbytes = 8 + len(header_json) + nbytes
    table = safetensors_header.decode_header(header_json, file_nbytes=file_nbytes)
    if re.search(rb"-0|\d[eE][-+]?\d", header_json):
        return  # numbers such as -0 and 1e999 are one reader's integers and another's errors
    info = safetensors.deserialize(_whole(header_json, nbytes))
    theirs = {name: tensor["shape"] for name, tensor in info}
    ours = dict(zip(table.names, map(list, table.shapes), strict=True))
    if ours != theirs:
        raise AssertionError(f"{ours} is not what safetensors reads: {theirs}")


def tensors(content: bytes, folder: Path) -> None:
    """A header that is JSON, of tensors one after the other, but for some slips."""
    data = atheris.FuzzedDataProvider(content)
    entries, position = [], 0
    for _ in range(data.ConsumeIntInRange(0, 6)):
        name = data.PickValueInList(["a", "b", "c", "}", '},"', "__metadata__"])
        dtype = data.PickValueInList(list(DTYPES))
        lengths = [0, 1, 2, 3, 8, 2**31, 2**32, 2**63 - 1, 2**64]  # 2**63: we are the stricter
        shape = [data.PickValueInList(lengths) for _ in range(data.ConsumeIntInRange(0, 3))]
        nbytes = tensor_nbytes(dtype, tuple(shape))
        slips = [data.PickValueInList([0, 0, 0, 0, 0, 0, 1, -1]) for _ in range(2)]
        offsets = [position + slips[0], position + nbytes + slips[1]]
        entry = json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})
        entries.append(f"{json.dumps(name)}:{entry}")
        position += nbytes
    if data.ConsumeBool():
        entries.reverse()
    header_json = f"{{{','.join(entries)}}}".encode()
    _compare(header_json, min(position, 1 << 20))


def _compare(header_json: bytes, data_nbytes: int) -> None:
    """Hold our verdict on a header to safetensors', which lets names stand there twice."""
    safetensors_header._PIECE_NBYTES = 64
    names = [key for key, _ in json.loads(header_json, object_pairs_hook=list)]
    has_name_twice = len(set(names)) < len(names)
    try:
        info = safetensors.deserialize(_whole(header_json, data_nbytes))
        theirs = {name: (tensor["shape"], len(tensor["data"])) for name, tensor in info}
    except safetensors.SafetensorError:
        theirs = None
    try:
        table = safetensors_header.decode_header(
            header_json, file_nbytes=8 + len(header_json) + data_nbytes
        )
    except ShardmixError as error:
        if theirs is not None and not has_name_twice:
            raise AssertionError(f"{header_json!r} is valid, but: {error}") from error
        raise
    ours = {
        name: (list(shape), int(length))
        for name, shape, length in zip(table.names, table.shapes, table.nbytes, strict=True)
    }
    if ours != theirs:
        raise AssertionError(f"{ours} is not what safetensors reads: {theirs}")


def _whole(header_json: bytes, data_nbytes: int) -> bytes:
    return len(header_json).to_bytes(8, "little") + header_json + bytes(data_nbytes)


def file(content: bytes, folder: Path) -> None:
    """A whole safetensors file, opened and judged as a model."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    check_mergeable(open_source(str(path)))


def index(content: bytes, folder: Path) -> None:
    """The index of a sharded model."""
    path = folder / "model.safetensors.index.json"
    path.write_bytes(content)
    for name in strict_json.read_index(path).values():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise AssertionError(f"{name!r} leads out of the folder")


def yaml_recipe(content: bytes, folder: Path) -> None:
    """A recipe."""
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    build_recipe(path)


def config(content: bytes, folder: Path) -> None:
    """A config.json, and what is asked of it."""
    (folder / "config.json").write_bytes(content)
    read = read_config(folder)
    declared_quantisation(read)
    ties_word_embeddings(read)
    config_misfits(read, ["wte.weight"], [(4, 2)])
    config_differences([NamedConfig("a", read), NamedConfig("b", {"model_type": "llama"})])


def tokenizer(content: bytes, folder: Path) -> None:
    """A tokenizer.json beside another model's."""
    (folder / "tokenizer.json").write_bytes(content)
    read_tokenizer_json(folder, max_memory=None)


def modules(content: bytes, folder: Path) -> None:
    """A modules.json, and the files that it makes auxiliary_files."""
    (folder / "config.json").write_bytes(b"{}")
    (folder / "modules.json").write_bytes(content)
    auxiliary_files.find_auxiliary_files(folder)


def examples(content: bytes, folder: Path) -> None:
    """A file of examples, read for both kinds of models."""
    path = folder / "examples.jsonl"
    path.write_bytes(content)
    refused: ShardmixError | None = None
    for model_type in ("decoder", "encoder"):
        try:
            load_examples(path, check_options(model_type, {}))
        except ShardmixError as error:
            refused = error
    if refused is not None:
        raise refused


# What random bytes would take long to find.
WORDS = (
    *('{"', '":{"', '"},"', "[[", "]]", "{}", "[]", ":[0,", "null", "true", "NaN", "-1", "1e999"),
    *(
        '"dtype":"F32"',
        '"shape":[1]',
        '"data_offsets":[0,4]',
        '"__metadata__":{',
        "9223372036854775808",
    ),
    *('"dtype":"F4"', '"dtype":"BF16"', "\\ud800", "\\u0000", "\\u001b[2J", '}, "', "../", "/etc/"),
    *(
        '"weight_map":{',
        ".safetensors",
        "models:",
        "model: ",
        "weight: ",
        "&a",
        "*a",
        "<<: ",
        "!!",
    ),
    *(
        "!!binary ",
        "!!int ",
        "!!timestamp ",
        "!!set ",
        "? ",
        "0x",
        "1:1:1",
        ".inf",
        "2001-01-01",
        "|\n",
    ),
    *(
        "dtype: ",
        "base: ",
        "normalize: ",
        "max_shard_size: ",
        "model_type: ",
        "\ufeff",
        "%YAML 1.2",
    ),
)

TARGETS: dict[str, Target] = {
    "header": header,
    "tensors": tensors,
    "file": file,
    "index": index,
    "recipe": yaml_recipe,
    "config": config,
    "modules": modules,
    "tokenizer": tokenizer,
    "examples": examples,
}


def seeds(target: str) -> list[bytes]:
    """Return small valid contents of a target's file."""
    import numpy as np

    tensors = {
        "model.embed_tokens.weight": np.zeros((3, 2), np.float32),
        "model.layers.0.norm.weight": np.zeros(2, np.float16),
        "nothing": np.zeros((0, 4), np.float64),
        "scale": np.zeros((), np.int64),
        "position_ids": np.zeros((1, 2), np.int32),
    }
    files = [save(tensors), save(tensors, {"format": "pt", "shape": "round"}), save({})]
    lengths = [int.from_bytes(content[:8], "little") for content in files]
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    pooling = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    text = {"input": "2 + 2 =", "output": "4"}
    query = {"query": "who?", "pos": ["she"], "neg": ["it", "they"]}
    contents: dict[str, list[bytes] | list[object]] = {
        "header": [
            b"\0" + content[8 : 8 + length] for content, length in zip(files, lengths, strict=True)
        ],
        "tensors": [bytes(range(n, n + 60)) for n in range(0, 240, 60)],
        "file": files,
        "index": [{"metadata": {"total_size": 64}, "weight_map": weight_map}],
        "recipe": [
            b"models:\n  - {model: org/a, parameters: {weight: 0.5}}\n  - model: 'b'\n"
            b"    parameters:\n      weight: [5e-1, {filter: mlp, value: 1}]\n"
            b"dtype: bfloat16\nmax_shard_size: 5GB\n",
            b"models: [{model: a}, {model: b}]\nmerge_method: slerp\nbase_model: a\n"
            b"parameters: {t: [0, 0.5, {filter: mlp, value: 1}, 1]}\n",
            b'models: [{"model": "\\u00e4", parameters: {weight: !!float 1}}]\nslices: no\n',
            b"models: [{model: {model: {path: a, revision: b}}}, {model: a+b}]\nparameters: [a]\n",
        ],
        "config": [
            {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
            {"text_config": {"quantization_config": {"quant_method": "gptq"}}, "n": [1.5, None]},
        ],
        "modules": [[{"idx": 0, "path": ""}, pooling]],
        "tokenizer": [
            {"model": {"type": "BPE", "vocab": {"a": 0, '"': 1}, "merges": [["a", "\\"]]}},
            {"model": {"vocab": [["a", -1.5]]}, "added_tokens": [{"id": 7, "content": "<s>"}]},
        ],
        "examples": [[text, text], {"task": [text]}, query, [query, query]],
    }
    return [
        content if isinstance(content, bytes) else json.dumps(content).encode()
        for content in contents[target]
    ]


def main() -> None:
    """Fuzz one target for a time; libFuzzer prints how far it is, and where what crashed lies."""
    parser = argparse.ArgumentParser(description="Fuzz what reads files of strangers.")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="how long")
    parser.add_argument("--work-dir", type=Path, help="for corpus and crashes; else temporary")
    parser.add_argument("--max-bytes", type=int, default=4096, help="longest input")
    args = parser.parse_args()
    work = args.work_dir or Path(tempfile.mkdtemp(prefix="shardmix-fuzz-"))
    corpus, crashes, folder = work / "corpus", work / "crashes", work / "model"
    for path in (corpus, crashes, folder):
        path.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds(args.target)):
        (corpus / f"seed-{number}").write_bytes(content)
    escaped = ("".join(map("\\x{:02x}".format, word.encode())) for word in WORDS)
    (work / "words").write_text("".join(f'"{word}"\n' for word in escaped))
    target, counts = TARGETS[args.target], {"accepted": 0, "refused": 0}

    def one_input(content: bytes) -> None:
        try:
            target(content, folder)
        except ShardmixError as error:
            counts["refused"] += 1
            if not str(error):
                raise AssertionError("an error that says nothing") from error
        else:
            counts["accepted"] += 1
        if sum(counts.values()) % 100_000 == 0:
            print(counts, file=sys.stderr)

    options = [
        f"-max_total_time={args.seconds}",
        f"-max_len={args.max_bytes}",
        f"-artifact_prefix={crashes}/",
        f"-dict={work / 'words'}",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
