"""Headers are decoded once, and a known one is no licence for another file."""

import pytest

import shardmix
from shardmix.errors import SourceError
from shardmix.sources import headers as headers_module
from shardmix.sources.headers import Headers
from tests.support.models import random_model, save_model


def model_file(folder, seed):
    return save_model(folder, random_model(seed)) / "model.safetensors"


def read(headers, path):
    return headers.read(path, path.stat().st_size, num_before=0, max_memory=None)


@pytest.fixture
def decoded(monkeypatch):
    calls = []
    decode = headers_module.decode_header

    def counted(header, *, file_nbytes):
        calls.append(header)
        return decode(header, file_nbytes=file_nbytes)

    monkeypatch.setattr(headers_module, "decode_header", counted)
    return calls


def test_shared_header_is_decoded_once(tmp_path, decoded):
    """A header that two models share is decoded once."""
    headers = Headers()
    first = read(headers, model_file(tmp_path / "a", 1))
    second = read(headers, model_file(tmp_path / "b", 2))
    assert first.sha256 == second.sha256
    assert first.names is second.names
    assert len(decoded) == 1


def test_other_headers_are_not_taken_for_it(tmp_path, decoded):
    headers = Headers()
    first = read(headers, model_file(tmp_path / "a", 1))
    tensors = random_model(2)
    name = max(tensors)
    other = save_model(tmp_path / "b", {name: tensors[name]}) / "model.safetensors"
    assert read(headers, other).names == [name] != first.names
    assert len(decoded) == 2


def test_cut_file_of_known_header_is_refused(tmp_path):
    """A file cut short is refused though its header is known."""
    headers = Headers()
    read(headers, model_file(tmp_path / "a", 1))
    cut = model_file(tmp_path / "b", 2)
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(SourceError, match="a download may have been cut off"):
        read(headers, cut)


def test_plan_decodes_each_header_once(tmp_path, decoded):
    """A merge is planned with each header decoded once."""
    models = {str(model_file(tmp_path / name, seed).parent): 0.5 for seed, name in enumerate("ab")}
    shardmix.plan_merge(models)
    assert len(decoded) == 1
