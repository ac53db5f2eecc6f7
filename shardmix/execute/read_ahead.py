"""Asks the system for a merge's first bytes, while its backend is still being loaded.

A hint: the later reads report errors of a source.
"""

import itertools
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from shardmix.dtypes import element_nbytes
from shardmix.errors import SourceError
from shardmix.plan.merge_plan import MergePlan
from shardmix.sources.readers import PreadReader
from shardmix.system.memory import available_nbytes
from shardmix.system.units import MIB

_STEP_NBYTES = 8 * MIB
MOST_NBYTES = 1024 * MIB
"""The most bytes read ahead into the system's cache; and never more than a quarter of available
memory."""
MOST_UNCACHED_NBYTES = 128 * MIB
"""The same if the cache is left to other files."""


@contextmanager
def reading_ahead(plan: MergePlan) -> Iterator[None]:
    """Read ahead while the block loads a backend."""
    stop = threading.Event()
    threading.Thread(target=_read_ahead, args=(plan, stop), daemon=True).start()
    try:
        yield
    finally:
        stop.set()  # and don't wait: a disk may take its time


def _read_ahead(plan: MergePlan, stop: threading.Event) -> None:
    most = MOST_NBYTES if plan.cache_use.keeps_sources else MOST_UNCACHED_NBYTES
    left = min(most, available_nbytes() // 4)
    with closing(PreadReader(plan.files)) as reader, suppress(SourceError, OSError):
        for file, offset, nbytes in _beginnings(plan):
            if stop.is_set() or nbytes > left:
                return
            reader.will_need(file, offset, nbytes)
            left -= nbytes


def _beginnings(plan: MergePlan) -> Iterator[tuple[int, int, int]]:
    """Yield file, offset and length of the workers' first reads, a step of each in turn."""
    num_files = len(plan.files)
    sources = [
        (source.file, source.offset, segment.num_elements * element_nbytes(source.dtype))
        for shard in plan.shards[: plan.memory.workers]
        for segment in itertools.islice(shard.merged, 1)
        for source in segment.sources
        if source.file < num_files  # otherwise it is decoded
    ]
    longest = max((nbytes for *_, nbytes in sources), default=0)
    for start in range(0, longest, _STEP_NBYTES):
        for file, offset, nbytes in sources:
            if start < nbytes:
                yield file, offset + start, min(_STEP_NBYTES, nbytes - start)
