import dataclasses
import json
import tracemalloc

import pytest
import torch

import shardmix
from shardmix.methods import keep_first
from shardmix.plan import memory_budget
from shardmix.plan.merge_plan import MergePlan
from shardmix.system.units import MIB
from tests.support.models import assert_same_bits, load_model, random_model, save_model

NAMES = sorted(random_model(0))


def two_models(tmp_path, **second):
    a = save_model(tmp_path / "a", random_model(1))
    b = save_model(tmp_path / "b", random_model(2), **second)
    return [(a, 0.5), (b, 0.5)]


def all_segments(plan):
    return [segment for shard in plan.shards for segment in shard.segments]


def test_a_plan_goes_through_json_unchanged(tmp_path):
    plan = shardmix.plan_merge(two_models(tmp_path), tmp_path / "out", max_memory="2GiB")
    assert MergePlan.from_json(plan.to_json()) == plan
    assert hash(MergePlan.from_json(plan.to_json())) == hash(plan)


def test_digest_depends_on_the_bytes_only(tmp_path):
    """The digest depends only on what decides the bytes."""
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


def test_digest_covers_segments_and_headers(tmp_path):
    """The digest depends on every segment and header."""
    plan = shardmix.plan_merge(two_models(tmp_path, shards=[NAMES[::2], NAMES[1::2]]))
    (shard,) = plan.shards
    last = shard.segments[-1]
    assert len(shard.segments) > 1
    others = [
        {"header": shard.header.replace("norm", "form")},
        {"filename": "other.safetensors"},
        {"segments": shard.segments[:-1]},
        {
            "segments": (
                *shard.segments[:-1],
                dataclasses.replace(
                    last, sources=(last.sources[0]._replace(offset=0), *last.sources[1:])
                ),
            )
        },
        {"segments": (*shard.segments[:-1], dataclasses.replace(last, factors=(0.1, 0.9)))},
    ]
    plans = [
        dataclasses.replace(plan, shards=(dataclasses.replace(shard, **change),))
        for change in others
    ]
    assert len({plan.digest() for plan in (plan, *plans)}) == len(others) + 1


def test_digest_takes_next_to_no_memory(tmp_path):
    """A digest takes next to no memory, however long the plan."""
    plan = shardmix.plan_merge(two_models(tmp_path))
    (shard,) = plan.shards
    (segment,) = shard.segments
    long = dataclasses.replace(
        plan, shards=(dataclasses.replace(shard, segments=(segment,) * 3000),)
    )
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
    monkeypatch.setattr("shardmix.plan.merge_plan._PIECE_NBYTES", 7)
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


def test_neighbours_stream_as_one_segment(tmp_path):
    """Neighbours everywhere stream as one segment."""
    plan = shardmix.plan_merge(two_models(tmp_path))
    (segment,) = all_segments(plan)
    filled = [name for name in NAMES if name != "model.nothing"]
    assert segment.num_tensors == len(filled)
    assert segment.num_elements == sum(random_model(1)[name].numel() for name in filled)
    assert segment.method == "linear"


def test_other_layout_only_cuts_segments(tmp_path):
    """Another layout of one model cuts segments, and nothing else."""
    shards = [NAMES[::2], NAMES[1::2]]
    plan = shardmix.plan_merge(two_models(tmp_path, shards=shards))
    runs = all_segments(plan)
    assert 1 < len(runs) <= len(NAMES)
    assert sum(segment.num_tensors for segment in runs) == len(NAMES) - 1
    assert [shard.filename for shard in plan.shards] == ["model.safetensors"]


def test_segments_cover_the_output(tmp_path):
    """Segments cover the output without gap or overlap."""
    plan = shardmix.plan_merge(
        two_models(tmp_path, shards=[NAMES[:3], NAMES[3:]]), max_shard_size=1500, dtype="float16"
    )
    assert len(plan.shards) > 1
    for shard in plan.shards:
        position = 8 + len(shard.header.encode())
        for segment in shard.segments:
            assert segment.out_offset == position
            position += segment.num_elements * 2
        assert position == shard.file_nbytes


def test_first_models_layout_is_the_default(tmp_path):
    """The first model's layout is kept by default."""
    shards = [NAMES[:2], NAMES[2:5], NAMES[5:]]
    a = save_model(tmp_path / "a", random_model(1), shards=shards)
    b = save_model(tmp_path / "b", random_model(2))
    plan = shardmix.plan_merge([(a, 0.5), (b, 0.5)])
    assert [set(shard.tensor_names) for shard in plan.shards] == [set(names) for names in shards]
    assert plan.shards[0].filename == "model-00001-of-00003.safetensors"


