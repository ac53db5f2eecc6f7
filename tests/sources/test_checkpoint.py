import json
import os
import pathlib

import pytest
import torch
from safetensors.torch import save_file

from shardmix import api
from shardmix.errors import SourceError
from shardmix.matching.tensors import check_mergeable
from shardmix.sources import headers as headers_module
from shardmix.sources.resolve import open_source
from tests.support.models import CONFIG, random_model, save_model


def refused(source):
    with pytest.raises(SourceError) as caught:
        check_mergeable(open_source(str(source)))
    return str(caught.value)


def test_file_and_shards_are_the_same(tmp_path):
    """A single file and shards describe the same tensors."""
    tensors = random_model(1)
    names = sorted(tensors)
    whole = open_source(str(save_model(tmp_path / "whole", tensors)))
    parts = open_source(
        str(save_model(tmp_path / "parts", tensors, shards=[names[::2], names[1::2]]))
    )
    assert (len(whole.identity.files), len(parts.identity.files)) == (1, 2)
    assert sorted(whole.tensors.names) == sorted(parts.tensors.names) == names
    for checkpoint in (whole, parts):
        for tensor in checkpoint.tensors:
            assert tensor.shape == tuple(tensors[tensor.name].shape)
            assert tensor.dtype == "F32"


def test_offsets_point_at_the_data(tmp_path):
    """Offsets point at the data in the file."""
    tensors = random_model(2, torch.bfloat16)
    checkpoint = open_source(str(save_model(tmp_path / "m", tensors)))
    content = pathlib.Path(checkpoint.identity.files[0].path).read_bytes()
    for tensor in checkpoint.tensors:
        data = content[tensor.start : tensor.start + tensor.nbytes]
        assert data == bytes(tensors[tensor.name].view(-1).view(torch.uint8).tolist())


def test_file_takes_its_folders_config(tmp_path):
    """A file is a source, and its folder gives the config."""
    save_model(tmp_path / "m", random_model(1))
    checkpoint = open_source(str(tmp_path / "m" / "model.safetensors"))
    assert checkpoint.is_single_file
    assert checkpoint.config == CONFIG


def test_links_out_of_folder_are_followed(tmp_path):
    """Links out of the folder are followed, as in the Hub's cache."""
    repository = tmp_path / "models--org--name"
    blobs = save_model(repository / "blobs", random_model(1), config=None)
    (blobs / "model.safetensors").rename(blobs / "0123abcd")
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    assert len(open_source(str(snapshot)).tensors) == len(random_model(1))


def test_missing_path_is_refused(tmp_path):
    """A path that does not exist is refused."""
    assert "no such file or folder" in refused(tmp_path / "none")


def test_an_empty_folder_is_refused(tmp_path):
    assert "is empty; a model's folder has model.safetensors or" in refused(tmp_path)


def test_pickled_weights_name_the_conversion(tmp_path):
    """Weights that are a plain pickle are refused, with the way to convert them."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert "pytorch_model.bin: is a pickle, which may run code" in refused(source)
        assert "save_file of safetensors" in refused(source)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.pkl")
    assert "only as pickle (model.pkl)" in refused(tmp_path)
    assert "safe_serialization=True" in refused(tmp_path)


def test_gguf_is_refused(tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path)


def test_file_of_other_name_is_pointed_out(tmp_path):
    """A file of another name is pointed out."""
    save_file({"t": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert "weights.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 40, -1])
def test_truncated_file_is_named(tmp_path, num_bytes):
    """A truncated file is refused and named."""
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
def test_invalid_header_is_refused(tmp_path, header, data_nbytes):
    """A header that safetensors would not accept is refused."""
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


def test_index_of_absent_tensor_is_refused(tmp_path):
    """An index that names an absent tensor is refused."""
    folder = sharded(tmp_path)
    shard = "model-00001-of-00002.safetensors"
    edit_index(folder, lambda index: index["weight_map"].update({"ghost.weight": shard}))
    assert "ghost.weight" in refused(folder)


def test_tensor_beside_the_index_is_refused(tmp_path):
    """A shard with a tensor that the index lacks is refused."""
    folder = sharded(tmp_path)
    edit_index(folder, lambda index: index["weight_map"].pop("lm_head.weight"))
    assert "lm_head.weight" in refused(folder)


@pytest.mark.parametrize(
    "name",
    ["../m2/model.safetensors", "/etc/model.safetensors", "a/../../b.safetensors", "..\\x", 3],
)
def test_index_pointing_outside_is_refused(tmp_path, name):
    """An index that points outside the folder is refused."""
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


def test_folder_for_a_file_is_refused(tmp_path):
    """A folder in place of a file is refused."""
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refused(tmp_path)


def test_fifo_for_a_file_is_refused_at_once(tmp_path):
    """A fifo in place of a file is refused without waiting for it."""
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_unsummable_dtypes_are_refused(tmp_path, dtype):
    """Dtypes whose weighted sum would be wrong are refused."""
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
def test_marks_of_quantisation_are_refused(tmp_path, name):
    """Marks of quantised weights are refused."""
    tensors = {name: torch.zeros(4, dtype=torch.uint8), "w": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "quantised" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_packed_integers_are_refused(tmp_path, dtype):
    """Matrices of packed integers are refused, whatever their names."""
    tensors = {"layer.W_q": torch.zeros(4, 4, dtype=dtype), "w": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "layer.W_q" in refused(tmp_path)


def test_ordinary_integer_buffers_are_fine(tmp_path):
    """Integer buffers of ordinary models are fine."""
    tensors = {
        "embeddings.position_ids": torch.arange(4)[None],
        "relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "mask": torch.ones(4, 4, dtype=torch.bool),
        "num_batches_tracked": torch.tensor(3, dtype=torch.int32),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    check_mergeable(open_source(str(tmp_path)))


def test_metadata_keys_may_be_any(tmp_path):
    """Metadata may have keys named like a tensor's fields."""
    metadata = {"shape": "round", "dtype": "any", "data_offsets": "none"}
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", metadata=metadata)
    assert open_source(str(tmp_path)).tensors.names == ("w",)


def test_a_dangling_link_is_named(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_other_quantisations_are_known(tmp_path, key):
    """Other ways to declare quantisation are known."""
    config = {**CONFIG, key: {"bits": 4}}
    assert "is quantised" in refused(save_model(tmp_path, random_model(1), config=config))


def test_quantised_config_is_refused(tmp_path):
    """A config that declares quantisation is refused."""
    config = {**CONFIG, "text_config": {"quantization_config": {"quant_method": "gptq"}}}
    assert "gptq" in refused(save_model(tmp_path, random_model(1), config=config))


def test_unmergeable_model_can_be_inspected(tmp_path):
    """What cannot be merged can still be inspected."""
    save_file({"w": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert api.inspect(tmp_path).dtypes == {"F8_E4M3": 4}


def test_disk_error_is_named(tmp_path, monkeypatch):
    """A disk error is named, and no traceback."""

    def fail(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.iterdir", fail)
    with pytest.raises(SourceError, match="Permission denied"):
        api.inspect(tmp_path)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files in memory")
def test_shrinking_file_is_never_mapped(tmp_path, monkeypatch):
    """No mapping of a file that may shrink is ever made.

    safetensors maps what it opens; a cut in that moment would kill the process.
    """
    opened = []
    real = headers_module.safe_open

    def seen(path, **options):
        opened.append(str(path))
        return real(path, **options)

    monkeypatch.setattr(headers_module, "safe_open", seen)
    open_source(str(save_model(tmp_path / "m", random_model(1))))
    assert len(opened) == 1
    assert not opened[0].startswith(str(tmp_path))
