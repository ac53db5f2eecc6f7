import itertools
import os
import sys
from types import SimpleNamespace

import pytest

from shardmix.profiling import sampler as sampler_module
from shardmix.profiling.sampler import (
    MEMORY_COLUMNS,
    VRAM_COLUMNS,
    Sampler,
    memory_probe,
    vram_probe,
)
from shardmix.system.memory import peak_resident_nbytes, resident_nbytes
from shardmix.system.units import KIB, MIB
from tests.support.fresh_process import python


def values_of(probe):
    return dict(zip(MEMORY_COLUMNS, probe(), strict=True))


@pytest.mark.machine
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_is_told_in_bytes_and_by_kind():
    with memory_probe() as probe:
        now = values_of(probe)
    assert abs(now["rss_bytes"] - resident_nbytes()) < 16 * MIB
    assert now["rss_bytes"] <= peak_resident_nbytes() + MIB
    assert 0 < now["rss_anon_bytes"] + now["rss_file_bytes"] <= now["rss_bytes"] + MIB
    with open("/proc/meminfo") as file:
        meminfo = dict(line.split(":") for line in file)
    cached = int(meminfo["Cached"].split()[0]) * KIB
    assert now["system_page_cache_bytes"] == pytest.approx(cached, rel=0.2)
    assert now["system_dirty_bytes"] >= 0
    assert now["system_writeback_bytes"] >= 0


def test_allocated_memory_is_anonymous(tmp_path):
    """Allocated memory is anonymous, and a mapped file is not.

    In a fresh process: this one's allocator may serve the ballast from what it kept.
    """
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    code = (
        "import mmap, sys\n"
        "from shardmix.profiling.sampler import memory_probe\n"
        "def changed(before, after): return [(b - a) >> 20 for a, b in zip(before, after)][:3]\n"
        "with memory_probe() as probe:\n"
        "    start = probe()\n"
        "    ballast = b'x' * (64 << 20)\n"
        "    allocated = probe()\n"
        "    file = open(sys.argv[1], 'rb')\n"
        "    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "    sum(mapped[::4096])\n"
        "    end = probe()\n"
        "print(*changed(start, allocated), *changed(allocated, end))\n"
    )
    rss, anon, file, rss_then, anon_then, file_then = map(
        int, python(code, tmp_path / "file").split()
    )
    assert 60 <= anon <= rss <= 68
    assert abs(file) <= 2
    assert 60 <= file_then <= rss_then <= 68
    assert abs(anon_then) <= 2


def test_psutil_serves_without_proc(monkeypatch):
    """Without /proc, psutil tells what it can."""

    def no_proc(path, *args):
        raise FileNotFoundError(path)

    monkeypatch.setattr(sampler_module.os, "open", no_proc)
    with memory_probe() as probe:
        now = values_of(probe)
    assert abs(now["rss_bytes"] - resident_nbytes()) < 16 * MIB
    assert now["rss_anon_bytes"] is now["rss_file_bytes"] is now["system_dirty_bytes"] is None


def fake_cuda(monkeypatch):
    """Two GPUs: of the first torch has 20 and the driver counts 30, of the second 10 and 60."""
    cuda = SimpleNamespace(
        device_count=lambda: 2,
        mem_get_info={"cuda:0": (70, 100), "cuda:1": (40, 100)}.__getitem__,
        memory_reserved={"cuda:0": 20, "cuda:1": 10}.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_gpu_memory_is_torchs_and_drivers(monkeypatch):
    """GPU memory is torch's and the driver's."""
    fake_cuda(monkeypatch)
    assert dict(zip(VRAM_COLUMNS, vram_probe("cuda:0")(), strict=True)) == {
        "vram_reserved_bytes": 20,
        "vram_device_used_bytes": 30,
    }


def test_largest_of_several_gpus_counts(monkeypatch):
    """Of several GPUs, the largest figures count."""
    fake_cuda(monkeypatch)
    assert vram_probe("cuda")() == (20, 60)
    assert vram_probe("cuda:1")() == (10, 60)


def sampled(values, *, column="rss_bytes"):
    """Return a sampler that has taken these values, one sample each."""
    sampler = Sampler(0.0)
    remaining = iter(values)
    sampler.watch((column,), lambda: (next(remaining),))
    for _ in values:
        sampler._sample()
    return sampler


def test_columns_may_start_late():
    """Samples are rows of columns that may start late."""
    sampler = Sampler(0.0)
    sampler.watch(("a",), lambda: (3,))
    sampler._sample()
    sampler.watch(("b", "c"), lambda: (5, None))
    sampler._sample()
    times, columns = sampler.columns()
    assert columns == {"a": [3, 3], "b": [None, 5], "c": [None, None]}
    assert 0 < times[0] < times[1]


def test_long_merge_thins_but_keeps_its_peak(monkeypatch):
    """A long merge has fewer samples a second, and keeps its peak."""
    monkeypatch.setattr(sampler_module, "_MOST_SAMPLES", 8)
    sampler = sampled([1, 2, 3, 99, 4, 5, 6, 1, 1, 2])
    times, columns = sampler.columns()
    assert columns["rss_bytes"] == [2, 99, 5, 6, 1, 2]
    assert times == sorted(set(times))
    assert sampler.interval_seconds == 2 * sampler_module.INTERVAL_SECONDS


def test_failing_probe_ends_sampling():
    """A probe that fails ends sampling, and is told of."""

    def fail():
        raise RuntimeError("CUDA error:\nunspecified")

    sampler = Sampler(0.0)
    sampler.watch(("a",), lambda: (3,))
    sampler.start()
    sampler.watch(("b",), fail)
    sampler.stop()
    times, columns = sampler.columns()
    assert sampler.failure == "CUDA error: unspecified"
    assert {len(column) for column in columns.values()} == {len(times)}


def test_short_recording_has_two_samples():
    """A short recording has a first and a last sample."""
    sampler = Sampler(0.0)
    sampler.watch(("a",), lambda: (3,))
    sampler.start()
    sampler.stop()
    times, columns = sampler.columns()
    assert len(times) == len(columns["a"]) >= 2
    assert all(a < b for a, b in itertools.pairwise(times))
