import dataclasses
import json
import tracemalloc

import pytest
import torch

import shardmix
from shardmix.plan import AGREE, LINEAR, MergePlan
from tests.models import random_model, save_model

NAMES = sorted(random_model(0))


def two_models(tmp_path, **second):
    a = save_model(tmp_path / "a", random_model(1))
    b = save_model(tmp_path / "b", random_model(2), **second)
    return [(a, 0.5), (b, 0.5)]


def all_runs(plan):
    return [run for shard in plan.shards for run in shard.runs]


def test_a_plan_goes_through_json_unchanged(tmp_path):
    plan = shardmix.plan_merge(two_models(tmp_path), tmp_path / "out", max_memory="2GiB")
    assert MergePlan.from_json(plan.to_json()) == plan
    assert hash(MergePlan.from_json(plan.to_json())) == hash(plan)


def test_the_digest_depends_on_what_decides_the_bytes_alone(tmp_path):
    models = two_models(tmp_path)
    digest = shardmix.plan_merge(models).digest()
    same = [
        shardmix.plan_merge(models, tmp_path / "out", workers=1, max_memory="1GiB", io="pread"),
        shardmix.plan_merge([(str(source), weight) for source, weight in models], fsync=False),
    ]
    other = [
        shardmix.plan_merge([(models[0][0], 0.25), (models[1][0], 0.75)]),
        shardmix.plan_merge(models[::-1]),
        shardmix.plan_merge(models, dtype="bfloat16"),
        shardmix.plan_merge(models, max_shard_size=2000),
    ]
    assert {plan.digest() for plan in same} == {digest}
    assert len({digest, *(plan.digest() for plan in other)}) == 5


def test_the_digest_depends_on_every_run_and_header(tmp_path):
    plan = shardmix.plan_merge(two_models(tmp_path, shards=[NAMES[::2], NAMES[1::2]]))
    (shard,) = plan.shards
    last = shard.runs[-1]
    assert len(shard.runs) > 1
    others = [
        {"header": shard.header.replace("norm", "form")},
        {"filename": "other.safetensors"},
        {"runs": shard.runs[:-1]},
        {"runs": (*shard.runs[:-1], dataclasses.replace(last, offsets=(0, *last.offsets[1:])))},
        {"runs": (*shard.runs[:-1], dataclasses.replace(last, weights=(0.1, 0.9)))},
    ]
    plans = [
        dataclasses.replace(plan, shards=(dataclasses.replace(shard, **change),))
        for change in others
    ]
    assert len({plan.digest() for plan in (plan, *plans)}) == len(others) + 1


def test_a_digest_takes_next_to_no_memory_however_long_the_plan(tmp_path):
    plan = shardmix.plan_merge(two_models(tmp_path))
    (shard,) = plan.shards
    (run,) = shard.runs
    long = dataclasses.replace(plan, shards=(dataclasses.replace(shard, runs=(run,) * 3000),))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        long.digest()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(long.to_json()) > 500_000
    assert peak - before < 100_000


@pytest.mark.parametrize("letter", ["a", "ä", "\U0001f600"])
def test_a_head_in_pieces_is_the_head(tmp_path, monkeypatch, letter):
    """Of names in any script, and of such as look like a header's entry."""
    monkeypatch.setattr("shardmix.plan._PIECE_NBYTES", 7)
    entry = '"dtype":"F16","shape":[],"data_offsets":[0,1]'
    tensors = {f"{letter}{entry}{n}": torch.ones(n).to(torch.bfloat16) for n in range(5)}
    tensors["dtype"] = torch.arange(3)
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    plan = shardmix.plan_merge(models)
    (shard,) = plan.shards
    head = (tmp_path / "a" / "model.safetensors").read_bytes()[: shard.head_nbytes()]
    assert b"".join(shard.head()) == head
    for start in range(0, len(head) + 9, 5):
        for stop in range(start, len(head) + 9, 11):
            assert shard.head_between(start, stop) == head[start:stop]
    header = json.loads(head[8:])
    header.pop("__metadata__")
    expected = [(name, own["dtype"], own["data_offsets"][1]) for name, own in header.items()]
    assert list(shard.tensors()) == expected
    assert {name: plan.tensor_dtype(name) for name in header} == {
        name: own["dtype"] for name, own in header.items()
    }


def test_neighbours_everywhere_stream_as_one_run(tmp_path):
    plan = shardmix.plan_merge(two_models(tmp_path))
    (run,) = all_runs(plan)
    filled = [name for name in NAMES if name != "model.nothing"]
    assert run.num_tensors == len(filled)
    assert run.num_elements == sum(random_model(1)[name].numel() for name in filled)
    assert run.reduction == LINEAR


