"""Models in files of torch.save: the bytes are those of the same models in safetensors."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import shardmix
from shardmix.dtypes import BY_NAME, DTYPES
from shardmix.sources.resolve import open_source
from tests.support.models import random_model, random_tensor, save_model
from tests.support.sampling import examples

LOADED = [BY_NAME[name].torch_name for name in ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL")]


def save_torch(folder, tensors, *, shards=None, **saving):
    """Write a model's folder as save_pretrained once did; `shards` are lists of names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if shards is None:
        torch.save(tensors, folder / "pytorch_model.bin", **saving)
        return folder
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({key: tensors[key] for key in names}, folder / name, **saving)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def all_of(source):
    """Return every tensor of a source, as its reader gives it."""
    reader = source.open_reader()
    found = {}
    for row, info in enumerate(source.tensors):
        buffer = bytearray(info.nbytes)
        reader.read(row, 0, memoryview(buffer))
        found[info.name] = (info.dtype, info.shape, bytes(buffer))
    reader.close()
    return found


def expected(tensors):
    return {
        name: (
            next(key for key in DTYPES if BY_NAME[key].torch_name == str(tensor.dtype)[6:]),
            tuple(tensor.shape),
            tensor.clone(memory_format=torch.contiguous_format).flatten().numpy().tobytes()
            if tensor.dtype != torch.bfloat16
            else tensor.contiguous().view(torch.int16).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


@st.composite
def views(draw):
    """A tensor that is some view of a storage: cut, stepped, transposed, expanded."""
    dtype = getattr(torch, draw(st.sampled_from(LOADED)))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = int(np.prod(shape, dtype=int))
    seed = draw(st.integers(0, 2**16))
    values = torch.tensor(random.Random(seed).choices(range(200), k=count)).to(dtype)
    tensor = values.reshape(shape)
    for _ in range(draw(st.integers(0, 3))):
        if not tensor.ndim:
            break
        axis = draw(st.integers(0, tensor.ndim - 1))
        way = draw(st.sampled_from(["transpose", "cut", "step", "expand"]))
        if way == "transpose":
            tensor = tensor.transpose(0, axis)
        elif way == "cut" and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 1, tensor.shape[axis] - 1)
        elif way == "step":
            tensor = tensor[(slice(None),) * axis + (slice(None, None, 2),)]
        elif way == "expand":
            tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], 3, *tensor.shape[axis:])
    return tensor


@settings(max_examples=examples(40), deadline=None)
@given(st.lists(views(), min_size=1, max_size=5), st.sampled_from([2, 4, 5]))
def test_any_view_is_read_as_torch_loads(tmp_path_factory, tensors, protocol):
    named = {f"t{number}": tensor for number, tensor in enumerate(tensors)}
    named["again"] = named["t0"]
    folder = save_torch(tmp_path_factory.mktemp("m") / "a", named, pickle_protocol=protocol)
    source = open_source(str(folder))
    assert all_of(source) == expected(torch.load(folder / "pytorch_model.bin", weights_only=False))
    reader = source.open_reader()
    for row, info in enumerate(source.tensors):
        whole = all_of(source)[info.name][2]
        width = BY_NAME[info.dtype].bits // 8
        for start in range(info.num_elements):
            part = bytearray((info.num_elements - start + 1) // 2 * width)
            reader.read(row, start, memoryview(part))
            assert bytes(part) == whole[start * width : start * width + len(part)]
    reader.close()


def test_large_views_are_read_in_pieces(tmp_path):
    """Transposed, with more than a buffer between neighbours."""
    tensors = {
        "flat": random_tensor((1500, 700), seed=1).t(),
        "deep": random_tensor((60, 70, 80), seed=2).permute(2, 0, 1),
        "half": random_tensor((900, 900), seed=3).bfloat16()[::3, 1::2],
    }
    source = open_source(str(save_torch(tmp_path / "m", tensors)))
    assert source.tensors.decoded.all()
    assert all_of(source) == expected(tensors)


NAMES = sorted(random_model(0))
LAYOUTS = [None, [NAMES[:3], NAMES[3:]]]


@pytest.mark.parametrize("shards", LAYOUTS, ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [{}, {"io": "mmap"}, {"backend": "torch"}], ids=str)
def test_merges_are_those_of_safetensors(tmp_path, shards, dtype, way):
    models = [random_model(seed, dtype) for seed in range(2)]
    stored = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
        for name, tensor in models[1].items()
    }
    old = [
        save_torch(tmp_path / "old0", models[0], shards=shards),
        save_torch(tmp_path / "old1", stored, shards=shards),
    ]
    new = [
        save_model(tmp_path / f"new{number}", tensors, shards=shards)
        for number, tensors in enumerate(models)
    ]
    for name, sources in (("from_old", old), ("from_new", new)):
        shardmix.merge(zip(sources, (0.3, 0.7), strict=True), tmp_path / name, **way)
    written = sorted(path.name for path in (tmp_path / "from_new").glob("*.safetensors*"))
    assert sorted(p.name for p in (tmp_path / "from_old").glob("*.safetensors*")) == written
    assert not list((tmp_path / "from_old").glob("*.bin*"))
    for name in written:
        if name.endswith(".safetensors"):
            old_file, new_file = (load_file(tmp_path / f / name) for f in ("from_old", "from_new"))
            assert old_file.keys() == new_file.keys()
            assert all(torch.equal(old_file[key], new_file[key]) for key in old_file)
    assert shardmix.verify(tmp_path / "from_old").is_verified


