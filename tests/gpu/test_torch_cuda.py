"""Two chunks in flight on a GPU: on a simulated one, whose streams run in any order, and a real."""

import itertools
import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmix.compute.torch_cpu import TorchBackend
from shardmix.compute.torch_cuda import NUM_IN_FLIGHT, cuda_sums
from shardmix.errors import DeviceError, SourceError
from shardmix.plan.chunk_size import chunk_num_elements
from tests.support.combining import FLOATS, NAMES, raw_bytes, reduce, segment_of
from tests.support.models import random_tensor
from tests.support.sampling import examples
from tests.support.simulated_cuda import SimulatedCuda


def combined_in_flight(combiners, sources, weights, out_dtype, *, chunk_nbytes, mapped=False):
    """Reduce as the engine does, a chunk being read while those before it are still summed.

    `mapped`: sources come in memory that is gone as soon as a chunk has been queued.
    """
    segment = segment_of(
        [NAMES[s.dtype] for s in sources], NAMES[out_dtype], weights, sources[0].numel()
    )
    step = chunk_num_elements(segment, chunk_nbytes=chunk_nbytes)
    out, are_finite, in_flight = bytearray(), [], deque()

    def end(combiner, data):
        combiner.wait()
        out.extend(data)
        are_finite.append(combiner.is_finite)

    for start, combiner in zip(range(0, segment.num_elements, step), itertools.cycle(combiners)):
        num_elements = min(step, segment.num_elements - start)
        combiner.begin(segment, start, num_elements)
        views = []
        for source, tensor in enumerate(sources):
            raw = raw_bytes(tensor.view(-1)[start : start + num_elements])
            staging = combiner.staging(source)
            assert len(staging) == len(raw)
            if mapped:
                views.append(bytearray(raw))
                combiner.add(source, memoryview(views[-1]))
            else:
                staging[:] = raw
                combiner.add(source, staging)
        in_flight.append((combiner, combiner.finish()))
        for view in views:
            view[:] = b"\xff" * len(view)
        if len(in_flight) == len(combiners):
            end(*in_flight.popleft())
    while in_flight:
        end(*in_flight.popleft())
    return torch.frombuffer(out, dtype=out_dtype), are_finite


def simulated(seed, *, chunk_nbytes):
    cuda = SimulatedCuda(seed)
    return cuda, cuda_sums(torch.device("cpu"), chunk_nbytes=chunk_nbytes, cuda=cuda)


def sources_of(dtypes, num_elements, *, seed=0):
    return [random_tensor((num_elements,), dtype, seed=seed + i) for i, dtype in enumerate(dtypes)]


@settings(max_examples=examples(150), deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=5),
    out_dtype=st.sampled_from(FLOATS),
    num_elements=st.integers(1, 2000),
    chunk_nbytes=st.sampled_from([64, 1000, 4096]),
    mapped=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_stream_order_gives_cpu_bytes(
    dtypes, out_dtype, num_elements, chunk_nbytes, mapped, seed
):
    """In whatever order streams run, the bytes are the CPU's."""
    sources = sources_of(dtypes, num_elements, seed=seed)
    weights = [0.5, 0.3, 0.2, 0.1, -0.1][: len(sources)]
    _, combiners = simulated(seed, chunk_nbytes=chunk_nbytes)
    result, are_finite = combined_in_flight(
        combiners, sources, weights, out_dtype, chunk_nbytes=chunk_nbytes, mapped=mapped
    )
    assert raw_bytes(result) == raw_bytes(reduce(sources, weights, out_dtype))
    assert all(are_finite) == bool(result.isfinite().all())


def test_reading_overlaps_summing():
    """A chunk is read while the one before it is summed.

    The host gets ahead by more than one chunk's operations before it has to wait.
    """
    sources = sources_of([torch.bfloat16], 4000)

    def most_queued(num_chunks):
        most = 0
        for seed in range(20):
            cuda, combiners = simulated(seed, chunk_nbytes=4096)
            combined_in_flight(
                combiners,
                [source[: num_chunks * 1000] for source in sources],
                [1.0],
                torch.bfloat16,
                chunk_nbytes=4096,
            )
            most = max(most, cuda.most_queued)
        return most

    assert NUM_IN_FLIGHT == 2
    assert most_queued(2) > 1.5 * most_queued(1)


def test_chunk_tells_whether_it_is_finite():
    """Each chunk tells of itself whether it is finite."""
    source = torch.ones(1000)
    source[5], source[700] = math.nan, math.inf
    for seed in range(10):
        _, combiners = simulated(seed, chunk_nbytes=1024)
        _, are_finite = combined_in_flight(
            combiners, [source], [1.0], torch.float32, chunk_nbytes=1024
        )
        assert are_finite == [False, True, False, True]


def test_workers_are_dealt_to_all_devices():
    """Workers are dealt to all devices in turn."""
    backend = TorchBackend("cuda", num_visible=3)
    assert [backend.next_device().index for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [device.index for device in backend.devices] == [0, 1, 2]


def test_named_device_is_the_only_one():
    """A device that is named is the only one."""
    backend = TorchBackend("cuda:1", num_visible=3)
    assert [backend.next_device().index for _ in range(3)] == [1, 1, 1]
    assert TorchBackend("cpu").devices == ()


@pytest.fixture
def failed_gpu(monkeypatch):
    """A backend whose GPU no longer answers."""

    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return TorchBackend("cuda", num_visible=1)


def test_gpu_failing_at_work_says_what_to_do(failed_gpu):
    """A GPU that fails at work ends in an error that says what to do."""
    with pytest.raises(DeviceError) as caught, failed_gpu.running():
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")
    assert str(caught.value) == (
        "device cuda failed (CUDA out of memory. Tried to allocate 2 GiB); if it has too little "
        "memory left, lower --max-vram, or merge with --device cpu"
    )


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SourceError("a disk"), RuntimeError("a mistake of ours")]
)
def test_gpu_failing_at_exit_hides_no_error(failed_gpu, error):
    """A GPU that fails while it is left hides no other error."""
    with pytest.raises(type(error)) as caught, failed_gpu.running():
        raise error
    assert caught.value is error


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_two_chunks_in_flight_give_cpu_bytes(count, mapped, out_dtype):
    """Two chunks in flight on a GPU give the CPU's bytes."""
    sources = sources_of((FLOATS * 2)[:count], 300_007)
    sources[0][5000] = math.nan
    weights = [0.5, 0.3, 0.2, 0.1, -0.1][:count]
    for chunk_nbytes in (1 << 14, 1 << 18):
        result, _ = combined_in_flight(
            TorchBackend("cuda").make_combiners(chunk_nbytes=chunk_nbytes),
            sources,
            weights,
            out_dtype,
            chunk_nbytes=chunk_nbytes,
            mapped=mapped,
        )
        assert raw_bytes(result) == raw_bytes(reduce(sources, weights, out_dtype))
