"""Which device a merge takes: counted, assumed by the plan, measured when the merge begins."""

import contextlib
import dataclasses
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch

import shardmix
from shardmix.compute.backend import load_backend
from shardmix.compute.torch_cpu import CpuSum
from shardmix.compute.torch_cuda import cuda_sums
from shardmix.execute import calibrate_pass, prepare
from shardmix.execute.calibrate_pass import faster, source_bytes_per_second
from shardmix.execute.tasks import merge_tasks
from shardmix.options import RunSettings
from shardmix.plan import backend_choice, memory_budget
from shardmix.plan.memory_budget import (
    BEST_CHUNK_NBYTES,
    BUFFERS_PER_WORKER,
    plan_memory,
    reserved_nbytes,
)
from shardmix.system import gpus
from shardmix.system.hashing import LEAF_NBYTES
from shardmix.system.units import MIB
from tests.plan.test_planner import all_segments, two_models
from tests.support.models import save_model
from tests.support.sampling import sample
from tests.support.simulated_cuda import SimulatedCuda


def memory_of(settings):
    return plan_memory(settings, num_tensors=0)


def gpu_machine(monkeypatch, *, measured_from=1):
    """Make a machine with GPUs of this one, where already small merges are worth measuring."""
    monkeypatch.setattr(gpus, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(gpus, "torch_has_cuda_build", lambda: True)
    monkeypatch.setattr(backend_choice, "MEASURED_FROM_NBYTES", measured_from)


def test_unasked_gpu_is_assumed_at_first(tmp_path, monkeypatch):
    """A GPU that nobody asked for is assumed until it is measured."""
    gpu_machine(monkeypatch)
    plan = shardmix.plan_merge(two_models(tmp_path), max_vram="1GiB")
    assert (plan.settings.device, plan.settings.backend) == ("cuda", "torch")
    assert plan.settings.is_device_open
    assert 0 < plan.memory.projected_vram_nbytes <= 2**30
    report = shardmix.report_plan(plan)
    assert any("the device is assumed" in warning for warning in report.warnings)
    assert plan.digest() == shardmix.plan_merge(two_models(tmp_path), device="cpu").digest()


def test_requested_gpu_is_not_in_question(tmp_path, monkeypatch):
    """A GPU that was asked for is not in question."""
    gpu_machine(monkeypatch)
    for device in ("cuda", "cuda:1"):
        plan = shardmix.plan_merge(two_models(tmp_path), device=device)
        assert (plan.settings.device, plan.settings.is_device_open) == (device, False)
        assert shardmix.report_plan(plan).warnings == plan.warnings


def test_small_merge_takes_the_cpu(tmp_path, monkeypatch):
    """A merge too small to gain by a GPU takes the CPU."""
    models = two_models(tmp_path)
    summed = sum(
        run.num_elements * 4 * len(run.dtypes) for run in all_segments(shardmix.plan_merge(models))
    )
    gpu_machine(monkeypatch, measured_from=summed + 1)
    plan = shardmix.plan_merge(models)
    assert (plan.settings.device, plan.settings.is_device_open) == ("cpu", False)
    gpu_machine(monkeypatch, measured_from=summed)
    assert shardmix.plan_merge(models).settings.is_device_open


def test_integers_are_no_reason_for_a_gpu(tmp_path, monkeypatch):
    """Integers are compared on the CPU, and are no reason for a GPU."""
    gpu_machine(monkeypatch)
    for name in "ab":
        save_model(tmp_path / name, {"ids": torch.arange(1000)})
    plan = shardmix.plan_merge({tmp_path / "a": 0.5, tmp_path / "b": 0.5})
    assert plan.settings.device == "cpu"


def test_who_asks_for_kernels_gets_the_cpu(tmp_path, monkeypatch):
    pytest.importorskip("llvmlite", reason="needs llvmlite")
    gpu_machine(monkeypatch)
    plan = shardmix.plan_merge(two_models(tmp_path), backend="llvm")
    assert (plan.settings.device, plan.settings.backend) == ("cpu", "llvm")


def test_open_plan_projects_the_larger(monkeypatch):
    """An open plan projects whichever takes more."""
    gpu_machine(monkeypatch)
    is_open = {"device": "cuda", "backend": "torch", "is_device_open": True}
    roomy = memory_of(RunSettings(**is_open, workers=4))
    on_gpu = memory_of(RunSettings(device="cuda", backend="torch", workers=4))
    assert roomy.chunk_nbytes == on_gpu.chunk_nbytes == BEST_CHUNK_NBYTES["cuda"]
    assert roomy.projected_peak_nbytes >= on_gpu.projected_peak_nbytes
    # So little GPU memory that there the chunks are the smaller ones.
    tight = {"workers": 4, "max_vram_nbytes": 4 * 4 * MIB}
    on_gpu = memory_of(RunSettings(device="cuda", backend="torch", **tight))
    on_cpu = memory_of(RunSettings(device="cpu", backend="torch", **tight))
    both = memory_of(RunSettings(**is_open, **tight))
    assert both.chunk_nbytes == on_gpu.chunk_nbytes < on_cpu.chunk_nbytes
    buffers = 4 * BUFFERS_PER_WORKER * (on_cpu.chunk_nbytes - on_gpu.chunk_nbytes)
    assert both.projected_peak_nbytes - on_gpu.projected_peak_nbytes >= buffers - 4 * MIB


def test_tasks_last_several_chunks_on_a_gpu(tmp_path, monkeypatch):
    gpu_machine(monkeypatch)
    plan = shardmix.plan_merge(two_models(tmp_path), device="cuda")
    shard = dataclasses.replace(plan.shards[0], file_nbytes=2**30)
    plan = dataclasses.replace(plan, shards=(shard,))
    first = merge_tasks(plan)[0]
    assert (first.stop_leaf - first.first_leaf) * LEAF_NBYTES == 4 * plan.memory.chunk_nbytes


def test_small_budget_keeps_to_the_cpu(tmp_path, monkeypatch):
    """A budget too small for a GPU is kept on the CPU."""
    gpu_machine(monkeypatch)
    models = two_models(tmp_path)
    budget = reserved_nbytes("llvm") + 400 * MIB
    plan = shardmix.plan_merge(models, max_memory=budget)
    assert plan.settings.device == "cpu"
    assert any("on the CPU" in warning for warning in plan.warnings)
    with pytest.raises(shardmix.BudgetError):
        shardmix.plan_merge(models, max_memory=budget, device="cuda")


@pytest.fixture
def driver(tmp_path):
    """What an NVIDIA driver tells in /proc of three GPUs."""
    (tmp_path / "version").touch()
    for number in range(3):
        (tmp_path / "gpus" / f"0000:0{number}:00.0").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        *(("", 0), ("-1", 0), ("0", 1), ("2,0", 2), ("0,1,2", 3), ("0, 1", 2), ("0,3,1", 1)),
        *(("9", 0), ("GPU-5ebe9f43,GPU-6f5c", 2), ("0,-1,1", 1), ("MIG-1", 1)),
    ],
)
def test_gpus_are_counted_without_torch(driver, visible, count):
    """GPUs are counted without torch, as CUDA shows them."""
    assert gpus.cuda_device_count(driver, visible) == count