def test_safetensors_are_taken_first(tmp_path):
    both = save_torch(tmp_path / "m", random_model(1))
    new = save_model(tmp_path / "new", random_model(2))
    (new / "model.safetensors").rename(both / "model.safetensors")
    names = [file.name for file in open_source(str(both)).identity.files]
    assert names == ["model.safetensors"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: [1.5]}}},
        lambda state: {"model": state, "args": None},
        lambda state: {"step": 1, "module": {"state_dict": state}},
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_single_files_and_trainers_are_read(tmp_path, wrap, suffix):
    tensors = random_model(3)
    path = tmp_path / f"model{suffix}"
    torch.save(wrap(tensors), path)
    assert all_of(open_source(str(path))) == expected(tensors)


def test_a_module_s_state_dict_is_read(tmp_path):
    """With `_metadata` on it, and parameters in place of tensors."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    folder = save_torch(tmp_path / "m", module.state_dict())
    assert all_of(open_source(str(folder))) == expected(module.state_dict())
    parameters = dict(module.named_parameters())
    folder = save_torch(tmp_path / "p", parameters)
    assert all_of(open_source(str(folder))) == expected(
        {name: each.detach() for name, each in parameters.items()}
    )


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_copies_are_left_out(tmp_path, is_tied):
    """A head that shares the embedding's storage is in no safetensors file of such a model."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": is_tied,
    }
    names = {}
    for kind in ("old", "new"):
        sources = []
        for seed in range(2):
            tensors = {
                "model.embed_tokens.weight": random_tensor((6, 4), seed=seed),
                "model.norm.weight": random_tensor((4,), seed=9 + seed),
            }
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            if kind == "old":
                folder = save_torch(tmp_path / f"old{seed}", tensors)
            else:
                if is_tied:
                    del tensors["lm_head.weight"]
                stored = {name: tensor.clone() for name, tensor in tensors.items()}
                folder = save_model(tmp_path / f"new{seed}", stored)
            (folder / "config.json").write_text(json.dumps(config))
            sources.append((folder, 0.5))
        shardmix.merge(sources, tmp_path / kind)
        names[kind] = load_file(tmp_path / kind / "model.safetensors")
    assert names["old"].keys() == names["new"].keys()
    assert ("lm_head.weight" in names["old"]) != is_tied
    assert all(torch.equal(names["old"][name], names["new"][name]) for name in names["new"])


def test_old_and_new_formats_merge_together(tmp_path):
    tensors = [random_model(seed) for seed in range(2)]
    sources = [save_torch(tmp_path / "a", tensors[0]), save_model(tmp_path / "b", tensors[1])]
    shardmix.merge([(source, 0.5) for source in sources], tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, first in tensors[0].items():
        assert torch.equal(merged[name], first * 0.5 + tensors[1][name] * 0.5)


def test_indexes_of_modules_stay_behind(tmp_path):
    """A module's shards of torch.save become safetensors, and their index says nothing then."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    sources = []
    for seed in range(2):
        folder = save_model(tmp_path / f"m{seed}", random_model(seed))
        (folder / "modules.json").write_text(json.dumps(modules))
        dense = {name: random_tensor((4, 4), seed=seed) for name in ("a.weight", "b.weight")}
        save_torch(folder / "2_Dense", dense, shards=[["a.weight"], ["b.weight"]])
        sources.append((folder, 0.5))
    shardmix.merge(sources, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out" / "2_Dense").iterdir())
    assert not [name for name in written if ".bin" in name]
    assert "model.safetensors.index.json" in written
