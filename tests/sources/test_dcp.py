"""Distributed checkpoints of torch: the bytes are those that torch's own loader gives."""

import json
import random
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import shardmix
from shardmix.dtypes import element_nbytes
from shardmix.errors import ShardmixError, SourceError
from shardmix.formats import dcp_metadata
from shardmix.formats.torch_record import RecordReader
from shardmix.scoring import score
from shardmix.sources.resolve import open_source
from tests.sources.test_torch_files import LOADED, all_of, expected
from tests.support.cut_off import cut_off
from tests.support.dcp_checkpoints import cut_along, save_dcp, whole
from tests.support.dcp_ranks import PLACEMENTS
from tests.support.language_models import examples_for, save_language_model
from tests.support.models import random_model, random_tensor, save_model
from tests.support.sampling import examples, sample
from tests.test_imports import loaded_after

WEIGHTS = "model.safetensors"


def loaded(folder, tensors, under="model"):
    """Return what torch's loader makes of a checkpoint with tensors like these."""
    state = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    nested = state if under is None else {under: state}
    dcp.load(nested, checkpoint_id=str(folder), no_dist=True)
    return state


@st.composite
def boxes(draw, shape):
    """Boxes that fill a shape, made by cuts of boxes."""
    found = [((0,) * len(shape), tuple(shape))]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        number = draw(st.integers(0, len(found) - 1))
        offsets, sizes = found[number]
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[axis]))
        first = (offsets, (*sizes[:axis], at, *sizes[axis + 1 :]))
        moved = (*offsets[:axis], offsets[axis] + at, *offsets[axis + 1 :])
        second = (moved, (*sizes[:axis], sizes[axis] - at, *sizes[axis + 1 :]))
        found[number : number + 1] = [first, second]
    # torch knows a chunk by its first element, so that an empty one must not begin where another
    # does.
    filled = {offsets for offsets, sizes in found if 0 not in sizes}
    kept = {box[0]: box for box in found if 0 not in box[1] or box[0] not in filled}
    return draw(st.permutations(list(kept.values())))


@st.composite
def cut_tensors(draw):
    dtype = getattr(torch, draw(st.sampled_from(LOADED)))
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    count = int(torch.Size(shape).numel())
    seed = draw(st.integers(0, 2**16))
    values = torch.tensor(random.Random(seed).choices(range(200), k=count)).to(dtype)
    return values.reshape(shape), draw(boxes(shape))


def transposed(chunk):
    """Return a chunk whose elements lie in the file in another order."""
    return chunk.clone() if chunk.ndim < 2 else chunk.transpose(0, 1).contiguous().transpose(0, 1)


