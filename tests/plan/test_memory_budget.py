from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmix.errors import BudgetError
from shardmix.plan import memory_budget
from shardmix.plan.memory_budget import (
    BUFFERS_PER_WORKER,
    LEAST_CHUNK_NBYTES,
    VRAM_BUFFERS_PER_WORKER,
    VramUse,
    default_workers,
    fit_memory,
    reserved_nbytes,
)
from shardmix.system.units import MIB, parse_size

BEST_CHUNK = 2 * MIB
RESERVED = 211 * MIB  # a prime number of MiB, so that every term shows


def test_unbounded_chunk_is_what_speed_needs():
    """Without a budget, a chunk is what speed needs."""
    fitted = fit_memory(reserved=RESERVED, best_chunk=BEST_CHUNK, workers=3)
    assert (fitted.workers, fitted.chunk_nbytes) == (3, BEST_CHUNK)
    assert fitted.projected_peak_nbytes >= RESERVED + 3 * BUFFERS_PER_WORKER * BEST_CHUNK
    assert fitted.projected_vram_nbytes == 0


@given(
    budget=st.integers(200, 700).map(lambda mib: mib * MIB),
    workers=st.none() | st.integers(1, 8),
    num_devices=st.integers(0, 3),
    max_vram=st.none() | st.integers(1, 2000).map(lambda mib: mib * MIB),
)
def test_plan_keeps_a_budget_or_is_refused(budget, workers, num_devices, max_vram):
    """A plan keeps every budget, or is refused."""
    options = {
        "reserved": RESERVED,
        "best_chunk": BEST_CHUNK,
        "num_devices": num_devices,
        "workers": workers,
    }
    try:
        fitted = fit_memory(**options, max_memory=budget, max_vram=max_vram)
    except BudgetError:
        return
    assert RESERVED < fitted.projected_peak_nbytes <= budget
    assert fitted.chunk_nbytes >= LEAST_CHUNK_NBYTES
    if workers is not None:
        assert fitted.workers == workers
    if num_devices and max_vram is not None:
        assert 0 < fitted.projected_vram_nbytes <= max_vram


@pytest.mark.parametrize("workers", [None, 1, 5])
@pytest.mark.parametrize("num_devices", [0, 1, 3])
def test_least_budget_in_an_error_is_enough(workers, num_devices):
    """The least budget that an error names is enough."""
    options = {
        "reserved": RESERVED,
        "best_chunk": BEST_CHUNK,
        "num_devices": num_devices,
        "workers": workers,
    }
    with pytest.raises(BudgetError) as caught:
        fit_memory(**options, max_memory=MIB)
    least = str(caught.value).split("least that works here is ")[1].split(" ")[0]
    fitted = fit_memory(**options, max_memory=parse_size(least))
    assert fitted.projected_peak_nbytes <= parse_size(least)
    # A process may hold a little more the next time; of that there is some in what is named.
    fit_memory(**{**options, "reserved": RESERVED + 3 * MIB}, max_memory=parse_size(least))
    with pytest.raises(BudgetError):
        fit_memory(**options, max_memory=parse_size(least) - 5 * MIB)


def test_too_little_vram_is_named_as_such():
    with pytest.raises(BudgetError, match="--max-vram 1MiB"):
        fit_memory(
            reserved=RESERVED,
            best_chunk=BEST_CHUNK,
            num_devices=1,
            max_memory=2048 * MIB,
            max_vram=MIB,
        )


