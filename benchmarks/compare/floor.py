"""The floor of a merge: the same bytes read and written by N threads, with no arithmetic.

No merge that reads and writes through the page cache can be faster, save by moving fewer bytes. Two
things make it as fast as it is. A file system lets one thread at a time write to a file. And the
kernel's copies are up to six times as slow if the destination lies a few bytes behind the source by
their places within a page (see `shardmix/system/buffers.py`).
"""

import argparse
import itertools
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.lib.tables import Size

HALF_A_PAGE = mmap.PAGESIZE // 2
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Shard(NamedTuple):
    """One shard: its open sources and its output."""

    sources: tuple[int, ...]
    """File descriptors, one a model."""
    output: int
    """File descriptor of the output, already of its full size."""
    nbytes: int
    """Size of each of these files."""
    offsets: Iterator[int]
    """Where the chunks begin that no thread has taken. `next` is atomic here: no lock is needed."""


def open_shard(name: str, nbytes: int, args: argparse.Namespace) -> Shard:
    """Open the files of a shard; the output gets its full size."""
    target = os.open(args.output / name, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(target, nbytes)
    sources = tuple(os.open(model / name, os.O_RDONLY) for model in args.models)
    return Shard(sources, target, nbytes, iter(range(0, nbytes, args.chunk_size)))


def move_chunk(shard: Shard, offset: int, buffers: Sequence[memoryview]) -> None:
    """Read one chunk of every source and write the first one's bytes."""
    wanted = min(len(buffers[0]), shard.nbytes - offset)
    for source, buffer in zip(shard.sources, buffers, strict=True):
        done = 0
        while done < wanted:
            got = os.preadv(source, [buffer[done:wanted]], offset + done)
            if not got:
                raise SystemExit("floor: a source became shorter while it was read")
            done += got
    done = 0
    while done < wanted:
        done += os.pwrite(shard.output, buffers[0][done:wanted], offset + done)


def at_once(function: Callable[[int], object], arguments: Sequence[int]) -> None:
    """Call a function in a thread for each of the arguments; raises what the first raised."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        list(pool.map(function, arguments))


def main() -> None:
    """Move the bytes and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="checkpoint folders of one layout")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chunk-size", type=Size, default=Size("512KiB"))
    parser.add_argument("--fsync", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    layouts = [
        {path.name: path.stat().st_size for path in sorted(model.glob("*.safetensors"))}
        for model in args.models
    ]
    if not layouts[0] or any(layout != layouts[0] for layout in layouts):
        raise SystemExit("floor: all models must have the same shards, of the same sizes")
    start = time.perf_counter()
    args.output.mkdir(parents=True)
    shards = [open_shard(name, nbytes, args) for name, nbytes in layouts[0].items()]
    not_begun = iter(shards)

    def work(_: int) -> None:
        # In the middle of a page, since chunks begin at the start of one.
        buffers = [
            memoryview(mmap.mmap(-1, HALF_A_PAGE + args.chunk_size, flags=ANONYMOUS))[HALF_A_PAGE:]
            for _ in args.models
        ]
        # Those of a shard of its own first.
        for shard in itertools.chain(not_begun, shards):
            for offset in shard.offsets:
                move_chunk(shard, offset, buffers)

    at_once(work, range(args.threads))
    if args.fsync:
        # All files at once: the disk likes a deep queue.
        at_once(os.fsync, [shard.output for shard in shards])
        os.fsync(os.open(args.output, os.O_RDONLY))
    for path in args.models[0].glob("*.json"):
        shutil.copy(path, args.output)
    seconds = round(time.perf_counter() - start, 4)
    bytes_read = sum(layouts[0].values()) * len(args.models)
    print(json.dumps({"seconds": seconds, "bytes_read": bytes_read, "threads": args.threads}))


if __name__ == "__main__":
    main()
