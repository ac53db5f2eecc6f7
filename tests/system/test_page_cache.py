"""What a merge leaves in the page cache: of files larger than it nothing, of others all."""

import ctypes
import itertools
import json
import mmap
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import shardmix
from shardmix.cli.commands import app
from shardmix.output import file_writer
from shardmix.sources import open_files
from shardmix.system import page_cache
from shardmix.system.page_cache import CacheUse, PassedRanges, plan_cache_use
from tests.support.models import random_model, save_model

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("read", "written", "fsync", "use"),
    [
        (3 * GIB, 1 * GIB, True, CacheUse(keeps_sources=True, keeps_output=True)),
        (4 * GIB, 1 * GIB, True, CacheUse(keeps_sources=False, keeps_output=True)),
        (9 * GIB, 5 * GIB, True, CacheUse(keeps_sources=False, keeps_output=False)),
        (9 * GIB, 5 * GIB, False, CacheUse(keeps_sources=False, keeps_output=True)),
    ],
)
def test_half_of_available_memory_stays(monkeypatch, read, written, fsync, use):
    """What fits into half of the available memory stays."""
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 8 * GIB)
    assert plan_cache_use(read_nbytes=read, write_nbytes=written, fsync=fsync) == use


@pytest.fixture
def dropped(monkeypatch):
    """(File, start, stop) of each call for it, in order."""
    calls = []

    def note(descriptor, start, stop):
        calls.append((os.fstat(descriptor).st_ino, start, stop))

    for module in (page_cache, file_writer):
        monkeypatch.setattr(module, "drop_pages", note)
    return calls


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"")
    os.truncate(path, 200 * MIB + 5)
    return path


