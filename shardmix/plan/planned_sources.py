"""The files and streams that a plan reads of its sources, and the memory of their readers."""

import itertools
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from shardmix.plan.layout import FileNumbers
from shardmix.plan.memory_budget import ReaderMemory
from shardmix.plan.merge_plan import PlannedSource
from shardmix.sources.base import Source
from shardmix.sources.identity import SourceFile
from shardmix.sources.shared_readers import SharedReaders


def planned_sources(
    sources: Sequence[Source], groups: Sequence[Sequence[Source]]
) -> tuple[tuple[PlannedSource, ...], list[tuple[FileNumbers, ...]]]:
    """Return the files to read of each source, and for each group the numbers of its parts' files.

    Files are numbered source by source; streams of decoded tensors have the numbers that follow.
    """
    planned: list[PlannedSource] = []
    firsts: list[list[int]] = []
    num_files = 0
    parts_of = list(zip(*groups, strict=True))
    for source, parts in zip(sources, parts_of, strict=True):
        files: list[SourceFile] = []
        firsts.append([])
        for part in parts:
            firsts[-1].append(num_files + len(files))
            files += part.identity.files
        num_files += len(files)
        decoders = tuple(part for part in parts if _decodes(part))
        planned.append(
            PlannedSource(
                text=source.text,
                name=source.public_name,
                path=source.path,
                identity=replace(
                    source.identity,
                    files=tuple(files),
                    decoding="; ".join(filter(None, (part.identity.decoding for part in parts))),
                ),
                decoders=decoders,
            )
        )
    streams = itertools.count(num_files)
    numbers = [
        [
            FileNumbers(first, next(streams) if _decodes(part) else first)
            for first, part in zip(its_firsts, parts, strict=True)
        ]
        for its_firsts, parts in zip(firsts, parts_of, strict=True)
    ]
    return tuple(planned), list(zip(*numbers, strict=True))


def _decodes(part: Source) -> bool:
    """Return True if some tensors are decoded while they are read."""
    return part.tensors.decoded is not None and bool(part.tensors.decoded.any())


def reader_memory(planned: Sequence[PlannedSource]) -> ReaderMemory:
    """Return the memory of the sources' own readers."""
    decoders = [decoder for source in planned for decoder in source.decoders]
    shared, nbytes = SharedReaders(), 0
    for decoder in decoders:
        with closing(decoder.open_shared_reader(shared)) as reader:
            nbytes += reader.overhead_nbytes
    uses_kernels = any(decoder.uses_kernels for decoder in decoders)
    return ReaderMemory(nbytes, shared.num_shared, uses_kernels)
