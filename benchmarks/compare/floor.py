"""The floor of a merge: the same bytes read and written by N threads, with no arithmetic.

Each thread takes a shard, chunk by chunk, and then helps with the others: it preads a chunk from
every model into reused buffers and pwrites the first one at the same place of the output. No merge
that reads and writes through the page cache can be faster, save by moving fewer bytes. Needs
checkpoints of one layout.

Two things make it as fast as it is. A file system lets one thread at a time write to a file. And
the kernel's copies are up to six times as slow if the destination lies a few bytes behind the
source by their places within a page (see `shardmix/system/buffers.py`).

    python -m benchmarks.compare.floor A B C -o OUT --threads 2 --chunk-size 512KiB

Prints one JSON object; `seconds` starts when the interpreter is up and the files are listed.
"""

import argparse
import functools
import itertools
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.tables import Size

ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


@dataclass(frozen=True, slots=True)
class Shard:
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


def placed_buffer(nbytes: int) -> memoryview:
    """Return a buffer that begins in the middle of a page; chunks begin at the start of one."""
    half_a_page = mmap.PAGESIZE // 2
    return memoryview(mmap.mmap(-1, half_a_page + nbytes, flags=ANONYMOUS))[half_a_page:]


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


def in_threads(calls: Sequence[Callable[[], None]]) -> None:
    """Make the calls at once; raises what the first that failed raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for done in [pool.submit(call) for call in calls]:
            done.result()


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

    def work() -> None:
        buffers = [placed_buffer(args.chunk_size) for _ in args.models]
        # Those of a shard of its own first.
        for shard in itertools.chain(not_begun, shards):
            for offset in shard.offsets:
                move_chunk(shard, offset, buffers)

    in_threads([work] * args.threads)
    if args.fsync:
        # All files at once: the disk likes a deep queue.
        folder = os.open(args.output, os.O_RDONLY)
        in_threads([functools.partial(os.fsync, shard.output) for shard in shards])
        os.fsync(folder)
    for descriptor in (each for shard in shards for each in (*shard.sources, shard.output)):
        os.close(descriptor)
    for path in args.models[0].glob("*.json"):
        shutil.copy(path, args.output)
    seconds = round(time.perf_counter() - start, 4)
    bytes_read = sum(layouts[0].values()) * len(args.models)
    print(json.dumps({"seconds": seconds, "bytes_read": bytes_read, "threads": args.threads}))


if __name__ == "__main__":
    main()