@given(
    order=st.permutations(range(0, 200 * MIB, 3 * MIB + 1)),
    at_once=st.sampled_from([4 * MIB, 32 * MIB, 400 * MIB]),
)
def test_ranges_drop_once_in_whole_pages(order, at_once):
    """Ranges in any order are dropped once, in long pieces of whole pages."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        patch.setattr(page_cache, "DROPPED_AT_ONCE_NBYTES", at_once)
        patch.setattr(
            PassedRanges, "_drop", lambda self, file, start, stop: calls.append((start, stop))
        )
        passed = PassedRanges(["file"])
        for start in order:
            passed.add(0, start, start + 3 * MIB + 1)
    assert all(stop - start >= at_once for start, stop in calls)
    assert all(start % (2 * MIB) == stop % (2 * MIB) == 0 for start, stop in calls)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(sorted(calls)))
    if at_once <= 32 * MIB:
        # What is left lies between two that were dropped, or at an end, and is short.
        num_bytes = sum(stop - start for start, stop in calls)
        assert num_bytes >= 200 * MIB - (len(calls) + 1) * (at_once + 4 * MIB)


def test_known_ranges_are_bounded(file, dropped, monkeypatch):
    """No more than so many ranges are known at a time."""
    monkeypatch.setattr(page_cache, "_MOST_RANGES", 100)
    passed = PassedRanges([file])
    most = 0
    for start in range(0, 200 * MIB, 8192):
        passed.add(0, start, start + 4096)
        most = max(most, len(passed._stop_of), len(passed._start_of))
    assert 100 <= most <= 102
    assert dropped == []
    passed.end()
    assert dropped == [(file.stat().st_ino, 0, 200 * MIB + 5)]


def test_files_are_told_apart_and_dropped(tmp_path, file, dropped):
    """Files are told apart, and dropped whole in the end."""
    other = tmp_path / "other"
    other.write_bytes(b"1234")
    passed = PassedRanges([file, other, tmp_path / "gone"])
    passed.add(0, 0, 20 * MIB)
    passed.add(1, 20 * MIB, 40 * MIB)
    passed.add(2, 0, 100 * MIB)
    assert dropped == []
    passed.add(0, 20 * MIB, 40 * MIB)
    inode = file.stat().st_ino
    assert dropped == [(inode, 0, 40 * MIB)]
    passed.end()
    assert dropped[1:] == [(inode, 0, 200 * MIB + 5), (other.stat().st_ino, 0, 4)]


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


def large_models(folder, count):
    """Models of 18 MiB and more."""
    paths = []
    for seed in range(count):
        tensors = random_model(seed, torch.bfloat16)
        for part in "abc":
            tensors[f"large.{part}"] = torch.full((3 * MIB,), float(seed), dtype=torch.bfloat16)
        names = sorted(tensors)
        shards = [names[:-2], names[-2:]]
        paths.append(save_model(folder / str(seed), tensors, shards=shards))
    return {str(path): 1 / count for path in paths}


def whole_files(folder):
    """The weight files of a model, as they are dropped."""
    return {
        (path.stat().st_ino, 0, path.stat().st_size) for path in Path(folder).glob("*.safetensors")
    }


@pytest.mark.parametrize("io", ["pread", "mmap"])
def test_large_merge_is_dropped_behind_it(tmp_path, dropped, monkeypatch, io):
    """All of a large merge is dropped behind it."""
    models = large_models(tmp_path, 5)  # of which mmap maps three and reads two
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    monkeypatch.setattr(open_files, "MAX_OPEN_FILES", 2)
    for module in (page_cache, file_writer):
        monkeypatch.setattr(module, "DROPPED_AT_ONCE_NBYTES", 4 * MIB)
    report = shardmix.merge(models, tmp_path / "out", io=io)
    whole = {entry for model in models for entry in whole_files(model)}
    assert whole <= set(dropped)
    behind = [call for call in dropped if call not in whole | whole_files(report.output)]
    sources = {inode for inode, _, _ in whole}
    assert {inode for inode, _, _ in behind} <= sources
    # The smaller file of each is shorter than two pieces.
    assert len({inode for inode, _, _ in behind}) >= len(models)
    # The output: behind its writing, and once more when it is on the disk.
    for entry in whole_files(report.output):
        assert dropped.count(entry) >= 1 + (entry[2] > 8 * MIB)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "page cache   is left to other files"),
        (["--no-fsync"], "page cache   keeps only the output"),
    ],
)
def test_a_plan_tells_what_stays(tmp_path, monkeypatch, options, told):
    models = large_models(tmp_path, 2)
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    words = [f"{model}={weight}" for model, weight in models.items()]
    shown = CliRunner().invoke(app, ["plan", *words, *options])
    assert told in shown.stdout
    shown = CliRunner().invoke(app, ["plan", *words, *options, "--json"])
    report = json.loads(shown.stdout)
    assert (report["keeps_sources_cached"], report["keeps_output_cached"]) == (False, bool(options))


def test_unforced_output_stays(tmp_path, dropped, monkeypatch):
    """Output that is not forced to disk stays."""
    models = large_models(tmp_path, 2)
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    report = shardmix.merge(models, tmp_path / "out", fsync=False)
    assert dropped
    assert not whole_files(report.output) & set(dropped)


def test_a_merge_that_fits_drops_nothing(tmp_path, dropped, monkeypatch):
    models = large_models(tmp_path, 2)
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: GIB)
    report = shardmix.merge(models, tmp_path / "out", record_paths=True)
    assert shardmix.verify(report.output, recompute=True).is_verified
    assert dropped == []


def test_verifying_large_output_drops_reads(tmp_path, dropped, monkeypatch):
    """To verify a large output drops what it reads."""
    models = large_models(tmp_path, 2)
    report = shardmix.merge(models, tmp_path / "out", record_paths=True)
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    monkeypatch.setattr(page_cache, "DROPPED_AT_ONCE_NBYTES", 4 * MIB)
    assert shardmix.verify(report.output).is_verified
    assert whole_files(report.output) <= set(dropped)
    behind = set(dropped) - whole_files(report.output)
    assert behind
    dropped.clear()
    assert shardmix.verify(report.output, recompute=True).is_verified
    for folder in (*models, report.output):
        assert whole_files(folder) <= set(dropped)


def test_on_other_systems_nothing_is_called(tmp_path, file, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    passed = PassedRanges([file])
    passed.add(0, 0, 100 * MIB)
    passed.end()


@pytest.fixture
def models(tmp_path):
    """Two models on a disk whose files are cached, and can be dropped from there."""
    models = large_models(tmp_path, 2)
    probe = next(tmp_path.glob("0/*.safetensors"))
    with probe.open("rb") as file:
        os.fsync(file.fileno())
        if share_cached(probe) < 0.5:
            pytest.skip("on this file system files are not cached")
        page_cache.drop_pages(file.fileno(), 0, probe.stat().st_size)
        if share_cached(probe) > 0.1:
            pytest.skip("on this file system cached pages cannot be dropped")
    for path in tmp_path.glob("*/*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return models


def shares_cached(*folders):
    return [share_cached(path) for folder in folders for path in Path(folder).glob("*.safetensors")]


@pytest.mark.machine
@pytest.mark.parametrize("io", ["pread", "mmap"])
@pytest.mark.parametrize("backend", ["torch", "llvm"])
def test_large_merge_leaves_others_cache(tmp_path, models, monkeypatch, io, backend):
    """A merge larger than the cache leaves it to others."""
    monkeypatch.setattr(page_cache, "available_nbytes", lambda: 1)
    report = shardmix.merge(models, tmp_path / "out", io=io, backend=backend)
    assert max(shares_cached(*models, report.output)) < 0.1
    assert shardmix.verify(report.output).is_verified
    assert max(shares_cached(report.output)) < 0.1
