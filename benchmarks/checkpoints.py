"""Writes synthetic checkpoints in the Hugging Face layout, in a few MiB of memory.

The values are ordinary finite numbers, about N(0, 0.02): one random block, repeated from varying
offsets, so that writing is as fast as the disk. Needs nothing but the standard library (and
safetensors for `--validate`).

    python benchmarks/checkpoints.py llama OUT --preset llama-1b --seed 1
    python benchmarks/checkpoints.py giant OUT --tensor-size 3GiB
    python benchmarks/checkpoints.py moe OUT --num-tensors 90000 --sparse
    python benchmarks/checkpoints.py mixed-moe OUT --num-tensors 30000 --total-size 2.2GB
    python benchmarks/checkpoints.py deepseek OUT --preset deepseek-v3 --sparse --regions 4
"""

import argparse
import array
import json
import random
import struct
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import BinaryIO

from checkpoint_shapes import (
    DEEPSEEK_PRESETS,
    DTYPE_SIZES,
    PRESETS,
    Checkpoint,
    LlamaShape,
    TensorSpec,
    deepseek,
    giant,
    llama,
    mixed_moe,
    moe,
    split_into_shards,
)

BLOCK_BYTES = 2 * 1024**2
REGION_BYTES = 2 * 1024**2
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`"500MB"` or `"1.5GiB"` -> bytes; raises ValueError for anything else."""
    number = text.rstrip("KMGiBkmgb")
    unit = text[len(number) :].upper()
    if unit not in UNITS:
        raise ValueError(f"{text!r} is no size; write it as 500MB or 2GiB")
    return int(float(number) * UNITS[unit])


def data_order(spec: TensorSpec) -> tuple[int, str]:
    """What safetensors' own writer sorts by."""
    return -DTYPE_SIZES[spec.dtype], spec.name


def encode_header(tensors: Sequence[TensorSpec]) -> bytes:
    """The bytes before the data, as safetensors' own writer lays them out.

    Tensors follow one another in the order of their data: widest dtype first, then name.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in sorted(tensors, key=data_order):
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": (offset, offset + spec.nbytes),
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def random_block(seed: int) -> memoryview:
    """`BLOCK_BYTES` of bf16 values of N(0, 0.02).

    A pair of them read as one float32 is such a value too: the upper bf16 is its upper half. Read
    as float16 they are ordinary numbers below 2.
    """
    generator = random.Random(seed)
    normals = array.array("f", (generator.gauss(0.0, 0.02) for _ in range(BLOCK_BYTES // 2)))
    wide = normals.tobytes()
    block = bytearray(BLOCK_BYTES)
    # bf16 is the upper half of a float32: keep bytes 2 and 3 of each four (little-endian).
    block[0::2], block[1::2] = wide[2::4], wide[3::4]
    return memoryview(bytes(block))


def write_data(file: BinaryIO, nbytes: int, block: memoryview, generator: random.Random) -> None:
    """Append `nbytes` of the block, starting each repetition at another multiple of 4 bytes."""
    while nbytes:
        start = generator.randrange(0, len(block), 4)
        piece = block[start : start + nbytes]
        file.write(piece)
        nbytes -= len(piece)


def region_starts(tensors: Sequence[TensorSpec], generator: random.Random, count: int) -> list[int]:
    """Where to put data of `REGION_BYTES` within a shard's, at multiples of 4 bytes.

    First at its start, its end and across a boundary of tensors, then anywhere.
    """
    sizes = [spec.nbytes for spec in sorted(tensors, key=data_order)]
    boundary = sum(sizes[: generator.randint(1, max(1, len(sizes) - 1))])
    last = max(0, sum(sizes) - REGION_BYTES)
    wanted = [0, last, boundary - REGION_BYTES // 2]
    wanted += [generator.randrange(last + 1) for _ in range(count - len(wanted))]
    return [min(max(0, start), last) // 4 * 4 for start in wanted[:count]]


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, *, seed: int, sparse: bool, num_regions: int = 0
) -> None:
    """Write the shards, the index (where there are several) and, last, config.json.

    `sparse` writes true headers, and data in some regions alone, the same for every seed: files of
    the full size that take hardly any room on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = split_into_shards(checkpoint.tensors, max_shard_bytes=checkpoint.max_shard_bytes)
    block = memoryview(b"") if sparse and not num_regions else random_block(seed)
    generator = random.Random(seed)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        weight_map.update((spec.name, name) for spec in tensors)
        header, nbytes = encode_header(tensors), sum(spec.nbytes for spec in tensors)
        with (folder / name).open("wb") as file:
            file.write(header)
            if sparse:
                file.truncate(len(header) + nbytes)
                for start in region_starts(tensors, random.Random(name), num_regions):
                    file.seek(len(header) + start)
                    write_data(file, min(REGION_BYTES, nbytes - start), block, generator)
            else:
                write_data(file, nbytes, block, generator)
    if len(shards) > 1:
        total_bytes = sum(spec.nbytes for spec in checkpoint.tensors)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    # Config last: its presence means that the checkpoint is complete.
    write_json(folder / "config.json", checkpoint.config)


