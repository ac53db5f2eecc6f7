"""An extraction keeps the projection and the budget; peak resident in a fresh process."""

import json
import re

import pytest
import torch

from shardmix.system.units import parse_size
from tests.support.adapters import random_adapter, save_adapter
from tests.support.fresh_process import python
from tests.support.models import save_model
from tests.support.sampling import sample

pytestmark = pytest.mark.machine

CALL = """
import json, sys, shardmix
models, output, options = json.loads(sys.argv[1])
try:
    report = shardmix.merge(models, output, fsync=False, as_adapter=True, **options)
except shardmix.BudgetError as error:
    print(error)
else:
    print(json.dumps([report.peak_rss_bytes, report.projected_peak_bytes]))
"""
SHAPES = {
    "layers.0.tall.weight": (40_000, 512),
    "layers.0.wide.weight": (512, 30_000),
    "layers.0.square.weight": (3000, 3000),
    "embed.weight": (60_000, 256),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of 120 MB in bfloat16, and eight adapters of rank 40 on the first."""
    folder = tmp_path_factory.mktemp("extraction")
    torch.manual_seed(0)
    block = torch.randn(1 << 20)
    tensors = {
        name: block.repeat(-(-rows * columns // len(block)))[: rows * columns].view(rows, columns)
        for name, (rows, columns) in SHAPES.items()
    }
    save_model(folder / "base", {name: x.bfloat16() for name, x in tensors.items()})
    save_model(
        folder / "tuned", {name: (x * 1.1 + x.flip(0)).bfloat16() for name, x in tensors.items()}
    )
    modules = [name.removesuffix(".weight") for name in SHAPES if "embed" not in name]
    for number in range(8):
        matrices = random_adapter(tensors, modules, rank=40, seed=number)
        save_adapter(folder / f"a{number}", matrices, r=40)
    return folder


def run(models, output, kind, rank, **options):
    if kind == "extract":
        texts = [[str(models / "tuned"), 1.0]]
        options["base_model"] = str(models / "base")
    else:
        texts = [[f"{models / 'base'}+{models / f'a{number}'}", 0.5] for number in range(8)]
    call = json.dumps([texts, str(output), {"rank": rank, **options}])
    return python(CALL, call).splitlines()[-1]


CASES = [("extract", 8), ("extract", 100), ("adapters", 8), ("adapters", 100)]


@pytest.mark.parametrize(("kind", "rank"), sample("peaks of factors", CASES, 1, kinds=lambda _: ()))
def test_peak_is_projected(models, tmp_path, kind, rank):
    """Without a budget, and with the least that works, in which no matrix is held."""
    peak, projected = json.loads(run(models, tmp_path / "free", kind, rank))
    assert peak <= projected
    text = run(models, tmp_path / "refused", kind, rank, max_memory="1MiB")
    least = re.search(r"least that works[a-z0-9 ]* is ([\d.]+ ?MiB)", text)[1]
    peak, projected = json.loads(run(models, tmp_path / "least", kind, rank, max_memory=least))
    assert peak <= projected <= parse_size(least)
