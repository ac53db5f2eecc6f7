"""Tensors that are read in another order than the inner source's: any range, in bounded memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shardmix.formats.tensor_table import View
from shardmix.sources.gathering import BUFFER_NBYTES
from shardmix.sources.rearranged import RearrangedSource
from shardmix.sources.resolve import open_source
from tests.support.models import random_tensor, save_model


def turned(folder, dtype, shape=(3, 70, 41)):
    """Return a source with each matrix transposed, and its values."""
    tensor = random_tensor(shape, seed=1).to(dtype)
    inner = open_source(str(save_model(folder, {"plain": torch.ones(5), "w": tensor})))
    row = inner.tensors.names.index("w")
    count, rows, columns = shape
    table = inner.tensors
    shapes = list(table.shapes)
    shapes[row] = (count, columns, rows)
    table = replace(table, shapes=tuple(shapes))
    view = View(0, (rows * columns, 1, columns))
    source = RearrangedSource(inner, table, range(2), [0, 0], {row: view})
    return source, row, tensor.transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_range_is_read(tmp_path, dtype):
    source, row, values = turned(tmp_path / "m", dtype)
    right = values.view(torch.uint8).numpy().tobytes()
    width, num = values.itemsize, values.numel()
    rng = np.random.default_rng(0)
    reader = source.open_reader()
    for _ in range(50):
        start, stop = sorted(rng.integers(0, num + 1, 2).tolist())
        into = bytearray((stop - start) * width)
        reader.read(row, start, memoryview(into))
        assert bytes(into) == right[start * width : stop * width]
    plain = bytearray(20)
    reader.read(1 - row, 0, memoryview(plain))
    assert bytes(plain) == np.ones(5, np.float32).tobytes()
    reader.close()


def test_what_is_turned_is_decoded(tmp_path):
    """The engine does not read it from the file, and the plan's digest tells."""
    source, row, _ = turned(tmp_path / "m", torch.float32)
    assert source.extent(row) is None
    assert source.extent(1 - row) is not None
    assert "order" in source.identity.decoding
    assert source.open_reader().overhead_nbytes >= BUFFER_NBYTES


def test_fetches_are_bounded(tmp_path):
    """Of a large matrix, no more is held than the reader says."""
    source, row, values = turned(tmp_path / "m", torch.float32, (1, 3000, 400))
    reader = source.open_reader()
    lengths = []
    inner = reader._inner
    read = inner.read

    def noted(inner_row, start, into):
        lengths.append(len(into))
        read(inner_row, start, into)

    inner.read = noted
    into = bytearray(values.nbytes)
    reader.read(row, 0, memoryview(into))
    assert bytes(into) == values.view(torch.uint8).numpy().tobytes()
    assert max(lengths) <= BUFFER_NBYTES