def test_no_list_is_one_gpu_no_driver_none(driver, monkeypatch):
    """Without a list there is one GPU, and without a driver none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.cuda_device_count(driver) == 3
    assert gpus.cuda_device_count(driver / "nowhere") == 0
    shutil.rmtree(driver / "gpus")
    assert gpus.cuda_device_count(driver) == 1


class FakeGpu:
    """A backend in the place of a GPU's: the CPU's sums, or a simulated GPU's."""

    def __init__(self, make=lambda nbytes: (CpuSum(chunk_nbytes=nbytes),), *, flaw=None):
        self._make, self._flaw = make, flaw
        self.chunks_nbytes = []

    def make_combiners(self, *, chunk_nbytes):
        self.chunks_nbytes.append(chunk_nbytes)
        if self._flaw is not None:
            raise self._flaw
        return self._make(chunk_nbytes)

    def finding(self):
        return None

    def running(self):
        return contextlib.nullcontext()

    def peak_vram_nbytes(self):
        return 7


class SlowSum(CpuSum):
    """Does the same hundred times."""

    def finish(self):
        for _ in range(100):
            super().finish()
        return super().finish()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that reckons as the CPU does; trials on it are short."""
    gpu_machine(monkeypatch)
    fake = FakeGpu()
    real = prepare.load_backend
    monkeypatch.setattr(
        prepare, "load_backend", lambda plan: fake if plan.settings.on_cuda else real(plan)
    )
    monkeypatch.setattr(calibrate_pass, "TRIAL_SECONDS", 0.05)
    monkeypatch.setattr(calibrate_pass, "SOURCE_NBYTES", 4 * MIB)
    return fake


def measured(monkeypatch, **rates):
    def rate(plan, backend):
        assert not plan.settings.is_device_open
        return rates[plan.settings.device]

    monkeypatch.setattr(calibrate_pass, "source_bytes_per_second", rate)


def weights_of(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def test_faster_device_is_taken_with_reason(tmp_path, monkeypatch, gpu):
    """The faster device is taken, and the report says why."""
    models = two_models(tmp_path)
    measured(monkeypatch, cpu=41.2e9, cuda=23e9)
    on_cpu = shardmix.merge(models, tmp_path / "1")
    assert on_cpu.device == "cpu"
    note = "device cpu: 41.2 GB/s of source bytes, cuda 23.0 GB/s, measured"
    assert on_cpu.warnings == (note,)
    assert not gpu.chunks_nbytes
    measured(monkeypatch, cpu=5e9, cuda=50e9)
    on_gpu = shardmix.merge(models, tmp_path / "2")
    assert (on_gpu.device, on_gpu.backend, on_gpu.peak_vram_bytes) == ("cuda", "torch", 7)
    note = "device cuda: 50.0 GB/s of source bytes, cpu 5.0 GB/s, measured"
    assert on_gpu.warnings == (note,)
    assert set(gpu.chunks_nbytes) == {on_gpu.strip_bytes}
    assert weights_of(on_cpu.output) == weights_of(on_gpu.output)


def test_trials_keep_the_projected_peak(tmp_path, monkeypatch, gpu):
    """What was measured is within the projected peak."""
    measured(monkeypatch, cpu=2e9, cuda=1e9)
    models = two_models(tmp_path)
    report = shardmix.merge(models, tmp_path / "out", max_memory="8GiB", workers=3)
    trial = 3 * BUFFERS_PER_WORKER * BEST_CHUNK_NBYTES["cuda"]
    assert report.strip_bytes < BEST_CHUNK_NBYTES["cuda"]
    assert trial < report.projected_peak_bytes <= 8 * 2**30


def test_named_device_is_not_measured(tmp_path, monkeypatch, gpu):
    """A device that is named is not measured."""
    measured(monkeypatch)
    for device in ("cpu", "cuda"):
        report = shardmix.merge(two_models(tmp_path), tmp_path / device, device=device)
        assert (report.device, report.warnings) == (device, ())


@pytest.mark.parametrize("is_named", [False, True])
def test_gpu_that_fails_its_trial_is_dropped(tmp_path, gpu, is_named):
    """A GPU that fails when it is tried is not taken."""
    gpu._flaw = RuntimeError("CUDA out of memory.\nTried to allocate")
    if is_named:
        gpu._flaw, cause = shardmix.DeviceError("device cuda failed"), gpu._flaw
        gpu._flaw.__cause__ = cause
    report = shardmix.merge(two_models(tmp_path), tmp_path / "out")
    assert report.device == "cpu"
    assert report.warnings == (
        "device cpu: cuda failed when it was tried (CUDA out of memory. Tried to allocate)",
    )


def test_failure_keeps_no_buffers(tmp_path, gpu):
    """What fails keeps none of its buffers.

    Else the GPU's and pinned memory would be held for as long as the error is.
    """
    made = []

    class Failing(CpuSum):
        def finish(self):
            raise RuntimeError("CUDA error")

    def make(nbytes):
        combiner = Failing(chunk_nbytes=nbytes)
        made.append(weakref.ref(combiner))
        return (combiner,)

    gpu._make = make
    with pytest.raises(RuntimeError) as caught:
        shardmix.merge(two_models(tmp_path), tmp_path / "out", device="cuda", workers=2)
    assert caught.traceback
    assert made
    assert not any(combiner() for combiner in made)


def test_unusable_gpu_falls_back_unmeasured(tmp_path, monkeypatch):
    """A GPU that cannot be used falls back to the CPU, unmeasured."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    gpu_machine(monkeypatch)
    measured(monkeypatch)
    report = shardmix.merge(two_models(tmp_path), tmp_path / "out")
    assert report.device == "cpu"
    assert len(report.warnings) == 1
    assert "no usable CUDA device" in report.warnings[0]
    assert "merged with device cpu instead" in report.warnings[0]