def test_max_shard_size_bounds_shards(tmp_path):
    """max_shard_size bounds every shard of several tensors."""
    plan = shardmix.plan_merge(two_models(tmp_path), max_shard_size="1200B")
    for shard in plan.shards:
        data_nbytes = shard.file_nbytes - 8 - len(shard.header.encode())
        assert data_nbytes <= 1200 or len(shard.tensor_names) == 1


def test_keep_is_each_tensors_first_dtype(tmp_path):
    """keep is the first model's dtype, tensor by tensor."""
    mixed = random_model(1, torch.bfloat16)
    mixed["model.layers.0.norm.weight"] = mixed["model.layers.0.norm.weight"].float()
    a = save_model(tmp_path / "a", mixed)
    b = save_model(tmp_path / "b", random_model(2, torch.float64))
    (shard,) = shardmix.plan_merge([(a, 0.5), (b, 0.5)]).shards
    header = json.loads(shard.header)
    assert header["model.layers.0.norm.weight"]["dtype"] == "F32"
    assert header["lm_head.weight"]["dtype"] == "BF16"


def test_integers_keep_their_dtype(tmp_path):
    """Integers keep their dtype, and stand in segments of their own."""
    tensors = {"ids": torch.arange(3), "more": torch.arange(3), "w": torch.ones(2)}
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    runs = {
        segment.name: segment
        for segment in all_segments(shardmix.plan_merge(models, dtype="float16"))
    }
    assert {name: segment.method for name, segment in runs.items()} == {
        "ids": keep_first.NAME,
        "more": keep_first.NAME,
        "w": "linear",
    }
    assert (runs["ids"].out_dtype, runs["w"].out_dtype) == ("I64", "F16")


def test_counts_and_sizes_are_the_files(tmp_path):
    """Counts and sizes are those of the files."""
    models = two_models(tmp_path)
    plan = shardmix.plan_merge(models, tmp_path / "out")
    data = sum(tensor.numel() * 4 for tensor in random_model(1).values())
    assert plan.num_tensors == len(NAMES)
    assert plan.read_nbytes == 2 * data
    size = (models[0][0] / "model.safetensors").stat().st_size
    assert plan.write_nbytes == size


def test_model_without_a_config_is_warned_of(tmp_path):
    """A model without a config is warned about."""
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
def test_senseless_option_is_refused(tmp_path, options, finding):
    """An option that makes no sense is refused."""
    with pytest.raises(shardmix.RecipeError, match=finding):
        shardmix.plan_merge(two_models(tmp_path), **options)


def test_unknown_option_is_a_type_error(tmp_path):
    """An unknown option is a TypeError, as in any Python function."""
    with pytest.raises(TypeError, match="max_ram"):
        shardmix.plan_merge(two_models(tmp_path), max_ram="2GB")


def test_small_budget_is_refused_early(tmp_path):
    """A budget that is too small is refused before anything is written."""
    models = two_models(tmp_path)
    with pytest.raises(shardmix.BudgetError, match="the least that works here is"):
        shardmix.merge(models, tmp_path / "out", max_memory="20MiB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_other_dtype_is_not_joined(tmp_path):
    """A part in another dtype is not joined.

    Neighbours in every file, of one dtype in one model and of two in the other.
    """
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    other = {"a": torch.tensor([5.0, 6.0]), "b": torch.tensor([7.0, 8.0]).bfloat16()}
    for number, (first, second) in enumerate([(one, other), (other, one)]):
        root = tmp_path / str(number)
        models = [(save_model(root / "a", first), 0.5), (save_model(root / "b", second), 0.5)]
        assert [segment.name for segment in all_segments(shardmix.plan_merge(models))] == ["a", "b"]
        shardmix.merge(models, root / "out")
        merged = {name: value.tolist() for name, value in load_model(root / "out").items()}
        assert merged == {"a": [3.0, 4.0], "b": [5.0, 6.0]}


def test_two_output_dtypes_are_not_joined(tmp_path):
    """Of a first model that is left out nothing counts but the dtypes of the output."""
    first = {"a": torch.zeros(2), "b": torch.zeros(2).bfloat16()}
    second = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    models = [(save_model(tmp_path / "a", first), 0), (save_model(tmp_path / "b", second), 1)]
    runs = all_segments(shardmix.plan_merge(models))
    assert [(segment.name, segment.out_dtype) for segment in runs] == [("a", "F32"), ("b", "BF16")]
    shardmix.merge(models, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), second | {"b": second["b"].bfloat16()})


