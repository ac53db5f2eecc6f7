import re
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

import shardmix
from shardmix.cli.commands import app
from shardmix.compute import llvm_loops
from shardmix.compute.torch_ops import TORCH_DTYPES, is_finite
from shardmix.dtypes import BY_NAME, CODE, COMPLEX, DTYPES, FLOAT, LLVM_DTYPES, OUT_DTYPES
from shardmix.formats.stored_floats import stored, widened
from shardmix.system import llvm_floats
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


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_each_float_is_known_everywhere(dtype):
    """Names the places that lack something of a float; a float with no kernel lacks no kernel."""
    places = {
        f"dtypes: the row's {field}": getattr(dtype, field) is not None
        for field in ("torch_name", "numpy_name", "infinity", "numpy_float")
    }
    places["compute.torch_ops.TORCH_DTYPES"] = dtype.name in TORCH_DTYPES
    if dtype.name in LLVM_DTYPES:
        places["system.llvm_floats.WIDEN"] = dtype.name in llvm_floats.WIDEN
        tables = {"ROUND": llvm_loops.ROUND, "NAN": llvm_loops.NAN}
        places |= {f"compute.llvm_loops.{name}": dtype.name in it for name, it in tables.items()}
    assert [place for place, is_there in places.items() if not is_there] == []


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_floats_are_widened_exactly(dtype):
    values = torch.randn(999, dtype=torch.float64).to(getattr(torch, dtype.torch_name))
    raw = memoryview(values.view(torch.uint8).numpy())
    wide = widened(stored(raw, dtype.name), dtype.name, np.float64)
    assert wide.dtype == np.float64
    assert wide.tolist() == values.double().tolist()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_torch_adds_each_float(dtype):
    """torch stores codes, such as FP8, but does not add them: a merge would fail in its midst."""
    out = torch.empty(2, dtype=getattr(torch, dtype.torch_name))
    out.copy_(torch.tensor([1.0, 2.0]))
    assert is_finite(out)
    assert out.add_(out).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_least_infinite_is_the_first(dtype):
    """The float32 of these bits becomes infinite, the one before it does not."""
    bits = np.array([dtype.least_infinite - 1, dtype.least_infinite], np.int64)
    if dtype.bits > 32:
        assert dtype.least_infinite == dtype.infinity
        return
    values = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    rounded = values.to(getattr(torch, dtype.torch_name))
    assert rounded.isinf().tolist() == [False, True]


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


@pytest.mark.parametrize(("command", "first"), [("merge", "keep"), ("score", "auto")])
def test_options_name_all_dtypes(command, first):
    option = next(each for each in app.commands[command].params if "--dtype" in each.opts)
    assert option.metavar.split("|") == [first, *OUT_DTYPES]


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
