"""Distributed checkpoints keep the projection, however they are cut; peak in a fresh process."""

import itertools

import pytest
import torch

from tests.support.dcp_checkpoints import cut_along, save_dcp
from tests.support.peaks import check_peak
from tests.support.sampling import sample

pytestmark = pytest.mark.machine

SHAPES = {
    "embed.weight": (60_000, 512),
    "wide.weight": (512, 30_000),
    **{f"layers.{number}.up.weight": (3000, 1000) for number in range(9)},
}
CUTS = {"rows": cut_along(0, 8), "columns": cut_along(1, 8), "fine": cut_along(1, 100)}


def _with_turned_layers(chunk):
    """Return a chunk; in another order, if it is a small one."""
    return chunk.t().contiguous().t() if chunk.numel() < 400_000 else chunk.clone()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of 150 MB for each way of cutting, one of them transposed in its files."""
    folder = tmp_path_factory.mktemp("dcp")
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
    for name, cut in CUTS.items():
        save_dcp(folder / name, tensors, cut=cut)
        save_dcp(folder / f"{name}-turned", tensors, cut=cut, stored=_with_turned_layers)
    return folder


CASES = list(itertools.product(CUTS, ["torch", "auto"], [None, "small"]))


@pytest.mark.parametrize(
    ("cut", "backend", "chunk"), sample("peaks of DCP", CASES, 2, kinds=lambda _: ())
)
def test_peak_is_projected(models, tmp_path, cut, backend, chunk):
    """Without a budget, and with the least one that works."""
    texts = [[str(models / name), 0.5] for name in (cut, f"{cut}-turned")]
    check_peak(texts, tmp_path / "out", backend=backend, is_least=chunk is not None)