def test_recomputing_measures_as_well(tmp_path, monkeypatch, gpu):
    models = two_models(tmp_path)
    measured(monkeypatch, cpu=1e9, cuda=2e9)
    shardmix.merge(models, tmp_path / "out", device="cpu")
    assert not gpu.chunks_nbytes
    places = {path.name: path for path, _ in models}
    assert shardmix.verify(tmp_path / "out", recompute=True, sources=places).is_verified
    assert gpu.chunks_nbytes


@pytest.mark.parametrize(
    ("io", "dtype"),
    sample("trials", [(io, it) for io in ("pread", "mmap") for it in ("keep", "bfloat16")], 2),
)
def test_a_trial_does_what_the_merge_will_do(tmp_path, monkeypatch, gpu, io, dtype):
    """Of most of the merge: in its dtypes, of as many sources, with all its workers."""
    small = {"s": torch.ones(10, dtype=torch.float64), "large": torch.ones(1000).half()}
    for name in "abc":
        save_model(tmp_path / name, small)
    models = {tmp_path / "a": 0.5, tmp_path / "b": 0.3, tmp_path / "c": 0.2}
    plan = shardmix.plan_merge(models, device="cpu", backend="torch", io=io, dtype=dtype, workers=3)
    begun = []

    class Watched(CpuSum):
        def begin(self, run, start, num_elements):
            begun.append(run)
            super().begin(run, start, num_elements)

    backend = FakeGpu(lambda nbytes: (Watched(chunk_nbytes=nbytes),))
    descriptors = len(os.listdir("/proc/self/fd"))
    assert source_bytes_per_second(plan, backend) > 0
    assert len(backend.chunks_nbytes) == 3
    out_dtype = "F16" if dtype == "keep" else "BF16"
    assert {(run.dtypes, run.out_dtype) for run in begun} == {(("F16",) * 3, out_dtype)}
    assert {run.factors for run in begun} == {(0.5, 0.3, 0.2)}
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_trial_tells_slow_from_fast(tmp_path, gpu):
    """A trial tells a slow device from a fast one."""
    plan = shardmix.plan_merge(two_models(tmp_path), device="cpu", backend="torch", workers=2)
    slow = FakeGpu(lambda nbytes: (SlowSum(chunk_nbytes=nbytes),))
    cpu = plan, load_backend(plan)
    as_gpu = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, device="cuda"))
    chosen, note = faster(cpu, (as_gpu, slow))
    assert chosen is cpu
    assert note.startswith("device cpu: ")


def test_trial_keeps_two_chunks_in_flight(tmp_path, gpu):
    """A trial keeps two chunks in flight if the device does."""
    plan = shardmix.plan_merge(two_models(tmp_path), device="cpu", backend="torch", workers=2)
    simulated = FakeGpu(
        lambda nbytes: cuda_sums(
            torch.device("cpu"), chunk_nbytes=nbytes, cuda=SimulatedCuda(nbytes)
        )
    )
    assert source_bytes_per_second(plan, simulated) > 0


def test_an_open_plan_counts_both_libraries(monkeypatch):
    """Both devices are tried in one process."""
    gpu_machine(monkeypatch)
    asked = []
    monkeypatch.setattr(
        memory_budget, "reserved_nbytes", lambda *libraries, **_: asked.append(libraries) or 0
    )
    memory_of(RunSettings(device="cuda", backend="torch", is_device_open=True))
    memory_of(RunSettings(device="cpu", backend="llvm"))
    assert asked == [("torch", "llvm"), ("llvm",)]
