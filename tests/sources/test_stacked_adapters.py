"""Adapters side by side: any range of a tensor is that part of the whole, and each way is right."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardmix.errors import SourceChangedError
from shardmix.sources import stacked_adapters
from shardmix.sources.resolve import open_source
from shardmix.sources.stacked_adapters import (
    COLUMNS,
    ROWS,
    SUM,
    StackedAdapters,
    StackedPart,
    StackedTensor,
)
from tests.support.adapters import PREFIX, save_adapter
from tests.support.models import save_model

RANKS = (3, 1, 4)
FACTORS = (0.5, -1.7, 3.3)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """Three adapters of other ranks and dtypes on one base, and the three ways to join them."""
    folder = tmp_path_factory.mktemp("stacked")
    save_model(folder / "base", {"w.weight": torch.zeros(6, 5), "w.bias": torch.zeros(6)})
    generator = torch.Generator().manual_seed(0)
    opened, matrices = [], []
    for number, (rank, dtype) in enumerate(zip(RANKS, DTYPES, strict=True)):
        a = torch.randn((rank, 5), generator=generator).to(dtype)
        b = torch.randn((6, rank), generator=generator).to(dtype)
        bias = torch.randn(6, generator=generator).to(dtype)
        named = {"lora_A.weight": a, "lora_B.weight": b, "lora_B.bias": bias}
        path = save_adapter(
            folder / str(number),
            {f"{PREFIX}w.{name}": tensor for name, tensor in named.items()},
            r=rank,
            lora_bias=True,
        )
        opened.append(open_source(f"{folder / 'base'}+{path}"))
        matrices.append((a.double().numpy(), b.double().numpy(), bias.double().numpy()))
    adapters = [source.adapter for source in opened]
    rows = [adapter.weights.tensors.names.index for adapter in adapters]

    def parts(name):
        return tuple(
            StackedPart(number, rows[number](f"{PREFIX}w.{name}"), FACTORS[number])
            for number in range(3)
        )

    tensors = (
        StackedTensor("a", (8, 5), ROWS, parts("lora_A.weight")),
        StackedTensor("b", (6, 8), COLUMNS, parts("lora_B.weight")),
        StackedTensor("c", (6,), SUM, parts("lora_B.bias")),
        StackedTensor("zeros", (6,), SUM, ()),
    )
    expected = (
        np.concatenate([a for a, _, _ in matrices]),
        np.concatenate([f * b for f, (_, b, _) in zip(FACTORS, matrices, strict=True)], axis=1),
        sum(f * bias for f, (_, _, bias) in zip(FACTORS, matrices, strict=True)),
        np.zeros(6),
    )
    return StackedAdapters(opened[0], adapters, tensors), expected


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    row=st.integers(0, 3),
    start=st.integers(0, 47),
    count=st.integers(0, 48),
    piece=st.sampled_from([1, 3, 7, 1 << 17]),
)
def test_ranges_are_parts_of_the_whole(stacked, row, start, count, piece):
    """However small the pieces are that it reads in."""
    source, expected = stacked
    whole = expected[row].astype(np.float32).reshape(-1)
    start = min(start, len(whole))
    found = np.empty(min(count, len(whole) - start), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_adapters, "_PIECE_NUM_ELEMENTS", piece)
        reader = source.open_reader()
        reader.read(row, start, found.view(np.uint8).data)
        reader.close()
    assert np.array_equal(found, whole[start : start + len(found)])


def test_blocks_take_turns(stacked):
    """Of stacked experts A has the ranks of one expert after the other, of all adapters each."""
    source, _ = stacked
    parts = source._stacked[0].parts
    three_and_one = (parts[0], parts[2]._replace(adapter=0, row=parts[0].row))
    tensor = StackedTensor("a", (6, 5), ROWS, three_and_one, num_blocks=3)
    found = np.empty((6, 5), np.float32)
    reader = StackedAdapters(source._inner, source._adapters, (tensor,)).open_reader()
    reader.read(0, 0, found.reshape(-1).view(np.uint8).data)
    reader.close()
    a = source._adapters[0].weights
    own = np.empty((3, 5), np.uint16)
    reader = a.open_reader()
    reader.read(parts[0].row, 0, own.reshape(-1).view(np.uint8).data)
    reader.close()
    values = (own.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(found, np.repeat(values, 2, axis=0))


def test_changed_adapter_is_found(tmp_path):
    base = save_model(tmp_path / "base", {"w.weight": torch.zeros(6, 5)})
    tensors = {
        f"{PREFIX}w.lora_A.weight": torch.ones(4, 5),
        f"{PREFIX}w.lora_B.weight": torch.ones(6, 4),
    }
    path = save_adapter(tmp_path / "a", tensors)
    adapted = open_source(f"{base}+{path}")
    source = StackedAdapters(adapted, [adapted.adapter], ())
    source.check_unchanged()
    save_adapter(tmp_path / "a", {**tensors, "x": torch.ones(3)})
    with pytest.raises(SourceChangedError):
        source.check_unchanged()
