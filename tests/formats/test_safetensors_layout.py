import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from shardmix.dtypes import DTYPES, FLOAT_DTYPES, INTEGER_DTYPES, tensor_nbytes
from shardmix.errors import SourceError
from shardmix.formats.safetensors_header import decode_header
from shardmix.formats.safetensors_layout import (
    MAX_HEADER_NBYTES,
    TensorInfo,
    encode_header,
    header_nbytes,
)

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}

entries = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)
    ),
    min_size=1,
    max_size=8,
)


@given(entries)
def test_headers_are_as_safetensors_writes(tensors):
    """Headers are laid out as safetensors does."""
    saved = save(
        {
            name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
            for name, (dtype, shape) in tensors.items()
        },
        metadata={"format": "pt"},
    )
    triples = ((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    header = encode_header(triples, {"format": "pt"})
    assert saved.startswith(header.encoded)
    assert header.file_nbytes == len(saved)


@given(entries)
def test_a_decoded_header_is_the_encoded_one(tensors):
    triples = ((name, dtype, shape) for name, (dtype, shape) in tensors.items())
    metadata = {"format": "pt", "title": 'a "}, {" of\n\x00'}
    header = encode_header(triples, metadata)
    decoded = decode_header(header.encoded[8:], file_nbytes=header.file_nbytes)
    data_start = len(header.encoded)
    assert tuple(decoded.names) == header.names
    assert list(decoded.metadata.items()) == list(metadata.items())
    expected = [tensors[name] for name in header.names]
    assert decoded.shapes == [tuple(shape) for _, shape in expected]
    assert [DTYPES[rank] for rank in decoded.dtype_ranks] == [dtype for dtype, _ in expected]
    assert (decoded.starts + data_start).tolist() == list(header.offsets[:-1])
    assert decoded.nbytes.tolist() == np.diff(header.offsets).tolist()


def test_every_dtype_is_summed_or_refused():
    """Every dtype is a float, an integer or refused."""
    refused = set(DTYPES) - FLOAT_DTYPES - INTEGER_DTYPES
    assert all(dtype.startswith(("F8_", "F4", "F6_", "C64")) for dtype in refused)
    assert len(refused) == 9


def test_scalar_has_one_element_empty_none():
    """A zero-dimensional tensor has one element, and an empty one none."""
    assert tensor_nbytes("F32", ()) == 4
    assert tensor_nbytes("BF16", (3, 0, 5)) == 0
    assert TensorInfo("t", "F32", (), 8, 4).num_elements == 1


@pytest.mark.parametrize(
    ("prefix", "file_nbytes", "finding"),
    [
        (b"", 0, "is empty"),
        (b"\x01\x02\x03", 3, "too short"),
        ((100).to_bytes(8, "little"), 50, "claims a header of 100 bytes"),
        ((2**63).to_bytes(8, "little"), 5000, "claims a header"),
        ((MAX_HEADER_NBYTES + 1).to_bytes(8, "little"), 2**40, "allows 100000000 at most"),
        ((43).to_bytes(8, "little"), 50, "claims a header of 43 bytes but the file has 50"),
        ((2**32).to_bytes(8, "little"), 50, "is not a safetensors file; fetch it again"),
        ((2**20).to_bytes(8, "little"), 50, "may have been cut off; fetch it again"),
    ],
)
def test_impossible_length_is_refused_unread(prefix, file_nbytes, finding):
    """An impossible header length is refused before it is read."""
    with pytest.raises(SourceError, match=finding):
        header_nbytes(prefix, file_nbytes=file_nbytes)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"t":3}',
        b'{"t":{"dtype":"F32","shape":[1]}}',
        b'{"t":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}',
        b'{"t":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}',
        b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        b'{"t":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}',
        b'{"t":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_unparsable_header_is_refused(header):
    """A header that does not parse is refused."""
    with pytest.raises(SourceError, match=r"header|has a tensor"):
        decode_header(header, file_nbytes=8 + len(header) + 4)


@pytest.mark.parametrize("length", [60, 0x3C2020, 0x0403_4B50])
def test_lengths_that_look_like_text_pass(length):
    """`<`, a page's beginning, and `PK`, a zip file's, are numbers as well."""
    assert length <= MAX_HEADER_NBYTES
    assert header_nbytes(length.to_bytes(8, "little"), file_nbytes=2**30) == length


@pytest.mark.parametrize(
    ("num_bytes", "finding"),
    [
        (3, "describes {whole} bytes but the file has {there}, 5 too few; .* cut off"),
        (0, "describes {whole} bytes but the file has {there}, 8 too few; .* cut off"),
        (9, "has 1 byte too many at its end: .* {whole} bytes but the file has {there}; some"),
        (4096, "has 4088 bytes too many at its end"),
    ],
)
def test_too_few_and_too_many_bytes_differ(num_bytes, finding):
    """Only a file that is too short may have been cut off."""
    header = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    size = 8 + len(header)
    finding = finding.format(whole=size + 8, there=size + num_bytes)
    with pytest.raises(SourceError, match=finding) as caught:
        decode_header(header, file_nbytes=size + num_bytes)
    assert ("cut off" in str(caught.value)) == (num_bytes < 8)
