import re
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

import shardmix
from shardmix.dtypes import BY_NAME, CODE, COMPLEX, DTYPES, FLOAT, LLVM_DTYPES, OUT_DTYPES
from tests.support.models import CONFIG

WITH_TORCH = [dtype for dtype in BY_NAME.values() if dtype.torch_name is not None]
FLOATS = [dtype for dtype in BY_NAME.values() if dtype.kind == FLOAT]
UNMERGED = [dtype.name for dtype in BY_NAME.values() if dtype.kind in (CODE, COMPLEX)]


@pytest.mark.parametrize("dtype", WITH_TORCH, ids=lambda dtype: dtype.name)
def test_torch_has_the_width(dtype):
    assert getattr(torch, dtype.torch_name).itemsize * 8 == dtype.bits


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_infinity_has_these_bits(dtype):
    value = torch.tensor([float("inf")], dtype=getattr(torch, dtype.torch_name))
    bits = np.frombuffer(value.view(torch.uint8).numpy().tobytes(), dtype.numpy_name)
    assert bits.tolist() == [dtype.infinity]


def test_ranks_are_the_librarys():
    """The library writes the highest rank first."""
    tensors = {
        dtype.name: torch.zeros(8).to(getattr(torch, dtype.torch_name)) for dtype in WITH_TORCH
    }
    encoded = safetensors.torch.save(tensors)
    (length,) = struct.unpack("<Q", encoded[:8])
    written = re.findall(r'"(\w+)":\{"dtype"', encoded[8 : 8 + length].decode())
    assert written == [name for name in reversed(DTYPES) if name in tensors]


def test_kernels_and_outputs_are_floats():
    floats = {dtype.name for dtype in FLOATS}
    assert floats > LLVM_DTYPES
    assert set(OUT_DTYPES.values()) < floats


@pytest.mark.parametrize("dtype", UNMERGED)
def test_codes_are_refused_by_name(tmp_path, dtype):
    header = f'{{"w":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,{BY_NAME[dtype].bits}]}}}}'
    header += " " * (-len(header) % 8)
    for name in "ab":
        (tmp_path / name).mkdir()
        content = struct.pack("<Q", len(header)) + header.encode() + bytes(BY_NAME[dtype].bits)
        (tmp_path / name / "model.safetensors").write_bytes(content)
        (tmp_path / name / "config.json").write_text(str(CONFIG).replace("'", '"'))
    with pytest.raises(shardmix.ShardmixError, match=rf"w \[8\] is {dtype};"):
        shardmix.plan_merge({str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5})
