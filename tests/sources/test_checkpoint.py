import json
import os

import pytest
import torch
from safetensors.torch import save_file

from shardmix import api
from shardmix.errors import SourceError
from shardmix.matching.tensors import check_mergeable
from shardmix.sources import headers as headers_module
from shardmix.sources.checkpoint import open_checkpoint
from tests.support.models import CONFIG, random_model, save_model


def refused(source):
    with pytest.raises(SourceError) as caught:
        check_mergeable(open_checkpoint(str(source)))
    return str(caught.value)


def test_a_single_file_and_shards_describe_the_same_tensors(tmp_path):
    tensors = random_model(1)
    names = sorted(tensors)
    whole = open_checkpoint(str(save_model(tmp_path / "whole", tensors)))
    parts = open_checkpoint(
        str(save_model(tmp_path / "parts", tensors, shards=[names[::2], names[1::2]]))
    )
    assert (len(whole.shards), len(parts.shards)) == (1, 2)
    assert sorted(whole.table.names) == sorted(parts.table.names) == names
    for checkpoint in (whole, parts):
        for tensor in checkpoint.tensors():
            assert tensor.shape == tuple(tensors[tensor.name].shape)
            assert tensor.dtype == "F32"


def test_offsets_point_at_the_data_in_the_file(tmp_path):
    tensors = random_model(2, torch.bfloat16)
    checkpoint = open_checkpoint(str(save_model(tmp_path / "m", tensors)))
    content = checkpoint.shards[0].path.read_bytes()
    for tensor in checkpoint.tensors():
        data = content[tensor.start : tensor.start + tensor.nbytes]
        assert data == bytes(tensors[tensor.name].view(-1).view(torch.uint8).tolist())


def test_a_file_is_a_source_and_its_folder_gives_the_config(tmp_path):
    save_model(tmp_path / "m", random_model(1))
    checkpoint = open_checkpoint(str(tmp_path / "m" / "model.safetensors"))
    assert checkpoint.is_single_file
    assert checkpoint.config == CONFIG


def test_links_out_of_the_folder_are_followed_as_in_the_hub_cache(tmp_path):
    repository = tmp_path / "models--org--name"
    blobs = save_model(repository / "blobs", random_model(1), config=None)
    (blobs / "model.safetensors").rename(blobs / "0123abcd")
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    assert open_checkpoint(str(snapshot)).num_tensors == len(random_model(1))


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "none")


def test_an_empty_folder_is_refused(tmp_path):
    assert "is empty; a model's folder has model.safetensors or" in refused(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "only as pickle" in refused(tmp_path)
    assert "safe_serialization=True" in refused(tmp_path)
    assert "not a .safetensors file" in refused(tmp_path / "pytorch_model.bin")


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path)


def test_a_file_of_another_name_is_pointed_out(tmp_path):
    save_file({"t": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert "weights.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused_and_named(tmp_path, num_bytes):
    path = save_model(tmp_path, random_model(1)) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:num_bytes])
    message = refused(tmp_path)
    assert "model.safetensors" in message
    assert "fetch it again" in message


def test_trailing_bytes_are_refused(tmp_path):
    path = save_model(tmp_path, random_model(1)) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "describes" in refused(tmp_path)


def raw_file(path, header, data_nbytes):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(data_nbytes))


