"""Whole merges on GPUs, simulated and real: the CPU's bytes, within the memory of each GPU."""

import contextlib
import itertools
import math
from pathlib import Path

import pytest
import torch

import shardmix
from shardmix.compute.torch_cuda import cuda_sums
from shardmix.execute import prepare
from shardmix.system.units import MIB
from tests.support.models import random_tensor, save_model
from tests.support.simulated_cuda import SimulatedCuda

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def models_of(folder, count, *, dtypes=(torch.bfloat16,), num_elements=1_500_001):
    """Save models of two shards: tensors of every dtype, of odd sizes, NaN, Inf and integers."""
    paths = []
    for number in range(count):
        tensors = {
            f"layers.{place}.weight": random_tensor((num_elements + place,), dtype, seed=number)
            for place, dtype in enumerate(dtypes)
        }
        tensors["embedding"] = random_tensor((1237, 89), dtypes[number % len(dtypes)], seed=number)
        tensors["scale"] = torch.full((), 1.5)
        tensors["ids"] = torch.arange(50_000) + (number == 2)
        tensors["embedding"].view(-1)[7 + number] = math.nan
        tensors["layers.0.weight"][num_elements // 2] = math.inf
        names = sorted(tensors)
        shards = [names[:2], names[2:]]
        paths.append(save_model(folder / f"source{number}", tensors, shards=shards))
    return [(path, 1 / count) for path in paths]


def weights_of(report):
    return {shard.name: Path(report.output, shard.name).read_bytes() for shard in report.shards}


def assert_the_cpus(report, on_cpu):
    assert (report.device, on_cpu.device) == ("cuda", "cpu")
    assert weights_of(report) == weights_of(on_cpu)
    assert report.nonfinite == on_cpu.nonfinite
    assert report.warnings == on_cpu.warnings
    assert len(report.nonfinite) == 2
    assert any("ids" in warning for warning in report.warnings) == (report.num_models > 2)


class SimulatedBackend:
    """GPUs that run what is queued when chance wants it, each worker's by a seed of its own."""

    def __init__(self):
        self._seeds = itertools.count()

    def make_combiners(self, *, chunk_nbytes):
        cuda = SimulatedCuda(next(self._seeds))
        return cuda_sums(torch.device("cpu"), chunk_nbytes=chunk_nbytes, cuda=cuda)

    def finding(self):
        return None

    def running(self):
        return contextlib.nullcontext()

    def peak_vram_nbytes(self):
        return 0


@pytest.fixture
def simulated(monkeypatch):
    real = prepare.load_backend
    monkeypatch.setattr(
        prepare,
        "load_backend",
        lambda plan: SimulatedBackend() if plan.settings.on_cuda else real(plan),
    )


@pytest.mark.parametrize("io", ["pread", "mmap"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_chunks_in_flight_write_cpu_bytes(tmp_path, simulated, count, io):
    """A merge with chunks in flight writes the CPU's bytes."""
    models = models_of(tmp_path, count, dtypes=(torch.bfloat16, torch.float32))
    on_cpu = shardmix.merge(models, tmp_path / "cpu", device="cpu")
    options = {"device": "cuda", "io": io, "workers": 2, "max_vram": 8 * MIB}
    on_gpu = shardmix.merge(models, tmp_path / "gpu", **options)
    assert on_gpu.strip_bytes <= MIB // 8
    assert_the_cpus(on_gpu, on_cpu)
    assert shardmix.verify(tmp_path / "gpu").is_verified


@pytest.mark.parametrize("max_vram", [8 * MIB, 200 * MIB], ids=["parts of bands", "bands"])
def test_quantised_outputs_are_the_cpus(tmp_path, simulated, max_vram):
    """Codes of chunks in flight, and of bands that are larger than a chunk."""
    models = []
    for number in range(2):
        tensors = {
            f"layers.{layer}.q_proj.weight": random_tensor((900, 3000), torch.bfloat16, seed=number)
            for layer in range(3)
        }
        tensors["layers.1.q_proj.weight"][800, 7 + number] = math.nan
        tensors["norm"] = random_tensor((70_000,), torch.bfloat16, seed=number)
        models.append((save_model(tmp_path / f"m{number}", tensors), 0.5))
    options = {"quantize": "fp8-blocks"}
    on_cpu = shardmix.merge(models, tmp_path / "cpu", device="cpu", **options)
    options |= {"device": "cuda", "workers": 2, "max_vram": max_vram}
    on_gpu = shardmix.merge(models, tmp_path / "gpu", **options)
    assert on_gpu.device == "cuda"
    assert weights_of(on_gpu) == weights_of(on_cpu)
    assert on_gpu.nonfinite == on_cpu.nonfinite != ()


def test_merge_cut_off_in_flight_resumes(tmp_path, simulated, monkeypatch):
    """A merge that was cut off in flight goes on."""
    models = models_of(tmp_path, 2, dtypes=(torch.float32,), num_elements=6_000_001)
    on_cpu = shardmix.merge(models, tmp_path / "cpu", device="cpu")
    options = {"device": "cuda", "workers": 2, "max_vram": 64 * MIB, "output": tmp_path / "gpu"}
    half = on_cpu.bytes_read // 2

    def interrupt(event):
        if event.num_bytes_done > half:
            raise KeyboardInterrupt

    monkeypatch.setattr("shardmix.execute.thread_executor.WAIT_SECONDS", 0.001)
    with pytest.raises(KeyboardInterrupt, match="are done and kept"):
        shardmix.merge(models, on_progress=interrupt, **options)
    report = shardmix.merge(models, **options)
    assert report.bytes_kept > 0
    assert_the_cpus(report, on_cpu)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("io", ["pread", "mmap"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_gpu_merge_keeps_bytes_and_memory(tmp_path, count, io):
    """A merge on a GPU writes the CPU's bytes, within its memory."""
    models = models_of(tmp_path, count, dtypes=DTYPES)
    on_cpu = shardmix.merge(models, tmp_path / "cpu", device="cpu")
    for budget in (8 * MIB, 100 * MIB, None):
        options = {"device": "cuda:0", "io": io, "max_vram": budget, "overwrite": True}
        plan = shardmix.plan_merge(models, tmp_path / "gpu", **options)
        on_gpu = shardmix.merge(models, tmp_path / "gpu", **options)
        assert 0 < on_gpu.peak_vram_bytes <= plan.memory.projected_vram_nbytes
        assert budget is None or plan.memory.projected_vram_nbytes <= budget
        assert weights_of(on_gpu) == weights_of(on_cpu)
        assert on_gpu.nonfinite == on_cpu.nonfinite


@pytest.mark.gpu
@needs_gpus
def test_several_gpus_write_the_cpus_bytes(tmp_path):
    """Several GPUs share a merge and write the CPU's bytes."""
    models = models_of(tmp_path, 3, dtypes=DTYPES)
    on_cpu = shardmix.merge(models, tmp_path / "cpu", device="cpu")
    count = torch.cuda.device_count()
    options = {"device": "cuda", "workers": 2 * count, "max_vram": 100 * MIB}
    on_gpus = shardmix.merge(models, tmp_path / "gpus", **options)
    assert_the_cpus(on_gpus, on_cpu)
    assert on_gpus.peak_vram_bytes <= 100 * MIB
    assert all(torch.cuda.max_memory_reserved(number) > 0 for number in range(count))


@pytest.mark.gpu
@needs_gpu
def test_auto_measures_and_writes_same_bytes(tmp_path, monkeypatch):
    """Auto measures GPU and CPU, and writes the same bytes."""
    monkeypatch.setattr("shardmix.plan.backend_choice.MEASURED_FROM_NBYTES", 1)
    models = models_of(tmp_path, 3)
    on_cpu = shardmix.merge(models, tmp_path / "cpu", device="cpu")
    report = shardmix.merge(models, tmp_path / "auto", max_vram=2048 * MIB)
    assert any(f"device {report.device}: " in warning for warning in report.warnings)
    assert any(warning.endswith(", measured") for warning in report.warnings)
    assert weights_of(report) == weights_of(on_cpu)
    assert report.peak_vram_bytes <= 2048 * MIB
