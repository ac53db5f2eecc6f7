"""The `__metadata__` of the first model's files goes along, but for what is false of a merge."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

import shardmix
from shardmix.formats.file_metadata import merged_metadata
from shardmix.formats.safetensors_layout import encode_header

MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.title": 'Ein "Titel", größer als \u2028 andere',
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 10_000,
    "modelspec.hash_sha256": "0x31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
    "modelspec.merged_from": "a, b",
    "sshs_model_hash": "31e35c80",
    "sshs_legacy_hash": "7d8d",
    "ss_sd_model_hash": "be9edd61",
    "ss_tag_frequency": json.dumps({"cats": {"a cat": 3}}),
    "training.comment": "hashes of it are elsewhere",
}
FALSE = {
    "modelspec.hash_sha256",
    "modelspec.merged_from",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "ss_sd_model_hash",
}
TENSORS = {"b": torch.ones(3), "a": torch.ones(2).half()}


def model(folder, metadata, tensors=TENSORS):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text("{}")
    return folder


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def merged(tmp_path, first, second=None, **options):
    a, b = model(tmp_path / "a", first), model(tmp_path / "b", second)
    return shardmix.merge([(a, 0.5), (b, 0.5)], tmp_path / "out", **options)


def test_the_first_models_metadata_is_kept(tmp_path):
    report = merged(tmp_path, MODELSPEC, {"modelspec.title": "another", "author": "B"})
    metadata = metadata_of(tmp_path / "out" / "model.safetensors")
    kept = {key: text for key, text in MODELSPEC.items() if key not in FALSE}
    assert metadata == {**kept, "format": "pt"}
    (note,) = (text for text in report.warnings if "metadata" in text)
    assert "and 4 more left out (not true of a merge)" in note
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


@pytest.mark.parametrize(
    "metadata", [{"format": "pt"}, {"format": "mlx"}, {"format": "pt", "x": ""}]
)
def test_metadata_that_stays_is_no_news(tmp_path, metadata):
    report = merged(tmp_path, metadata)
    assert metadata_of(tmp_path / "out" / "model.safetensors") == metadata
    assert not any("metadata" in text for text in report.warnings)


@pytest.mark.parametrize("metadata", [None, {}])
def test_a_file_without_any_gets_a_format(tmp_path, metadata):
    merged(tmp_path, metadata, {"author": "B"})
    assert metadata_of(tmp_path / "out" / "model.safetensors") == {"format": "pt"}


def test_each_shard_keeps_its_own(tmp_path):
    for name in "ab":
        folder = model(tmp_path / name, {"author": "nobody"})
        (folder / "model.safetensors").unlink()
        for number, tensor in enumerate(TENSORS, start=1):
            save_file(
                {tensor: TENSORS[tensor]},
                folder / f"model-0000{number}-of-00002.safetensors",
                metadata={"part": f"{name}{number}", "md5": "0"},
            )
        weight_map = {
            tensor: f"model-0000{number}-of-00002.safetensors"
            for number, tensor in enumerate(TENSORS, start=1)
        }
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    models = [(tmp_path / "a", 0.5), (tmp_path / "b", 0.5)]
    shardmix.merge(models, tmp_path / "out")
    for number in (1, 2):
        path = tmp_path / "out" / f"model-0000{number}-of-00002.safetensors"
        assert metadata_of(path) == {"part": f"a{number}", "format": "pt"}
    report = shardmix.merge(models, tmp_path / "one", max_shard_size="1GB")
    assert metadata_of(tmp_path / "one" / "model.safetensors") == {"format": "pt"}
    assert any("'md5' and 1 more left out" in text for text in report.warnings)


def test_files_laid_out_anew_keep_the_format(tmp_path):
    report = merged(tmp_path, {"format": "mlx", "title": "t"}, max_shard_size=12)
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [metadata_of(path) for path in paths] == [{"format": "mlx"}] * 2
    reason = "the output's files have another layout"
    assert any(f"'title' left out ({reason})" in text for text in report.warnings)


def test_one_file_kept_whole_keeps_all(tmp_path):
    merged(tmp_path, {"format": "pt", "title": "t"}, max_shard_size="1GB")
    path = tmp_path / "out" / "model.safetensors"
    assert metadata_of(path) == {"format": "pt", "title": "t"}


@given(st.dictionaries(st.text(), st.text(), max_size=4))
def test_metadata_is_as_safetensors_writes(metadata):
    """Metadata is written as safetensors does.

    Byte for byte, but for the order of keys, which the library leaves to chance.
    """
    saved = save({"t": torch.zeros(2)}, metadata=metadata)
    length = 8 + int.from_bytes(saved[:8], "little")
    order = json.loads(saved[8:length]).get("__metadata__", {})
    assert order == metadata
    assert encode_header([("t", "F32", (2,))], order).encoded == saved[:length]


@pytest.mark.parametrize(
    ("key", "is_kept"),
    [
        *((key, key not in FALSE) for key in MODELSPEC),
        *(("hash", False), ("sha256", False), ("SHA256", False), ("x.autov2", False)),
        *(("hashtag", True), ("shape", True), ("author", True), ("rehashed", True)),
    ],
)
def test_what_is_false_of_a_merge(key, is_kept):
    assert (key in merged_metadata({key: "x"})) == is_kept
