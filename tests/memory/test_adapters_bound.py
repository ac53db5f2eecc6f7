"""Adapters keep the projection, whatever their matrices take; peak resident in a fresh process."""

import itertools

import pytest
import torch

from tests.support.adapters import PREFIX, random_adapter, save_adapter
from tests.support.models import save_model
from tests.support.peaks import check_peak
from tests.support.sampling import sample

pytestmark = pytest.mark.machine

SHAPES = {
    "embed.weight": (60_000, 512),
    "wide.weight": (512, 30_000),
    **{f"layers.{number}.up.weight": (3000, 1000) for number in range(9)},
}
MODULES = [name.removesuffix(".weight") for name in SHAPES]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of 150 MB; an adapter of rank 200 on all of it, one of DoRA, and eight small ones."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    block = torch.randn(512_000).bfloat16()
    tensors = {
        name: block.repeat(-(-rows * columns // len(block)))[: rows * columns].view(rows, columns)
        for name, (rows, columns) in SHAPES.items()
    }
    save_model(folder / "base", {name: tensor.clone() for name, tensor in tensors.items()})
    save_adapter(folder / "large", random_adapter(tensors, MODULES, rank=200), r=200)
    scaled = random_adapter(tensors, MODULES)
    for module in MODULES:
        scaled[f"{PREFIX}{module}.lora_magnitude_vector"] = torch.rand(
            SHAPES[f"{module}.weight"][0]
        )
    swapped = {name: tensor for name, tensor in scaled.items() if ".embed." not in name}
    swapped[f"{PREFIX}embed.lora_embedding_A"] = torch.randn(4, 60_000)
    swapped[f"{PREFIX}embed.lora_embedding_B"] = torch.randn(512, 4)
    swapped[f"{PREFIX}embed.lora_magnitude_vector"] = torch.rand(512)
    save_adapter(folder / "scaled", swapped, use_dora=True)
    for number in range(8):
        matrices = random_adapter(tensors, MODULES, seed=number, dtype=torch.bfloat16)
        save_adapter(folder / f"small{number}", matrices)
    return folder


CASES = list(itertools.product(["large", "scaled", "small"], ["torch", "auto"], [None, "small"]))


@pytest.mark.parametrize(("adapters", "backend", "chunk"), sample("peaks of adapters", CASES, 3))
def test_peak_is_projected(models, tmp_path, adapters, backend, chunk):
    """Without a budget, and with the least one that works."""
    names = [f"small{number}" for number in range(8)] if adapters == "small" else [adapters]
    texts = [[f"{models / 'base'}+{models / name}", 1 / len(names)] for name in names]
    check_peak(texts, tmp_path / "out", backend=backend, is_least=chunk is not None)