@pytest.mark.parametrize(
    ("header", "data_nbytes"),
    [
        (b"not json at all", 4),
        ({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8),
        ({"t": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, 8),
        ({"t": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, 8),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
            },
            12,
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            12,
        ),
        ({"__metadata__": {"format": 3}}, 0),
    ],
    ids=["json", "size", "negative", "overflow", "hole", "overlap", "metadata"],
)
def test_a_header_that_safetensors_would_not_accept_is_refused(tmp_path, header, data_nbytes):
    raw_file(tmp_path / "model.safetensors", header, data_nbytes)
    assert "model.safetensors" in refused(tmp_path)


def sharded(tmp_path):
    names = sorted(random_model(1))
    return save_model(tmp_path / "m", random_model(1), shards=[names[:3], names[3:]])


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not in the folder" in refused(folder)


def test_an_index_that_names_an_absent_tensor_is_refused(tmp_path):
    folder = sharded(tmp_path)
    shard = "model-00001-of-00002.safetensors"
    edit_index(folder, lambda index: index["weight_map"].update({"ghost.weight": shard}))
    assert "ghost.weight" in refused(folder)


def test_a_shard_with_a_tensor_that_the_index_lacks_is_refused(tmp_path):
    folder = sharded(tmp_path)
    edit_index(folder, lambda index: index["weight_map"].pop("lm_head.weight"))
    assert "lm_head.weight" in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["../m2/model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..\\x", 3],
)
def test_an_index_that_points_outside_the_folder_is_refused(tmp_path, name):
    folder = sharded(tmp_path)
    save_model(tmp_path / "m2", random_model(1))
    edit_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    message = refused(folder)
    assert "outside the model's folder" in message or "no weight_map from tensor names" in message


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": ["x"]}}'],
)
def test_a_damaged_index_is_refused(tmp_path, content):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(folder)


def test_a_damaged_config_is_refused(tmp_path):
    folder = save_model(tmp_path, random_model(1))
    (folder / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(folder)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path)


def test_a_fifo_in_place_of_a_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtypes_whose_weighted_sum_would_be_wrong_are_refused(tmp_path, dtype):
    save_file({"w": torch.zeros(4, dtype=dtype)}, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}: w [4] is ")
    assert "silently wrong" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.q_proj.qweight",
        "model.layers.0.q_proj.weight.absmax",
        "model.layers.0.q_proj.weight.quant_state.bitsandbytes__nf4",
        "model.layers.0.q_proj.weight_scale_inv",
        "model.layers.0.experts.gate_up_proj_blocks",
    ],
)
def test_marks_of_quantised_weights_are_refused(tmp_path, name):
    tensors = {name: torch.zeros(4, dtype=torch.uint8), "w": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "quantised" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_matrices_of_packed_integers_are_refused_whatever_their_names(tmp_path, dtype):
    tensors = {"layer.W_q": torch.zeros(4, 4, dtype=dtype), "w": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "layer.W_q" in refused(tmp_path)


def test_integer_buffers_of_ordinary_models_are_fine(tmp_path):
    tensors = {
        "embeddings.position_ids": torch.arange(4)[None],
        "relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "num_batches_tracked": torch.tensor(3, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    check_mergeable(open_checkpoint(str(tmp_path)))


def test_metadata_may_have_keys_named_like_a_tensors_fields(tmp_path):
    metadata = {"shape": "round", "dtype": "any", "data_offsets": "none"}
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", metadata=metadata)
    assert open_checkpoint(str(tmp_path)).table.names == ("w",)


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_other_ways_to_declare_quantisation_are_known(tmp_path, key):
    config = {**CONFIG, key: {"bits": 4}}
    assert "is quantised" in refused(save_model(tmp_path, random_model(1), config=config))


def test_a_config_that_declares_quantisation_is_refused(tmp_path):
    config = {**CONFIG, "text_config": {"quantization_config": {"quant_method": "gptq"}}}
    assert "gptq" in refused(save_model(tmp_path, random_model(1), config=config))


def test_what_cannot_be_merged_can_still_be_inspected(tmp_path):
    save_file({"w": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert api.inspect(tmp_path).dtypes == {"F8_E4M3": 4}


def test_a_disk_error_is_named_and_no_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.iterdir", fail)
    with pytest.raises(SourceError, match="Permission denied"):
        api.inspect(tmp_path)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_no_mapping_of_a_file_that_may_shrink_is_ever_made(tmp_path, monkeypatch):
    """safetensors maps what it opens; a cut in that moment would kill the process."""
    opened = []
    real = headers_module.safe_open

    def seen(path, **options):
        opened.append(str(path))
        return real(path, **options)

    monkeypatch.setattr(headers_module, "safe_open", seen)
    open_checkpoint(str(save_model(tmp_path / "m", random_model(1))))
    assert len(opened) == 1
    assert not opened[0].startswith(str(tmp_path))
