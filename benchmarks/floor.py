"""The floor of a merge: the same bytes read and written by N threads, with no arithmetic.

Each thread takes a shard, chunk by chunk, and then helps with the others': it preads a chunk from
every model into reused buffers and pwrites the first one at the same place of the output. No merge
that reads and writes through the page cache can be faster, save by moving fewer bytes. Needs
checkpoints of one layout.

Two things make it as fast as it is. A file system lets one thread at a time write to a file. And
the kernel's copies are up to six times as slow where the destination lies a few bytes behind the
source by their places within a page (see `shardmix/system/buffers.py`).

    python benchmarks/floor.py A B C -o OUT --threads 2 --chunk-size 512KiB

Prints one JSON object; `seconds` starts when the interpreter is up and the files are listed.
"""

import argparse
import contextlib
import itertools
import json
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints import parse_size

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


def common_shards(models: Sequence[Path]) -> dict[str, int]:
    """Shard name -> size; raises SystemExit where the models' layouts differ."""
    layouts = [
        {path.name: path.stat().st_size for path in sorted(model.glob("*.safetensors"))}
        for model in models
    ]
    if not layouts[0] or any(layout != layouts[0] for layout in layouts):
        raise SystemExit("floor: all models must have the same shards, of the same sizes")
    return layouts[0]


@contextlib.contextmanager
def open_shards(
    models: Sequence[Path], output: Path, layout: dict[str, int], strip_bytes: int
) -> Iterator[list[Shard]]:
    """Open all files of the merge; the outputs get their full size."""
    with contextlib.ExitStack() as stack:

        def descriptor(path: Path, flags: int) -> int:
            number = os.open(path, flags, 0o644)
            stack.callback(os.close, number)
            return number

        shards = []
        for name, nbytes in layout.items():
            sources = tuple(descriptor(model / name, os.O_RDONLY) for model in models)
            target = descriptor(output / name, os.O_RDWR | os.O_CREAT)
            os.ftruncate(target, nbytes)
            shards.append(Shard(sources, target, nbytes, iter(range(0, nbytes, strip_bytes))))
        yield shards


def placed_buffer(nbytes: int) -> memoryview:
    """A buffer that begins in the middle of a page, where chunks begin at the start of one."""
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


def move_all(shards: Sequence[Shard], *, threads: int, strip_bytes: int) -> None:
    """Move every chunk of every shard, each thread those of a shard of its own first."""
    not_begun = iter(shards)
    errors: list[BaseException] = []

    def work() -> None:
        buffers = [placed_buffer(strip_bytes) for _ in shards[0].sources]
        try:
            for shard in itertools.chain(not_begun, shards):
                for offset in shard.offsets:
                    move_chunk(shard, offset, buffers)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]


def sync_all(shards: Sequence[Shard], folder: Path) -> None:
    """Put the files and the folder on the disk, all files at once: the disk likes a deep queue."""
    workers = [threading.Thread(target=os.fsync, args=[shard.output]) for shard in shards]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    number = os.open(folder, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def peak_resident_bytes() -> int:
    """VmHWM of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Move the bytes and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="checkpoint folders of one layout")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--chunk-size", type=parse_size, default=parse_size("512KiB"))
    parser.add_argument("--fsync", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    layout = common_shards(args.models)
    start = time.perf_counter()
    args.output.mkdir(parents=True)
    with open_shards(args.models, args.output, layout, args.chunk_size) as shards:
        move_all(shards, threads=args.threads, strip_bytes=args.chunk_size)
        if args.fsync:
            sync_all(shards, args.output)
    for path in args.models[0].glob("*.json"):
        shutil.copy(path, args.output)
    report = {
        "seconds": round(time.perf_counter() - start, 4),
        "bytes_read": sum(layout.values()) * len(args.models),
        "bytes_written": sum(layout.values()),
        "threads": args.threads,
        "strip_bytes": args.chunk_size,
        "fsync": args.fsync,
        "peak_rss_bytes": peak_resident_bytes(),
    }
    json.dump(report, sys.stdout)
    print()


if __name__ == "__main__":
    main()