@settings(max_examples=examples(30), deadline=None)
@given(st.lists(cut_tensors(), min_size=1, max_size=4), st.booleans())
def test_any_boxes_are_read_as_torch_loads(tmp_path_factory, tensors, is_transposed):
    named = {f"t{number}": tensor for number, (tensor, _) in enumerate(tensors)}
    cuts = {f"t{number}": cut for number, (_, cut) in enumerate(tensors)}
    folder = save_dcp(
        tmp_path_factory.mktemp("m"),
        named,
        cut=lambda name, _: cuts[name],
        **({"stored": transposed} if is_transposed else {}),
    )
    source = open_source(str(folder))
    whole_tensors = all_of(source)
    assert whole_tensors == expected(loaded(folder, named))
    reader = source.open_reader()
    for row, info in enumerate(source.tensors):
        content, width = whole_tensors[info.name][2], element_nbytes(info.dtype)
        for start in range(info.num_elements):
            part = bytearray((info.num_elements - start + 1) // 2 * width)
            reader.read(row, start, memoryview(part))
            assert bytes(part) == content[start * width : start * width + len(part)]
    reader.close()


def test_large_chunks_are_read_in_pieces(tmp_path):
    """By columns, by rows, and in another order, with more than a buffer between neighbours."""
    tensors = {"a": random_tensor((1500, 900), seed=1), "b": random_tensor((60, 70, 80), seed=2)}
    for axis in range(3):
        folder = save_dcp(tmp_path / f"{axis}", tensors, cut=cut_along(axis, 3), stored=transposed)
        source = open_source(str(folder))
        assert source.tensors.decoded.all()
        assert all_of(source) == expected(tensors)


def test_whole_chunks_are_ranges_of_files(tmp_path):
    tensors = random_model(1) | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    source = open_source(str(save_dcp(tmp_path / "m", tensors)))
    assert source.tensors.decoded is None
    assert all_of(source) == expected(tensors)


@pytest.mark.parametrize("under", ["model", "state_dict", None])
def test_torch_s_own_checkpoints_are_read(tmp_path, under):
    """With optimizer, step and extra state, which are not the model's."""
    tensors = random_model(2)
    model = tensors | {"x._extra_state": "text"}
    state = model if under is None else {under: model}
    optimizer = {"state": [{"exp_avg": torch.ones(3)}], "lr": 0.1}
    dcp.save(
        state | {"optimizer": optimizer, "epoch": 3}, checkpoint_id=str(tmp_path), no_dist=True
    )
    assert all_of(open_source(str(tmp_path))) == expected(tensors)


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """Checkpoints that four processes saved together."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "tests.support.dcp_ranks", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("way", [*PLACEMENTS, "fsdp", "flat"])
def test_checkpoints_of_ranks_are_read(by_ranks, way):
    """FSDP, tensor parallelism and both; the optimizer's tensors are left."""
    state = torch.load(by_ranks / f"{way}.bin", weights_only=False)
    model = state.get("model", state)
    tensors = {name: x for name, x in model.items() if isinstance(x, torch.Tensor)}
    source = open_source(str(by_ranks / way))
    assert all_of(source) == expected(tensors)
    assert len(tensors) > 5
    is_whole = way == "whole"
    assert (source.tensors.decoded is None) == is_whole
    assert is_whole or source.tensors.decoded.sum() > len(tensors) / 2


def test_checkpoints_of_ranks_are_joined(by_ranks, tmp_path):
    report = shardmix.convert(by_ranks / "both", tmp_path / "out")
    stored = torch.load(by_ranks / "both.bin", weights_only=False)["model"]
    joined = load_file(tmp_path / "out" / WEIGHTS)
    assert joined.keys() == stored.keys()
    assert all(torch.equal(joined[name], stored[name]) for name in joined)
    assert report.num_models == 1


WAYS = [{}, {"io": "mmap", "dtype": "bfloat16"}, {"backend": "torch"}]
MERGES = [(method, way) for method in ("linear", "slerp", "task_arithmetic") for way in WAYS]


@pytest.mark.parametrize(
    ("method", "way"), sample("merges of DCP", MERGES, 3, kinds=lambda case: map(str, case))
)
def test_merges_are_those_of_safetensors(tmp_path, method, way):
    dtype = torch.bfloat16 if "dtype" in way else torch.float32
    models = [random_model(seed, dtype) for seed in range(3)]
    cuts = [whole, cut_along(0, 4), cut_along(1, 3)]
    for kind in ("dcp", "new"):
        sources = [
            save_dcp(tmp_path / f"dcp{number}", tensors, cut=cut)
            if kind == "dcp"
            else save_model(tmp_path / f"new{number}", tensors, config={})
            for number, (tensors, cut) in enumerate(zip(models, cuts, strict=True))
        ]
        asked = {"method": method, **way}
        if method == "slerp":
            asked |= {"base_model": sources[1], "parameters": {"t": 0.3}}
            shardmix.merge(sources[1:], tmp_path / kind, **asked)
            continue
        if method == "task_arithmetic":
            asked["base_model"] = sources[0]
        shardmix.merge(zip(sources[1:], (0.3, 0.7), strict=True), tmp_path / kind, **asked)
    assert (tmp_path / "dcp" / WEIGHTS).read_bytes() == (tmp_path / "new" / WEIGHTS).read_bytes()
    assert sorted(path.name for path in (tmp_path / "dcp").iterdir()) == sorted(
        path.name for path in (tmp_path / "new").iterdir()
    )
    assert shardmix.verify(tmp_path / "dcp").is_verified
    assert shardmix.verify(tmp_path / "dcp", recompute=True).problems == ()


def test_folders_of_accelerate_are_read(tmp_path):
    """The config and tokenizer lie around the checkpoint; either folder may be given."""
    tensors = random_model(3)
    folder = tmp_path / "checkpoint-10"
    inner = save_dcp(folder / "pytorch_model_fsdp_0", tensors, cut=cut_along(0, 2))
    save_dcp(folder / "optimizer_0", {"exp_avg": torch.ones(3)}, under="optimizer")
    (inner / "config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer.json").write_text("{}")
    for number, named in enumerate((folder, inner)):
        source = open_source(str(named))
        assert source.config == {"model_type": "test"}
        assert source.public_name == "checkpoint-10"
        assert source.path == str(named)
        out = tmp_path / f"out{number}"
        shardmix.convert(named, out)
        assert sorted(path.name for path in out.iterdir()) == [
            *("README.md", "config.json", WEIGHTS, "shardmix.json", "tokenizer.json")
        ]
        stored = load_file(out / WEIGHTS)
        assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    other = save_model(tmp_path / "other", random_model(4))
    shardmix.merge({inner: 0.5, other: 0.5}, tmp_path / "merged", config_from=inner)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_plan_loads_no_torch(tmp_path):
    models = {
        str(save_dcp(tmp_path / each, random_model(1), cut=cut_along(0, 2))): 0.5 for each in "ab"
    }
    code = f"import shardmix\nassert shardmix.plan_merge({models!r}, 'out').num_tensors"
    assert loaded_after(code) == "[]"


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("under", ["model", "app", None])
def test_names_of_wrappers_go_away(tmp_path, wrapper, under):
    tensors = random_model(5)
    state = {f"{wrapper}{name}": tensor for name, tensor in tensors.items()}
    optim = {"exp_avg": torch.ones(2)}
    if under == "app":
        state = {"app": {"model": state, "optim": optim}}
    elif under is not None:
        state = {under: state, "optim": optim}
    dcp.save(state, checkpoint_id=str(tmp_path / "m"), no_dist=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    shardmix.convert(tmp_path / "m", tmp_path / "out")
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


def test_a_folder_of_that_name_is_none(tmp_path):
    """Such as an editor's workspace."""
    (tmp_path / ".metadata").mkdir()
    with pytest.raises(SourceError, match=r"has neither model\.safetensors nor"):
        open_source(str(tmp_path))


def test_other_weights_come_first(tmp_path):
    folder = tmp_path / "checkpoint-10"
    save_dcp(folder / "pytorch_model_fsdp_0", random_model(3))
    save_model(folder, random_model(4))
    assert [file.name for file in open_source(str(folder)).identity.files] == [WEIGHTS]
    (folder / WEIGHTS).unlink()
    save_dcp(folder / "pytorch_model_fsdp_1", random_model(3))
    with pytest.raises(SourceError, match="holds several distributed checkpoints: pytorch_mod"):
        open_source(str(folder))


def test_cut_off_merges_go_on(tmp_path):
    tensors = [
        {f"w{n}": random_tensor((1024, 1024), seed=9 * k + n) for n in range(4)} for k in (0, 1)
    ]
    sources = [
        save_dcp(tmp_path / f"m{number}", each, cut=cut_along(number, 3))
        for number, each in enumerate(tensors)
    ]
    out = tmp_path / "out"
    models = dict.fromkeys(sources, 0.5)
    cut_off(models, out, num_leaves=2, record_paths=True)
    report = shardmix.merge(models, out, record_paths=True)
    assert report.bytes_kept > 0
    assert shardmix.verify(out, recompute=True).problems == ()
    merged = load_file(out / WEIGHTS)
    for name, first in tensors[0].items():
        assert torch.equal(merged[name], first * 0.5 + tensors[1][name] * 0.5)


@pytest.mark.parametrize("kind", ["tied", "not tied", "another value"])
@pytest.mark.parametrize("cut", [whole, cut_along(0, 3)], ids=["whole", "in chunks"])
def test_tied_copies_are_left_out(tmp_path, kind, cut):
    """A tied head is stored a second time, as transformers never does in safetensors."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": kind != "not tied",
    }
    sources = []
    for seed in range(2):
        tensors = {
            "model.embed_tokens.weight": random_tensor((6, 4), seed=seed),
            "model.norm.weight": random_tensor((4,), seed=9 + seed),
        }
        head = tensors["model.embed_tokens.weight"].clone()
        if kind == "another value":
            head[0, 0] += 1
        folder = save_dcp(tmp_path / f"m{seed}", tensors | {"lm_head.weight": head}, cut=cut)
        (folder / "config.json").write_text(json.dumps(config))
        sources.append((folder, 0.5))
    shardmix.merge(sources, tmp_path / "out")
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert ("lm_head.weight" in merged) == (kind != "tied")
    assert len(merged) == 2 + (kind != "tied")


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    """The `.metadata` of a small checkpoint."""
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(300, 2, 2), "c": torch.ones(5)}
    folder = save_dcp(tmp_path_factory.mktemp("m") / "m", tensors, cut=cut_along(0, 3))
    return (folder / ".metadata").read_bytes()


def facts(content, *, uses_patterns):
    """Return all that a description says, or the kind of error that it is refused with."""
    try:
        found = dcp_metadata._Machine(content, uses_patterns=uses_patterns).run().state
    except dcp_metadata._Unusual:
        return facts(content, uses_patterns=False)
    except Exception as error:
        return type(error)
    if not isinstance(found, dcp_metadata.DcpMetadata):
        return type(found)
    records = found.records
    stored = [records.files[number] for number in records.file_numbers], records.transformed
    rows = {
        (name, chunk.offsets): records.row(name, chunk.offsets)
        for name, tensor in found.tensors.items()
        for chunk in tensor.chunks
    }
    places = list(records.offsets), list(records.lengths)
    return found.tensors, list(found.others), dict(found.paths), stored, rows, places


@settings(max_examples=examples(50), deadline=None)
@given(st.data())
def test_patterns_change_no_meaning(description, data):
    """Chunks and records are read by patterns as instruction by instruction, also damaged ones."""
    content = bytearray(description)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(11, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b"\x94h)\x81}(Kubj")))
    found = [facts(bytes(content), uses_patterns=each) for each in (True, False)]
    if isinstance(found[1], type):
        assert isinstance(found[0], type)
    else:
        assert found[0] == found[1]
    with suppress(ShardmixError):  # anything else is a fault
        dcp_metadata.read_metadata(bytes(content))


def test_few_records_are_taken_apart(tmp_path, monkeypatch):
    """Of a thousand that differ in their elements only, one is; of odd ones, each."""
    taken = []
    take_apart = RecordReader._take_apart
    monkeypatch.setattr(
        RecordReader,
        "_take_apart",
        lambda self, *place: taken.append(place) or take_apart(self, *place),
    )
    tensors = {f"w{n}": random_tensor((4, 6), seed=n) for n in range(100)}
    folder = save_dcp(tmp_path / "m", tensors, cut=cut_along(0, 2), num_files=1)
    assert all_of(open_source(str(folder))) == expected(tensors)
    assert len(taken) == 1
    content = bytearray((folder / "__0_0.distcp").read_bytes())
    length = taken[0][2]
    # The name of the storage in the directory at the end of one record.
    at = content.rindex(b"archive/data/0", 7 * length, 8 * length)
    content[at : at + 14] = b"archive/data/1"
    (folder / "__0_0.distcp").write_bytes(content)
    with pytest.raises(SourceError, match=r"the record of 'w3' at \[2, 0\]: lacks the storage '0'"):
        open_source(str(folder))


def test_scores_and_logits_are_the_same(tmp_path):
    """As in safetensors, from a folder as accelerate leaves it."""
    stored = save_language_model("llama", tmp_path / "stored")
    model = LlamaForCausalLM.from_pretrained(stored)
    folder = tmp_path / "checkpoint-3"
    save_dcp(folder / "pytorch_model_fsdp_0", model.state_dict(), cut=cut_along(0, 2))
    (folder / "pytorch_model_fsdp_0" / "config.json").unlink()
    for path in stored.iterdir():
        if path.suffix == ".json" and "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    examples = examples_for("llama")
    losses = [score([each], "decoder", examples).losses for each in (stored, folder)]
    assert losses[0] == losses[1]
    shardmix.convert(folder, tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_damaged_records_are_no_fault(tmp_path_factory, data):
    """They are refused, or read if only elements are damaged."""
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(30, 2), "c": torch.ones(())}
    folder = save_dcp(tmp_path_factory.mktemp("m") / "m", tensors, cut=cut_along(0, 2), num_files=1)
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 10_000)) % len(content)
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(content)
    with suppress(ShardmixError):  # anything else is a fault
        assert all_of(open_source(str(folder))).keys() == tensors.keys()
