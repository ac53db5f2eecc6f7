"""Writes synthetic checkpoints in the Hugging Face layout, in a few MiB of memory.

The values are ordinary finite numbers, about N(0, 0.02): one random block, repeated from varying
offsets, so that writing is as fast as the disk.

    python -m benchmarks.lib.checkpoints llama-1b OUT --seed 1
    python -m benchmarks.lib.checkpoints giant OUT --tensor-size 3GiB
    python -m benchmarks.lib.checkpoints moe OUT --num-tensors 90000 --sparse
    python -m benchmarks.lib.checkpoints mixed-moe OUT --num-tensors 30000 --total-size 2.2GB
    python -m benchmarks.lib.checkpoints deepseek-v3 OUT --sparse --regions 4
"""

import argparse
import json
import random
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from benchmarks.lib import shapes
from benchmarks.lib.shapes import DTYPE_SIZES, PRESETS, Spec
from benchmarks.lib.tables import Size

BLOCK_BYTES = 2 * 1024**2
REGION_BYTES = 2 * 1024**2


def in_order(tensors: Mapping[str, Spec]) -> dict[str, Spec]:
    """Return tensors as safetensors' own writer sorts them: widest dtype first, then name."""
    return dict(sorted(tensors.items(), key=lambda item: (-DTYPE_SIZES[item[1].dtype], item[0])))


def encode_header(tensors: Mapping[str, Spec]) -> bytes:
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


def region_starts(tensors: Mapping[str, Spec], generator: random.Random, count: int) -> list[int]:
    """Return where to put data of `REGION_BYTES` within a shard's, at multiples of 4 bytes.

    First at its start, its end and across a boundary of tensors, then anywhere.
    """
    sizes = [spec.nbytes for spec in in_order(tensors).values()]
    boundary = sum(sizes[: generator.randint(1, max(1, len(sizes) - 1))])
    last = max(0, sum(sizes) - REGION_BYTES)
    wanted = [0, last, boundary - REGION_BYTES // 2]
    wanted += [generator.randrange(last + 1) for _ in range(count - len(wanted))]
    return [min(max(0, start), last) // 4 * 4 for start in wanted[:count]]


def write_checkpoint(
    args: argparse.Namespace, tensors: Mapping[str, Spec], config: object, shard_bytes: int
) -> int:
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
        max_shard_size=shard_bytes,
    )
    block = random_block(args.seed)
    generator = random.Random(args.seed)
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
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    # Config last: its presence means that the checkpoint is complete.
    write_json(folder / "config.json", config)
    return len(split.filename_to_tensors)


def write_json(path: Path, value: object) -> None:
    """Write `value` the way transformers writes its JSON files."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def chosen(args: argparse.Namespace) -> tuple[shapes.Made, int]:
    """Return the checkpoint that the command line asks for, and its usual bytes per shard."""
    sizes = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers")}
    if args.kind == "giant":
        return shapes.giant(args.tensor_size), 5_000_000_000
    if args.kind == "mixed-moe":
        return shapes.mixed_moe(args.num_tensors, args.total_size), 5_000_000_000
    if args.kind == "moe":
        width = args.intermediate_size
        made = shapes.moe(args.num_tensors, moe_intermediate_size=width, **sizes)
        return made, 5_000_000_000
    return shapes.preset(args.kind, **sizes), PRESETS[args.kind]["shard_bytes"]


def main() -> None:
    """Write the checkpoint and say what was written."""
    parser = argparse.ArgumentParser(description="Write a synthetic checkpoint.")
    add = parser.add_argument
    add("kind", choices=[*PRESETS, "giant", "mixed-moe"])
    add("out", type=Path, help="folder to write")
    add("--seed", type=int, default=0, help="other seeds give other values")
    add("--max-shard-size", type=Size, help="tensor bytes in a shard")
    add("--dtype", choices=DTYPE_SIZES, help="of all tensors; default: the kind's")
    add("--sparse", action="store_true", help="true headers, no data")
    add("--regions", type=int, default=0, help="with --sparse: data in so many places of a shard")
    add("--num-hidden-layers", type=int, help="in place of the kind's")
    add("--hidden-size", type=int, help="in place of the kind's")
    add("--intermediate-size", type=int, help="moe")
    add("--tensor-size", type=Size, default=Size("1GiB"), help="giant")
    add("--num-tensors", type=int, default=20_000, help="moe and mixed-moe")
    add("--total-size", type=Size, default=Size("2.2GB"), help="mixed-moe")
    args = parser.parse_args()
    try:
        (tensors, config), shard_bytes = chosen(args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if args.dtype:
        tensors = {name: spec._replace(dtype=args.dtype) for name, spec in tensors.items()}
    num_shards = write_checkpoint(args, tensors, config, args.max_shard_size or shard_bytes)
    nbytes = sum(spec.nbytes for spec in tensors.values())
    summary = f"{len(tensors)} tensors, {nbytes / 1e9:.2f} GB, {num_shards} shards"
    print(f"{args.out}: {summary}", file=sys.stderr)


if __name__ == "__main__":
    main()