def test_another_layout_of_one_model_cuts_runs_and_nothing_else(tmp_path):
    shards = [NAMES[::2], NAMES[1::2]]
    plan = shardmix.plan_merge(two_models(tmp_path, shards=shards))
    runs = all_runs(plan)
    assert 1 < len(runs) <= len(NAMES)
    assert sum(run.num_tensors for run in runs) == len(NAMES) - 1
    assert [shard.filename for shard in plan.shards] == ["model.safetensors"]


def test_runs_cover_the_output_without_gap_or_overlap(tmp_path):
    plan = shardmix.plan_merge(
        two_models(tmp_path, shards=[NAMES[:3], NAMES[3:]]), max_shard_size=1500, dtype="float16"
    )
    assert len(plan.shards) > 1
    for shard in plan.shards:
        position = 8 + len(shard.header.encode())
        for run in shard.runs:
            assert run.out_offset == position
            position += run.num_elements * 2
        assert position == shard.file_nbytes


def test_the_first_models_layout_is_kept_by_default(tmp_path):
    shards = [NAMES[:2], NAMES[2:5], NAMES[5:]]
    a = save_model(tmp_path / "a", random_model(1), shards=shards)
    b = save_model(tmp_path / "b", random_model(2))
    plan = shardmix.plan_merge([(a, 0.5), (b, 0.5)])
    assert [set(shard.tensor_names) for shard in plan.shards] == [set(names) for names in shards]
    assert plan.shards[0].filename == "model-00001-of-00003.safetensors"


def test_max_shard_size_bounds_every_shard_of_several_tensors(tmp_path):
    plan = shardmix.plan_merge(two_models(tmp_path), max_shard_size="1200B")
    for shard in plan.shards:
        data_nbytes = shard.file_nbytes - 8 - len(shard.header.encode())
        assert data_nbytes <= 1200 or len(shard.tensor_names) == 1


def test_keep_is_the_first_models_dtype_tensor_by_tensor(tmp_path):
    mixed = random_model(1, torch.bfloat16)
    mixed["model.layers.0.norm.weight"] = mixed["model.layers.0.norm.weight"].float()
    a = save_model(tmp_path / "a", mixed)
    b = save_model(tmp_path / "b", random_model(2, torch.float64))
    (shard,) = shardmix.plan_merge([(a, 0.5), (b, 0.5)]).shards
    header = json.loads(shard.header)
    assert header["model.layers.0.norm.weight"]["dtype"] == "F32"
    assert header["lm_head.weight"]["dtype"] == "BF16"


def test_integers_keep_their_dtype_and_stand_alone(tmp_path):
    tensors = {"ids": torch.arange(3), "more": torch.arange(3), "w": torch.ones(2)}
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    runs = {run.name: run for run in all_runs(shardmix.plan_merge(models, dtype="float16"))}
    assert {name: run.reduction for name, run in runs.items()} == {
        "ids": AGREE,
        "more": AGREE,
        "w": LINEAR,
    }
    assert (runs["ids"].out_dtype, runs["w"].out_dtype) == ("I64", "F16")


def test_counts_and_sizes_are_those_of_the_files(tmp_path):
    models = two_models(tmp_path)
    plan = shardmix.plan_merge(models, tmp_path / "out")
    data = sum(tensor.numel() * 4 for tensor in random_model(1).values())
    assert plan.num_tensors == len(NAMES)
    assert plan.read_nbytes == 2 * data
    size = (models[0][0] / "model.safetensors").stat().st_size
    assert plan.write_nbytes == size
    assert plan.disk_needed_nbytes == size + (models[0][0] / "config.json").stat().st_size


def test_a_model_without_a_config_is_warned_about(tmp_path):
    models = [(save_model(tmp_path / name, random_model(1), config=None), 0.5) for name in "ab"]
    assert any("no config.json" in text for text in shardmix.plan_merge(models).warnings)


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"io": "direct"}, "io 'direct'"),
        ({"workers": 0}, "workers 0"),
        ({"backend": "jax"}, "backend 'jax'"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"max_memory": "much"}, "size 'much'"),
        ({"max_shard_size": "0"}, "more than zero"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(tmp_path, options, finding):
    with pytest.raises(shardmix.RecipeError, match=finding):
        shardmix.plan_merge(two_models(tmp_path), **options)


def test_an_unknown_option_is_a_type_error_as_in_any_python_function(tmp_path):
    with pytest.raises(TypeError, match="max_ram"):
        shardmix.plan_merge(two_models(tmp_path), max_ram="2GB")


def test_a_budget_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    models = two_models(tmp_path)
    with pytest.raises(shardmix.BudgetError, match="the least that works here is"):
        shardmix.merge(models, tmp_path / "out", max_memory="20MiB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