def test_gap_in_a_file_is_not_joined(tmp_path):
    """A gap between neighbours is not joined.

    Between them the second model's file has another tensor, which the merge leaves out.
    """
    one = {"a": torch.ones(2), "c": torch.ones(3)}
    buffer = "b.rotary_emb.inv_freq"
    models = [
        (save_model(tmp_path / "a", one), 0.5),
        (save_model(tmp_path / "b", one | {buffer: torch.full((5,), 9.0)}), 0.5),
    ]
    assert [segment.name for segment in all_segments(shardmix.plan_merge(models))] == ["a", "c"]
    shardmix.merge(models, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), one)


def test_neighbours_by_offset_in_two_files(tmp_path):
    """One file's data ends where another's begins, by its offset: that makes no neighbours."""
    whole = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    apart = save_model(tmp_path / "b", whole, shards=[["a"], ["b"]])
    first, second = sorted(apart.glob("*.safetensors"))
    end_of_first = first.stat().st_size
    saved = second.read_bytes()
    length = int.from_bytes(saved[:8], "little")
    padded = end_of_first - 8
    assert padded > length
    header = saved[8 : 8 + length].ljust(padded)
    second.write_bytes(padded.to_bytes(8, "little") + header + saved[8 + length :])
    models = [(save_model(tmp_path / "a", whole), 0.5), (apart, 0.5)]
    (a, b) = all_segments(shardmix.plan_merge(models))
    assert a.sources[1].offset + 8 == b.sources[1].offset
    shardmix.merge(models, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), whole)


@pytest.mark.parametrize("backend", ["torch", "llvm"])
def test_mapped_pages_are_projected(tmp_path, backend):
    """Mapped pages count in the projection.

    Each worker may have pages of three sources mapped, up to 4 MiB beyond each.
    """
    if backend == "llvm":
        pytest.importorskip("llvmlite", reason="needs llvmlite")
    models = two_models(tmp_path)
    peaks = {}
    for workers in (1, 5):
        plans = [
            shardmix.plan_merge(models, io=io, workers=workers, backend=backend).memory
            for io in ("pread", "mmap")
        ]
        read, mapped = (plan.projected_peak_nbytes - plan.reserved_nbytes for plan in plans)
        peaks[workers] = mapped - read
    assert peaks == {1: 3 * 4 * MIB, 5: 5 * 3 * 4 * MIB}


def test_config_names_dtype_of_most_bytes(tmp_path):
    """The config names the dtype of most bytes.

    Many small tensors in float32 are fewer bytes than one large one in bfloat16.
    """
    small = {f"norm.{number}": torch.ones(4) for number in range(20)}
    tensors = {**small, "mlp": torch.ones(40, 40).bfloat16()}
    stated = {"model_type": "x", "torch_dtype": "float16"}
    models = [(save_model(tmp_path / name, tensors, config=stated), 0.5) for name in "ab"]
    shardmix.merge(models, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_shards_split_by_the_outputs_dtype(tmp_path):
    """Shards are split by the output's dtype.

    Four tensors of 200 bytes as bfloat16, of 400 in the models.
    """
    tensors = {f"t{number}": torch.ones(100) for number in range(4)}
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    for dtype, expected in [("bfloat16", [2, 2]), ("keep", [1, 1, 1, 1])]:
        plan = shardmix.plan_merge(models, dtype=dtype, max_shard_size=400)
        assert [len(shard.tensor_names) for shard in plan.shards] == expected


def test_output_unknown_to_kernels_is_torchs(tmp_path):
    """An output that kernels do not know is torch's.

    Its dtype is the first model's, also if that is left out of the sum.
    """
    pytest.importorskip("llvmlite", reason="needs llvmlite")
    wide, narrow = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])
    models = [
        (save_model(tmp_path / "a", {"w": wide}), 0),
        (save_model(tmp_path / "b", {"w": narrow}), 1),
    ]
    plan = shardmix.plan_merge(models)
    assert plan.settings.backend == "torch"
    shardmix.merge(models, tmp_path / "out")
    assert_same_bits(load_model(tmp_path / "out"), {"w": narrow.double()})
    with pytest.raises(shardmix.RecipeError, match="backend llvm: it does not know F64"):
        shardmix.plan_merge(models, backend="llvm")


def test_memory_is_planned_for_every_tensor(tmp_path, monkeypatch):
    """By the plan, and once more when the backend is loaded."""
    asked = []
    monkeypatch.setattr(
        memory_budget,
        "reserved_nbytes",
        lambda *_, **counts: asked.append(counts["num_tensors"]) or 0,
    )
    shardmix.merge(two_models(tmp_path), tmp_path / "out")
    assert asked == [len(NAMES), len(NAMES)]