def write_json(path: Path, value: object) -> None:
    """Write `value` the way transformers writes its JSON files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def validate(folder: Path, checkpoint: Checkpoint) -> None:
    """Open each shard with safetensors and compare names and shapes; raises ValueError."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            names = shard.keys()
            found |= {name: tuple(shard.get_slice(name).get_shape()) for name in names}
    if found != {spec.name: spec.shape for spec in checkpoint.tensors}:
        raise ValueError(f"{folder}: safetensors reads other tensors than were to be written")


def checkpoint_from_arguments(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the command line asks for."""
    if args.kind == "llama":
        shape, shard_bytes = PRESETS[args.preset]
        sizes = {field.name: getattr(args, field.name) for field in fields(LlamaShape)}
        shape = replace(shape, **{name: size for name, size in sizes.items() if size is not None})
        return llama(shape, max_shard_bytes=args.max_shard_size or shard_bytes)
    if args.kind == "deepseek":
        deepseek_shape, shard_bytes = DEEPSEEK_PRESETS[args.preset]
        return deepseek(deepseek_shape, max_shard_bytes=args.max_shard_size or shard_bytes)
    shard_bytes = args.max_shard_size or 5_000_000_000
    if args.kind == "giant":
        return giant(tensor_bytes=args.tensor_size, max_shard_bytes=shard_bytes)
    if args.kind == "mixed-moe":
        return mixed_moe(
            num_tensors=args.num_tensors,
            total_bytes=args.total_size,
            max_shard_bytes=shard_bytes,
        )
    return moe(
        num_tensors=args.num_tensors,
        hidden=args.hidden_size,
        intermediate=args.intermediate_size,
        layers=args.num_hidden_layers,
        max_shard_bytes=shard_bytes,
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line: one sub-command for each kind of checkpoint."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("out", type=Path, help="folder to write")
    common.add_argument("--seed", type=int, default=0, help="other seeds give other values")
    common.add_argument("--max-shard-size", type=parse_size, help="tensor bytes in a shard")
    common.add_argument("--dtype", choices=DTYPE_SIZES, help="of all tensors; default: the shape's")
    common.add_argument("--sparse", action="store_true", help="true headers, no data")
    common.add_argument(
        "--regions", type=int, default=0, help="with --sparse: data in so many places of each shard"
    )
    common.add_argument("--validate", action="store_true", help="re-open with safetensors")
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    llama_parser = kinds.add_parser("llama", parents=[common], help="a dense decoder")
    llama_parser.add_argument("--preset", choices=PRESETS, default="llama-1b")
    for field in fields(LlamaShape):
        llama_parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    deepseek_parser = kinds.add_parser("deepseek", parents=[common], help="a mixture of experts")
    deepseek_parser.add_argument("--preset", choices=DEEPSEEK_PRESETS, default="deepseek-v3")
    giant_parser = kinds.add_parser("giant", parents=[common], help="one giant embedding")
    giant_parser.add_argument("--tensor-size", type=parse_size, default=parse_size("1GiB"))
    moe_parser = kinds.add_parser("moe", parents=[common], help="very many small tensors")
    moe_parser.add_argument("--num-tensors", type=int, default=20_000)
    moe_parser.add_argument("--hidden-size", type=int, default=128)
    moe_parser.add_argument("--intermediate-size", type=int, default=64)
    moe_parser.add_argument("--num-hidden-layers", type=int, default=60)
    mixed_parser = kinds.add_parser("mixed-moe", parents=[common], help="experts of mixed sizes")
    mixed_parser.add_argument("--num-tensors", type=int, default=30_000)
    mixed_parser.add_argument("--total-size", type=parse_size, default=parse_size("2.2GB"))
    return parser


def main() -> None:
    """Write the checkpoint and say what was written."""
    args = build_parser().parse_args()
    try:
        checkpoint = checkpoint_from_arguments(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if args.dtype:
        tensors = tuple(replace(spec, dtype=args.dtype) for spec in checkpoint.tensors)
        checkpoint = replace(checkpoint, tensors=tensors)
    write_checkpoint(
        args.out, checkpoint, seed=args.seed, sparse=args.sparse, num_regions=args.regions
    )
    if args.validate:
        validate(args.out, checkpoint)
    nbytes = sum(spec.nbytes for spec in checkpoint.tensors)
    num_shards = len(list(args.out.glob("*.safetensors")))
    summary = f"{len(checkpoint.tensors)} tensors, {nbytes / 1e9:.2f} GB, {num_shards} shards"
    print(f"{args.out}: {summary}", file=sys.stderr)


if __name__ == "__main__":
    main()