def test_max_vram_is_each_gpus():
    """max_vram is each GPU's, and workers are shared among them."""
    options = {"reserved": RESERVED, "best_chunk": 32 * MIB, "workers": 5}
    alone, *others = (fit_memory(**options, num_devices=count) for count in (1, 2, 3, 7))
    each = -(-VRAM_BUFFERS_PER_WORKER * 32 // 20) * 20 * MIB + 2 * MIB
    assert alone.projected_vram_nbytes == 5 * each
    assert [other.projected_vram_nbytes for other in others] == [3 * each, 2 * each, each]
    for other in others:
        assert other.projected_peak_nbytes == alone.projected_peak_nbytes
    shared = fit_memory(**options, num_devices=2, max_vram=3 * each)
    assert shared.chunk_nbytes == 32 * MIB
    assert fit_memory(**options, num_devices=1, max_vram=3 * each).chunk_nbytes < 32 * MIB


def test_vram_that_is_held_already_counts():
    options = {"reserved": RESERVED, "best_chunk": 32 * MIB, "workers": 2}
    alone = fit_memory(**options, num_devices=1).projected_vram_nbytes
    options["vram"] = VramUse(held_nbytes=50 * MIB)
    assert fit_memory(**options, num_devices=1).projected_vram_nbytes == alone + 50 * MIB
    assert fit_memory(**options).projected_vram_nbytes == 0
    assert fit_memory(**options, num_devices=1, max_vram=alone).chunk_nbytes < 32 * MIB
    with pytest.raises(BudgetError, match="50MiB of it held already"):
        fit_memory(**options, num_devices=1, max_vram=52 * MIB)


def test_gpus_free_memory_is_shared():
    """Without a budget, a GPU's memory is shared with others."""
    options = {"reserved": RESERVED, "best_chunk": 32 * MIB, "num_devices": 1}
    roomy = fit_memory(**options, vram=VramUse(0, 64 * 1024 * MIB))
    assert roomy == fit_memory(**options)
    used = VramUse(held_nbytes=10 * MIB, spare_nbytes=100 * MIB)
    tight = fit_memory(**options, vram=used)
    assert tight.projected_vram_nbytes <= 110 * MIB
    assert tight == fit_memory(**options, vram=used, max_vram=110 * MIB)
    with pytest.raises(BudgetError, match=r"GPU to be had: 1MiB: too small.*use --device cpu"):
        fit_memory(**options, vram=VramUse(0, MIB))


def test_every_gpu_has_two_workers_at_least(monkeypatch):
    monkeypatch.setattr(memory_budget, "num_cores", lambda: 4)
    assert [default_workers(num_devices=count) for count in (0, 1, 2, 3, 8)] == [4, 4, 4, 6, 16]
    monkeypatch.setattr(memory_budget, "num_cores", lambda: 64)
    assert [default_workers(num_devices=count) for count in (0, 1, 8)] == [8, 8, 16]


def test_tight_budget_shrinks_chunks_first():
    """A tight budget shrinks the chunk before it takes workers away."""
    roomy = fit_memory(reserved=RESERVED, best_chunk=BEST_CHUNK, max_memory=RESERVED + 400 * MIB)
    tight = fit_memory(reserved=RESERVED, best_chunk=BEST_CHUNK, max_memory=RESERVED + 12 * MIB)
    assert roomy.chunk_nbytes == BEST_CHUNK
    assert tight.chunk_nbytes < roomy.chunk_nbytes


def test_the_chunk_shrinks_last(monkeypatch):
    """One worker with an eighth of the best chunk comes before any smaller chunk."""
    fitted = {}
    for mib in range(1, 60):
        try:
            plan = fit_memory(
                reserved=RESERVED, best_chunk=8 * MIB, max_memory=RESERVED + mib * MIB
            )
        except BudgetError:
            continue
        fitted.setdefault(plan.workers, set()).add(plan.chunk_nbytes)
    assert MIB in fitted[1]
    assert all(chunks == {MIB} for workers, chunks in fitted.items() if 1 < workers < max(fitted))


def test_workers_that_were_asked_for_stay():
    """Too little memory for them is an error, though it would do for fewer."""
    options = {"reserved": RESERVED, "best_chunk": BEST_CHUNK}
    budget = fit_memory(**options, workers=1).projected_peak_nbytes
    assert fit_memory(**options, max_memory=budget).workers >= 1
    with pytest.raises(BudgetError, match="fewer than 64 workers"):
        fit_memory(**options, workers=64, max_memory=budget)


def test_what_is_held_is_no_less_to_spare():
    """The bound is what torch holds and what the GPU has beside that."""
    options = {"reserved": RESERVED, "best_chunk": 16 * MIB, "num_devices": 1, "workers": 2}
    whole = fit_memory(**options)
    used = VramUse(held_nbytes=500 * MIB, spare_nbytes=whole.projected_vram_nbytes)
    assert fit_memory(**options, vram=used).chunk_nbytes == 16 * MIB


@pytest.fixture
def reserved(monkeypatch):
    """Return what is reserved beyond what the process holds, with no library loaded."""
    monkeypatch.setattr(memory_budget, "resident_nbytes", lambda: 0)
    monkeypatch.setattr(memory_budget, "torch_has_cuda_build", lambda: False)
    monkeypatch.setattr(memory_budget, "cuda_in_use", lambda: None)
    loaded = {}
    monkeypatch.setattr(memory_budget, "sys", SimpleNamespace(modules=loaded))
    nothing = reserved_nbytes()

    def beyond(*libraries, load=(), **counts):
        loaded.clear()
        loaded.update(dict.fromkeys(load))
        return reserved_nbytes(*libraries, **counts) - nothing

    return beyond


def test_loaded_libraries_count_once(reserved):
    """Libraries that are loaded count once.

    They are part of what the process holds; others are estimated, each of them.
    """
    assert reserved("torch") == 200 * MIB
    assert reserved("llvm") == 80 * MIB
    assert reserved("torch", "llvm") == 280 * MIB
    assert reserved("torch", "llvm", load=["torch"]) == 80 * MIB
    assert reserved("torch", "llvm", load=["torch", "llvmlite"]) == 0


def test_gpu_contexts_count_until_present(reserved, monkeypatch):
    """Contexts of GPUs count until they are there. 600 MiB for the first, 200 for each other."""
    assert [reserved(num_devices=count) for count in (0, 1, 3)] == [0, 600 * MIB, 1000 * MIB]
    monkeypatch.setattr(memory_budget, "cuda_in_use", lambda: "torch.cuda")
    assert reserved(num_devices=3) == 0


def test_tensors_that_may_hold_nan_count(reserved):
    assert reserved(num_tensors=50_000) == 128 * 50_000
