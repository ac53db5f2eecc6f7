"""Merges as a library call: the bytes, the events, and what is left when one is cut off."""

import dataclasses
import json
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardmix
from shardmix.anomalies import LeafAnomalies
from shardmix.compute.backend import load_backend
from shardmix.errors import OutputError, SourceError
from shardmix.execute.executor import Task, TaskResult
from shardmix.execute.merge import Tally, execute_plan
from shardmix.execute.write_pass import Written
from shardmix.output.journal import open_journal
from shardmix.output.shard_writer import GrowingLeaves
from shardmix.output.staging import open_staging
from shardmix.plan.merge_plan import OutputShard
from shardmix.sources.readers import PreadReader
from tests.support.models import (
    assert_same_bits,
    load_model,
    random_model,
    random_tensor,
    save_model,
    weighted_sum,
)
from tests.support.sampling import examples

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WEIGHTS = [0.5, 0.3, 0.2]


def three_models(tmp_path, dtypes=(torch.float32,) * 3):
    return [
        (save_model(tmp_path / f"m{seed}", random_model(seed, dtype)), weight)
        for seed, (dtype, weight) in enumerate(zip(dtypes, WEIGHTS, strict=True))
    ]


def oracle(models, out_dtype=None):
    loaded = [load_model(folder) for folder, _ in models]
    return {
        name: weighted_sum(
            [tensors[name] for tensors in loaded],
            [weight for _, weight in models],
            out_dtype or loaded[0][name].dtype,
        )
        for name in loaded[0]
    }


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_shard_is_save_files_bytes(tmp_path, dtype):
    """One shard is what save_file writes, byte for byte."""
    models = three_models(tmp_path, (dtype,) * 3)
    shardmix.merge(models, tmp_path / "out")
    save_file(oracle(models), tmp_path / "oracle.safetensors", metadata={"format": "pt"})
    merged = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert merged == (tmp_path / "oracle.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_output_dtype_is_rounded_to_once(tmp_path, dtype):
    models = three_models(tmp_path, (torch.float64, torch.bfloat16, torch.float32))
    shardmix.merge(models, tmp_path / "out", dtype=dtype)
    assert_same_bits(load_model(tmp_path / "out"), oracle(models, getattr(torch, dtype)))


def test_a_report_tells_what_was_done(tmp_path):
    models = three_models(tmp_path)
    report = shardmix.merge(models, tmp_path / "out", workers=2)
    file = tmp_path / "out" / "model.safetensors"
    assert report.output == str(tmp_path / "out")
    assert (report.num_models, report.num_tensors) == (3, len(random_model(0)))
    assert report.weights == tuple(WEIGHTS)
    assert report.bytes_written == file.stat().st_size
    assert report.bytes_read == 3 * sum(t.numel() * 4 for t in random_model(0).values())
    assert [(shard.name, shard.bytes) for shard in report.shards] == [
        ("model.safetensors", file.stat().st_size)
    ]
    assert report.peak_rss_bytes > 0
    assert report.workers == 2
    assert report.seconds > 0


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def layouts(names):
    """Draw how names are divided into shards."""
    return st.none() | st.integers(1, 4).flatmap(
        lambda count: st.lists(
            st.integers(0, count - 1), min_size=len(names), max_size=len(names)
        ).map(
            lambda places: [
                group
                for shard in range(count)
                if (group := [n for n, p in zip(names, places, strict=True) if p == shard])
            ]
        )
    )


@settings(
    max_examples=examples(10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_recipe_and_sources_decide_bytes(tmp_path_factory, data):
    """Bytes depend only on recipe and sources.

    Whatever the layouts, dtypes, number of models, chunks, workers and way to read.
    """
    tmp_path = tmp_path_factory.mktemp("merge")
    names = [f"layer.{number}.weight" for number in range(data.draw(st.integers(1, 6)))]
    shapes = {
        name: data.draw(st.lists(st.integers(0, 30), max_size=2).map(tuple)) for name in names
    }
    num_models = data.draw(st.integers(2, 4))
    models = []
    for number in range(num_models):
        dtypes = {name: data.draw(st.sampled_from(FLOATS)) for name in names}
        tensors = {
            name: random_tensor(shapes[name], dtypes[name], seed=number * 100 + i)
            for i, name in enumerate(names)
        }
        shards = data.draw(layouts(names))
        models.append((save_model(tmp_path / f"m{number}", tensors, shards=shards), 1 / num_models))
    options = {
        "dtype": data.draw(st.sampled_from(["keep", "float16", "bfloat16", "float32"])),
        "max_shard_size": data.draw(st.none() | st.integers(100, 20_000)),
        "fsync": False,
    }
    shardmix.merge(models, tmp_path / "out", workers=1, io="pread", backend="torch", **options)
    out_dtype = None if options["dtype"] == "keep" else getattr(torch, options["dtype"])
    with np.errstate(over="ignore"):
        assert_same_bits(load_model(tmp_path / "out"), oracle(models, out_dtype))
    expected = folder_bytes(tmp_path / "out")
    for workers, io, chunk_nbytes in [(2, "mmap", 40), (4, "pread", 1000), (4, "mmap", 1 << 26)]:
        plan = shardmix.plan_merge(
            models, tmp_path / "out", workers=workers, io=io, overwrite=True, **options
        )
        plan = plan.with_memory(dataclasses.replace(plan.memory, chunk_nbytes=chunk_nbytes))
        with (
            open_staging(tmp_path / "out", restart=True) as staging,
            closing(open_journal(staging.hidden, plan)) as journal,
        ):
            execute_plan(plan, load_backend(plan), staging, journal)
        assert folder_bytes(tmp_path / "out") == expected


def test_budgets_do_not_change_the_bytes(tmp_path):
    models = three_models(tmp_path)
    shardmix.merge(models, tmp_path / "free")
    with pytest.raises(shardmix.BudgetError) as caught:
        shardmix.plan_merge(models, max_memory=1)
    least = int(str(caught.value).split("works here is ")[1].split("MiB")[0])
    # The process may hold a little more by now than when the least was named.
    shardmix.merge(models, tmp_path / "tight", max_memory=f"{least + 8}MiB")
    free, tight = folder_bytes(tmp_path / "free"), folder_bytes(tmp_path / "tight")
    assert free["model.safetensors"] == tight["model.safetensors"]


def test_tensor_order_does_not_matter(tmp_path):
    """Any tensor order in a file gives the same merge.

    Files of other writers: data not in order of name, and not aligned to its elements.
    """
    models = three_models(tmp_path, (torch.bfloat16,) * 3)
    tensors = load_model(models[1][0])
    names = sorted(tensors, key=lambda name: name[::-1])
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in names:
        raw = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    encoded = json.dumps(header).encode()
    encoded += b" " * (1 - len(encoded) % 2)  # an odd length: no element is aligned
    expected = oracle(models)
    (models[1][0] / "model.safetensors").write_bytes(
        len(encoded).to_bytes(8, "little") + encoded + data
    )
    for io in ("mmap", "pread"):
        shardmix.merge(models, tmp_path / io, io=io)
        assert_same_bits(load_model(tmp_path / io), expected)


def test_differing_integers_are_reported(tmp_path):
    """Integers that differ are reported, and the first model's kept."""
    models = []
    for number in range(3):
        tensors = {"w": torch.ones(4) * number, "steps": torch.tensor([7, max(number, 1)])}
        models.append((save_model(tmp_path / f"m{number}", tensors), WEIGHTS[number]))
    report = shardmix.merge(models, tmp_path / "out")
    assert load_model(tmp_path / "out")["steps"].tolist() == [7, 1]
    (warning,) = report.warnings
    assert warning.startswith(f"steps: differs in {models[2][0]};")


def test_one_model_may_be_named_twice(tmp_path):
    folder = save_model(tmp_path / "m", random_model(1))
    shardmix.merge([(folder, 0.5), (folder, 0.5)], tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), load_model(folder))


def test_names_of_any_kind_survive(tmp_path):
    names = [
        "ünïcode.weight",
        'quo"te',
        "back\\slash",
        "new\nline",
        "\x7f",
        "日本語",
        "a b",
        "é\x01",
    ]
    tensors = {name: torch.full((3,), float(number)) for number, name in enumerate(names)}
    models = [(save_model(tmp_path / folder, tensors), 0.5) for folder in "ab"]
    shardmix.merge(models, tmp_path / "out", max_shard_size=24)
    assert_same_bits(load_model(tmp_path / "out"), tensors)


def test_events_tell_progress_to_the_end(tmp_path):
    """Events tell the progress up to the end."""
    events = []

    def note(event):
        assert event.is_end == (tmp_path / "out" / "shardmix.json").exists()
        events.append(event)

    report = shardmix.merge(three_models(tmp_path), tmp_path / "out", on_progress=note)
    assert [event.is_end for event in events[-2:]] == [False, True]
    assert events[-1].num_bytes_done == events[-1].num_bytes_total == report.bytes_read
    assert events[-1].num_shards_done == events[-1].num_shards_total == 1
    done = [event.num_bytes_done for event in events]
    assert done == sorted(done)
    assert all(event.resident_nbytes > 0 for event in events)


def only_inputs(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]


def test_a_cancelled_merge_leaves_nothing(tmp_path):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(shardmix.MergeCancelled):
        shardmix.merge(three_models(tmp_path), tmp_path / "out", cancel=cancel)
    assert only_inputs(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupt_leaves_nothing_behind(tmp_path, error):
    """An interrupt or a callback's error leaves no output and no thread."""

    def fail(_event):
        raise error

    num_threads = threading.active_count()
    models = three_models(tmp_path)
    with pytest.raises(error):
        shardmix.merge(models, tmp_path / "out", on_progress=fail)
    assert not (tmp_path / "out").exists()
    assert threading.active_count() == num_threads
    shardmix.merge(models, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), oracle(models))


def test_a_failing_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        shardmix.merge(three_models(tmp_path), tmp_path / "out")
    assert only_inputs(tmp_path)


def test_unreadable_source_leaves_nothing(tmp_path, monkeypatch):
    """A source that cannot be read leaves nothing."""

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    monkeypatch.setattr(PreadReader, "descriptors", lambda *_: None)  # kernels read past `os`
    with pytest.raises(SourceError, match=r"m0/model\.safetensors: reading failed"):
        shardmix.merge(three_models(tmp_path), tmp_path / "out", io="pread")
    assert only_inputs(tmp_path)


def test_torchs_threads_stay_as_they_were(tmp_path):
    """Torch's threads are left as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        shardmix.merge(three_models(tmp_path), tmp_path / "out", backend="torch")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_dtypes_unknown_to_kernels_use_torch(tmp_path):
    """Dtypes that kernels do not know are torch's."""
    models = three_models(tmp_path, (torch.float64,) * 3)
    assert shardmix.merge(models, tmp_path / "out").backend == "torch"
    with pytest.raises(shardmix.RecipeError, match="does not know F64"):
        shardmix.merge(models, tmp_path / "out2", backend="llvm")


def test_torch_stands_in_for_a_broken_llvm(tmp_path, monkeypatch):
    """An LLVM that is broken is made up for by torch, and said so."""
    monkeypatch.setitem(sys.modules, "shardmix.compute.llvm_cpu", None)  # its import fails
    report = shardmix.merge(three_models(tmp_path), tmp_path / "out")
    assert report.backend == "torch"
    assert any("llvm cannot be used here" in warning for warning in report.warnings)
    with pytest.raises(shardmix.RecipeError, match="llvm cannot be used here"):
        shardmix.merge(three_models(tmp_path), tmp_path / "out2", backend="llvm")


def test_nothing_is_printed(tmp_path, capfd):
    shardmix.merge(three_models(tmp_path), tmp_path / "out")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(shardmix.RecipeError, match="no usable CUDA device"):
        shardmix.merge(three_models(tmp_path), tmp_path / "out", device="cuda")
    assert only_inputs(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_keeps_bytes_and_budget(tmp_path):
    """A GPU writes the same bytes, within its budget."""
    models = three_models(tmp_path, (torch.bfloat16,) * 3)
    shardmix.merge(models, tmp_path / "cpu", device="cpu")
    report = shardmix.merge(models, tmp_path / "gpu", device="cuda", max_vram="64MiB")
    assert report.peak_vram_bytes <= 64 * 2**20
    cpu, gpu = folder_bytes(tmp_path / "cpu"), folder_bytes(tmp_path / "gpu")
    assert cpu["model.safetensors"] == gpu["model.safetensors"]


@pytest.mark.parametrize("backend", ["torch", "llvm"])
@pytest.mark.parametrize("chunk_nbytes", [40, 1 << 20])
def test_nan_and_inf_are_counted_by_tensor(tmp_path, backend, chunk_nbytes):
    """Many small tensors are one run: each is named for what is its own."""
    tensors = {f"t{number:02d}": torch.ones(3, number + 1) for number in range(20)}
    tensors["t03"][0, 0] = torch.nan
    tensors["t07"][2, 7] = torch.inf
    tensors["t07"][0, 0] = -torch.inf
    tensors["t08"][0, 0] = torch.nan
    first = save_model(tmp_path / "a", tensors)
    second = save_model(tmp_path / "b", {name: torch.ones_like(t) for name, t in tensors.items()})
    models = [(first, 0.5), (second, 0.5)]
    plan = shardmix.plan_merge(models, tmp_path / "out", backend=backend)
    plan = plan.with_memory(dataclasses.replace(plan.memory, chunk_nbytes=chunk_nbytes))
    with (
        open_staging(tmp_path / "out") as staging,
        closing(open_journal(staging.hidden, plan)) as journal,
    ):
        result = execute_plan(plan, load_backend(plan), staging, journal)
    assert result.anomalies.nonfinite == {"t03": (1, 0, 0), "t07": (0, 2, 0), "t08": (1, 0, 0)}
    report = shardmix.merge(models, tmp_path / "again")
    assert report.warnings[:3] == (
        "t03: 1 NaN in the merged tensor",
        "t07: 2 Inf in the merged tensor",
        "t08: 1 NaN in the merged tensor",
    )
    provenance = json.loads((tmp_path / "again" / "shardmix.json").read_text())
    assert provenance["nonfinite"]["t07"] == {"nan": 0, "inf": 2, "overflowed": 0}
    with pytest.raises(shardmix.NonfiniteError, match=r"t0\d: .* in the merged tensor; mend"):
        shardmix.merge(models, tmp_path / "strict", on_nonfinite="error")
    assert not (tmp_path / "strict").exists()


def test_overflows_are_named_as_such(tmp_path):
    """Values too large for the output are named as such."""
    values = torch.tensor([1.0, 65519.0, 65520.0, -1e9, torch.inf])
    models = [(save_model(tmp_path / name, {"w": values}), 0.5) for name in "ab"]
    report = shardmix.merge(models, tmp_path / "out", dtype="float16")
    (finding,) = report.nonfinite
    assert (finding.num_nan, finding.num_inf, finding.num_overflowed) == (0, 3, 2)
    assert report.warnings == (
        "w: 1 Inf and 2 values too large for F16, made Inf by rounding (--dtype bfloat16 or "
        "float32 has room for them) in the merged tensor",
    )
    assert shardmix.merge(models, tmp_path / "wide", dtype="bfloat16").nonfinite[0].num_inf == 1


def test_nonfinite_tensors_do_not_flood(tmp_path):
    """Many tensors that are not finite do not flood the warnings."""
    tensors = {f"t{number}": torch.full((4,), torch.nan) for number in range(30)}
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    report = shardmix.merge(models, tmp_path / "out")
    assert len(report.nonfinite) == 30
    assert len(report.warnings) == 11
    assert report.warnings[-1] == "20 more tensors hold NaN or Inf; --json lists them"


@pytest.mark.parametrize("layout", ["one run", "a run each"])
def test_all_nan_reads_each_header_once(tmp_path, monkeypatch, layout):
    """NaN everywhere has each header read once.

    Not once a chunk, which is quadratic in the number of tensors.
    """
    tensors = {f"t{number:03d}": torch.full((4,), torch.nan) for number in range(200)}
    names, shards = sorted(tensors), None
    if layout == "a run each":
        shards = [names[::2], names[1::2]]
    a = save_model(tmp_path / "a", tensors)
    models = [(a, 0.5), (save_model(tmp_path / "b", tensors, shards=shards), 0.5)]
    plan = shardmix.plan_merge(models)
    assert sum(1 for _ in plan.segments()) == (1 if shards is None else 200)
    reads = []
    tensors_of = OutputShard.tensors

    def counted(planned):
        reads.append(planned.filename)
        return tensors_of(planned)

    monkeypatch.setattr(OutputShard, "tensors", counted)
    report = shardmix.merge(models, tmp_path / "out", workers=1)
    assert reads == ["model.safetensors"]
    assert [found.name for found in report.nonfinite] == names
    assert {found.num_nan for found in report.nonfinite} == {4}
    text = (tmp_path / "out" / "shardmix.json").read_bytes()
    assert text == msgspec.json.format(text, indent=2) + b"\n"
    nan = {"nan": 4, "inf": 0, "overflowed": 0}
    assert json.loads(text)["nonfinite"] == dict.fromkeys(names, nan)
    reads.clear()
    changed = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    changed[-16 * 200 :] = bytes(16 * 200)
    (tmp_path / "out" / "model.safetensors").write_bytes(changed)
    verified = shardmix.verify(
        tmp_path / "out", recompute=True, sources={"a": a, "b": tmp_path / "b"}
    )
    assert len(verified.problems) >= 1
    assert len(reads) <= 2


class CountedInt(int):
    """An int that counts how often it, or a sum that it went into, is added to another."""

    additions = 0

    def __radd__(self, other):
        CountedInt.additions += 1
        return CountedInt(int(other) + int(self))

    __add__ = __radd__


def test_anomaly_costs_the_same_late(tmp_path, monkeypatch):
    """An anomaly costs no more for those before it.

    Neither in the whole merge nor within a leaf, which may hold 65,000 tensors.
    """
    plan = shardmix.plan_merge(three_models(tmp_path))
    tally = Tally(plan, None, on_many_anomalies=lambda names: None)
    no_shard = SimpleNamespace(take_in=lambda data: None, hashed=lambda nbytes: None)
    leaves = GrowingLeaves(no_shard, SimpleNamespace(update=lambda data: []), memoryview(b""))
    monkeypatch.setattr(CountedInt, "additions", 0)
    for number in range(100):
        counts = (CountedInt(1), CountedInt(0), CountedInt(0))
        for _ in range(2):
            anomalies = LeafAnomalies(nonfinite={f"t{number}": counts})
            tally.take(TaskResult(Task(0, 0, 1), 0, Written(anomalies)))
            leaves.note(0, anomalies)
    assert tally.anomalies.nonfinite == {f"t{number}": (2, 0, 0) for number in range(100)}
    assert CountedInt.additions <= 2 * 2 * 3 * 100


def test_unknown_word_for_nan_is_refused(tmp_path):
    """An unknown word for what to do about NaN is refused."""
    with pytest.raises(shardmix.RecipeError, match="on_nonfinite 'stop': must be warn or error"):
        shardmix.merge(three_models(tmp_path), tmp_path / "out", on_nonfinite="stop")
