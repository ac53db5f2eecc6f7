"""Samples of a process's memory over time, taken by a thread of its own.

Reads the kernel's and torch's figures, in a fixed amount of memory. Knows no merge, writes no file.
"""

import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil

from shardmix.errors import one_line
from shardmix.system.gpus import gpu_names

INTERVAL_SECONDS = 0.02
"""Initial time between samples."""

# At this number every other one goes, and the interval doubles: about half a MiB, however long
# the merge.
_MOST_SAMPLES = 4096

_KIB = 1024
_NOT_KNOWN = -1

Probe = Callable[[], Sequence[int | None]]
"""Returns a value, usually bytes, for each of its columns; None if unknown here."""

MEMORY_COLUMNS = (
    "rss_bytes",
    "rss_anon_bytes",
    "rss_file_bytes",
    "system_page_cache_bytes",
    "system_dirty_bytes",
    "system_writeback_bytes",
)
VRAM_COLUMNS = ("vram_reserved_bytes", "vram_device_used_bytes")


class Sampler:
    """A thread that calls probes and stores their values as columns."""

    def __init__(self, started: float) -> None:
        """Count times from `started`, by `time.perf_counter`. Begins without probes and columns."""
        self.interval_seconds = INTERVAL_SECONDS
        """Current time between samples."""
        self.failure: str | None = None
        """Reason if sampling ended early, else None."""
        self._started = started
        self._probes: list[tuple[tuple[str, ...], Probe]] = []
        self._times = array("d")
        self._columns: dict[str, array[int]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardmix-footprint", daemon=True)

    def watch(self, columns: tuple[str, ...], probe: Probe) -> None:
        """Add a probe; its values before now are unknown."""
        with self._lock:
            self._probes.append((columns, probe))
            for name in columns:
                self._columns[name] = array("q", [_NOT_KNOWN]) * len(self._times)

    def start(self) -> None:
        """Take a first sample, and start the thread."""
        self._sample()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and take a last sample."""
        self._stop.set()
        self._thread.join()
        self._sample()

    def columns(self) -> tuple[list[float], dict[str, list[int | None]]]:
        """Return the samples' times in seconds, and each column; unknown values are None."""
        with self._lock:
            return list(self._times), {
                name: [None if value == _NOT_KNOWN else value for value in values]
                for name, values in self._columns.items()
            }

    def _run(self) -> None:
        while self.failure is None and not self._stop.wait(self.interval_seconds):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            try:
                values = [(columns, probe()) for columns, probe in self._probes]
            except (OSError, RuntimeError, ValueError, psutil.Error) as error:
                # No reason to fail a merge, but the profile must say it.
                self.failure = one_line(error)
                return
            self._times.append(time.perf_counter() - self._started)
            for columns, probed in values:
                for name, value in zip(columns, probed, strict=True):
                    self._columns[name].append(_NOT_KNOWN if value is None else value)
            if len(self._times) == _MOST_SAMPLES:
                self._thin_out()

    def _thin_out(self) -> None:
        """Drop of each two samples the one with less memory, so that no peak is lost."""
        sizes = self._columns.get(MEMORY_COLUMNS[0], self._times)
        kept = [
            first if sizes[first] > sizes[first + 1] else first + 1
            for first in range(0, _MOST_SAMPLES, 2)
        ]
        self._times = array("d", (self._times[index] for index in kept))
        for name, values in self._columns.items():
            self._columns[name] = array("q", (values[index] for index in kept))
        self.interval_seconds *= 2


@contextmanager
def memory_probe() -> Iterator[Probe]:
    """Yield the probe of `MEMORY_COLUMNS`: by /proc if there is one (13 µs), else by psutil.

    /proc/self/smaps_rollup would be exact to the page, but takes 5 ms for 200 MiB, and meanwhile
    the process cannot map memory. The figures of `status` may be off by some pages for each thread.
    """
    try:
        status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield _probe_by_psutil
        return
    try:
        meminfo = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield lambda: (
                *_kib_fields(status, (b"\nVmRSS:", b"\nRssAnon:", b"\nRssFile:")),
                *_kib_fields(meminfo, (b"\nCached:", b"\nDirty:", b"\nWriteback:")),
            )
        finally:
            os.close(meminfo)
    finally:
        os.close(status)


def _kib_fields(descriptor: int, keys: Sequence[bytes]) -> Iterator[int]:
    text = os.pread(descriptor, 8 * _KIB, 0)
    for key in keys:
        start = text.index(key) + len(key)
        yield int(text[start : text.index(b"kB", start)]) * _KIB


def _probe_by_psutil() -> Sequence[int | None]:
    cached = getattr(psutil.virtual_memory(), "cached", None)
    return int(psutil.Process().memory_info().rss), None, None, cached, None, None


def vram_probe(device: str) -> Probe:
    """Return the probe of `VRAM_COLUMNS` for cuda (all GPUs) or cuda:N; torch must be loaded.

    Of several GPUs it returns the largest figures. The driver counts the whole device, by all
    processes, with the process's own context, which torch does not count.
    """
    cuda = sys.modules["torch"].cuda
    watched = gpu_names(cuda, device)

    def probe() -> Sequence[int]:
        reserved = max(int(cuda.memory_reserved(name)) for name in watched)
        memory = [cuda.mem_get_info(name) for name in watched]
        return reserved, max(int(total - free) for free, total in memory)

    return probe
