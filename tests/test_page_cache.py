"""What a merge leaves in the page cache: of files larger than it nothing, of others all."""

import ctypes
import itertools
import mmap
import os
from contextlib import closing

import pytest
import torch

import shardmix
from shardmix import page_cache
from shardmix.page_cache import DROPPED_AT_ONCE_NBYTES, CacheUse, Trail, plan_cache_use
from tests.models import random_model, save_model

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("read", "written", "use"),
    [
        (3 * GIB, 1 * GIB, CacheUse(keeps_sources=True, keeps_output=True)),
        (4 * GIB, 1 * GIB, CacheUse(keeps_sources=False, keeps_output=True)),
        (9 * GIB, 5 * GIB, CacheUse(keeps_sources=False, keeps_output=False)),
    ],
)
def test_what_fits_into_half_of_the_free_memory_stays(monkeypatch, read, written, use):
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 8 * GIB)
    assert plan_cache_use(read_nbytes=read, write_nbytes=written) == use


@pytest.fixture
def dropped(monkeypatch):
    calls = []

    def note(descriptor, start, stop):
        if start < stop:
            calls.append((start, stop))

    monkeypatch.setattr(page_cache, "drop_pages", note)
    return calls


def test_a_trail_drops_long_pieces_that_end_with_whole_pages(dropped):
    trail, step = Trail(0, keep=False), 3 * MIB + 1
    for start in range(1000, 80 * MIB, step):
        trail.passed(start, start + step)
    assert dropped[0][0] == 1000
    assert all(first[1] == second[0] for first, second in itertools.pairwise(dropped))
    assert all(stop % (2 * MIB) == 0 for _, stop in dropped)
    assert all(stop - start >= DROPPED_AT_ONCE_NBYTES for start, stop in dropped)
    assert len(dropped) == 2
    trail.end()
    assert dropped[-1] == (dropped[-2][1], start + step)


def test_a_trail_that_goes_on_elsewhere_leaves_nothing_behind(dropped):
    trail = Trail(0, keep=False)
    trail.passed(0, MIB)
    trail.passed(70 * MIB, 71 * MIB)
    trail.advance(MIB)
    trail.end()
    assert dropped == [(0, MIB), (70 * MIB, 72 * MIB)]


def test_what_is_to_be_kept_is_not_dropped(dropped):
    trail = Trail(0, keep=True)
    trail.passed(0, 100 * MIB)
    trail.end()
    assert dropped == []


def share_cached(path):
    """Which share of a file's pages is in the page cache."""
    nbytes = path.stat().st_size
    with (
        path.open("r+b") as file,
        closing(mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_SHARED)) as mapping,
    ):
        pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapping)
        call = ctypes.CDLL(None, use_errno=True).mincore
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        result = call(ctypes.addressof(first), nbytes, pages)
        del first
        assert result == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages) / len(pages)


@pytest.fixture
def models(tmp_path):
    """Two models on a disk whose cached pages can be dropped, so that they may be missing."""
    paths = []
    for seed in (1, 2):
        tensors = random_model(seed, torch.bfloat16)
        tensors["large.weight"] = torch.full((9 * MIB,), float(seed), dtype=torch.bfloat16)
        paths.append(save_model(tmp_path / str(seed), tensors) / "model.safetensors")
    os.sync()
    with paths[0].open("rb") as file:
        page_cache.drop_pages(file.fileno(), 0, paths[0].stat().st_size)
    if share_cached(paths[0]) > 0.5:
        pytest.skip("on this file system cached pages cannot be dropped")
    return {str(path.parent): 0.5 for path in paths}


@pytest.mark.parametrize("io", ["pread", "mmap"])
@pytest.mark.parametrize("backend", ["torch", "llvm"])
def test_a_merge_larger_than_the_cache_leaves_it_to_others(
    tmp_path, models, monkeypatch, io, backend
):
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    report = shardmix.merge(models, tmp_path / "out", io=io, backend=backend, max_shard_size="1GB")
    for folder in (*models, report.output):
        # What was read to know the file, its header, may stay.
        assert share_cached(tmp_path / folder / "model.safetensors") < 0.2
    assert shardmix.verify(report.output).is_verified
    assert share_cached(tmp_path / "out" / "model.safetensors") < 0.2


def test_a_merge_that_fits_stays_cached(tmp_path, models, monkeypatch):
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: GIB)
    report = shardmix.merge(models, tmp_path / "out")
    for folder in (*models, report.output):
        assert share_cached(tmp_path / folder / "model.safetensors") > 0.8


def test_recomputing_leaves_the_output_uncached_too(tmp_path, models, monkeypatch):
    shardmix.merge(models, tmp_path / "out", record_paths=True)
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified
    assert share_cached(tmp_path / "out" / "model.safetensors") < 0.2
