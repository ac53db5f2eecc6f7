"""Writes synthetic checkpoints in the Hugging Face layout, in a few MiB of memory.

In `shapes.json` a dimension is an expression of sizes, which have their names in config.json; what
is for `each` layer or expert is there as often as `below` says. The values are ordinary finite
numbers: one random block, repeated from varying offsets, so that writing is as fast as the disk.
"""

import argparse
import json
import random
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from benchmarks.lib.tables import Size
from benchmarks.lib.workspace import PRESETS, SHAPES

# Bytes per element; also the order within a file, which safetensors sorts by descending alignment.
DTYPE_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
BLOCK_BYTES = REGION_BYTES = 2 * 1024**2


class Spec(NamedTuple):
    """What a tensor's header entry needs, but the offsets."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


Specs = Mapping[str, Spec]


def made(name: str, options: Mapping[str, Any]) -> tuple[Specs, dict[str, Any]]:
    """Return a preset's tensors, in state-dict order, and its config; options replace its sizes."""
    kind, sizes = SHAPES[PRESETS[name]["kind"]], PRESETS[name]["sizes"]
    given = {key: value for key, value in options.items() if value is not None}
    scope = kind["config"] | sizes | given
    for key in sizes:
        if isinstance(scope[key], str):
            scope[key] = eval(scope[key], {}, scope)
    config = kind["config"] | {key: scope[key] for key in sizes}
    if name == "mixed-moe":
        return mixed_experts(options["num_tensors"], options["total_size"]), config
    return dict(_tensors(kind["tensors"], scope)), config


def _tensors(entries: Sequence[Any], scope: Mapping[str, Any]) -> Iterator[tuple[str, Spec]]:
    for entry in entries:
        if isinstance(entry, dict):
            for number in range(eval(entry["below"], {}, scope)):
                yield from _tensors(entry["tensors"], {**scope, entry["each"]: number})
        else:
            shape = tuple(eval(dimension, {}, scope) for dimension in entry[1:])
            name = entry[0].format_map(scope)
            yield name, Spec(shape, "F32" if name.endswith("_bias") else "BF16")


def mixed_experts(num_tensors: int, total_bytes: int) -> Specs:
    """Return `num_tensors` experts, nearly all of 64 KiB and the others of 4 MiB, mixed.

    As many of the large ones as it takes to have about `total_bytes`.
    """
    hidden, small, large = 1024, 64 * 1024, 4 * 1024**2
    if not small * num_tensors <= total_bytes <= large * num_tensors:
        told = f"{num_tensors} tensors of 64 KiB to 4 MiB never have {total_bytes} bytes"
        raise SystemExit(f"error: {told}")
    num_large = (total_bytes - small * num_tensors) // (large - small)
    sizes = [large] * num_large + [small] * (num_tensors - num_large)
    random.Random(0).shuffle(sizes)
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    return {
        name.format(*divmod(index, 128)): Spec((nbytes // (2 * hidden), hidden))
        for index, nbytes in enumerate(sizes)
    }


def in_order(tensors: Specs) -> dict[str, Spec]:
    """Return tensors as safetensors' own writer sorts them: widest dtype first, then name."""
    return dict(sorted(tensors.items(), key=lambda item: (-DTYPE_SIZES[item[1].dtype], item[0])))


def encode_header(tensors: Specs) -> bytes:
    """Return the bytes before the data, as safetensors' own writer lays them out."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in in_order(tensors).items():
        offsets = offset, offset + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def random_block(seed: int) -> memoryview:
    """Return `BLOCK_BYTES` of bf16 values of N(0, 0.02).

    A pair of them read as one float32 is such a value too: the upper bf16 is its upper half. Read
    as float16 they are ordinary numbers below 2.
    """
    values = np.random.default_rng(seed).normal(0, 0.02, BLOCK_BYTES // 2).astype(np.float32)
    return memoryview((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def write_data(file: BinaryIO, nbytes: int, block: memoryview, generator: random.Random) -> None:
    """Append `nbytes` of the block, starting each repetition at another multiple of 4 bytes."""
    while nbytes:
        start = generator.randrange(0, len(block), 4)
        piece = block[start : start + nbytes]
        file.write(piece)
        nbytes -= len(piece)


def region_starts(tensors: Specs, generator: random.Random, count: int) -> list[int]:
    """Return where to put data of `REGION_BYTES` within a shard's, at multiples of 4 bytes.

    First at its start, its end and across a boundary of tensors, then anywhere.
    """
    sizes = [spec.nbytes for spec in in_order(tensors).values()]
    boundary = sum(sizes[: generator.randint(1, max(1, len(sizes) - 1))])
    last = max(0, sum(sizes) - REGION_BYTES)
    wanted = [0, last, boundary - REGION_BYTES // 2]
    wanted += [generator.randrange(last + 1) for _ in range(count - len(wanted))]
    return [min(max(0, start), last) // 4 * 4 for start in wanted[:count]]


def write_checkpoint(args: argparse.Namespace, tensors: Specs, config: object) -> int:
    """Write the shards, the index (if there are several) and, last, config.json.

    `args.sparse` writes true headers, and data in `args.regions` places of each shard only, the
    same for every seed: files of the full size that take hardly any room on disk. Returns the
    number of shards.
    """
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=args.max_shard_size or PRESETS[args.kind]["shard_bytes"],
    )
    block, generator = random_block(args.seed), random.Random(args.seed)
    for name, names in split.filename_to_tensors.items():
        shard = {each: tensors[each] for each in names}
        header, nbytes = encode_header(shard), sum(spec.nbytes for spec in shard.values())
        with (folder / name).open("wb") as file:
            file.write(header)
            if args.sparse:
                file.truncate(len(header) + nbytes)
                for start in region_starts(shard, random.Random(name), args.regions):
                    file.seek(len(header) + start)
                    write_data(file, min(REGION_BYTES, nbytes - start), block, generator)
            else:
                write_data(file, nbytes, block, generator)
    files = {"config.json": config}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        # Config last: its presence means that the checkpoint is complete.
        files = {"model.safetensors.index.json": index} | files
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return len(split.filename_to_tensors)


def main() -> None:
    """Write the checkpoint and say what was written."""
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint.")
    add = parser.add_argument
    add("kind", choices=PRESETS)
    add("out", type=Path, help="folder to write")
    add("--seed", type=int, default=0, help="other seeds give other values")
    add("--max-shard-size", type=Size, help="tensor bytes in a shard")
    add("--dtype", choices=DTYPE_SIZES, help="of all tensors; default: the kind's")
    add("--sparse", action="store_true", help="true headers, no data")
    add("--regions", type=int, default=0, help="with --sparse: data in so many places of a shard")
    for size in ("num-hidden-layers", "hidden-size", "moe-intermediate-size"):
        add(f"--{size}", type=int, help="in place of the kind's")
    add("--tensor-size", type=Size, default=Size("1GiB"), help="giant")
    add("--num-tensors", type=int, default=20_000, help="moe and mixed-moe")
    add("--total-size", type=Size, default=Size("2.2GB"), help="mixed-moe")
    args = parser.parse_args()
    tensors, config = made(args.kind, vars(args))
    if args.dtype:
        tensors = {name: spec._replace(dtype=args.dtype) for name, spec in tensors.items()}
    num_shards = write_checkpoint(args, tensors, config)
    nbytes = sum(spec.nbytes for spec in tensors.values())
    summary = f"{len(tensors)} tensors, {nbytes / 1e9:.2f} GB, {num_shards} shards"
    print(f"{args.out}: {summary}", file=sys.stderr)


if __name__ == "__main__":
    main()
