"""Methods keep the projection, whatever they make on the way; peak resident in a fresh process."""

import itertools

import pytest
import torch

from tests.support.models import save_model
from tests.support.peaks import check_peak
from tests.support.sampling import sample

pytestmark = pytest.mark.machine

METHODS = {
    "task_arithmetic": {"parameters": {"weight": 0.5, "lambda": 0.7}},
    "slerp": {"parameters": {"t": 0.4}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of 190 MB: tensors of 100 MB, of 8 MB, and tiny ones."""
    folder = tmp_path_factory.mktemp("mixed")
    shapes = {"large": 50, **{f"middle{number}": 4 for number in range(11)}}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        block = torch.randn(1_000_000).bfloat16()
        tensors = {key: block.repeat(count).view(-1, 1000) for key, count in shapes.items()}
        tensors |= {f"tiny{number}": block[:100].clone() for number in range(50)}
        save_model(folder / name, tensors, config={})
        del tensors
    return [str(folder / "a"), str(folder / "b")]


CASES = list(itertools.product(METHODS, [None, "360MiB"], ["torch", "auto"], ["pread", "mmap"]))


@pytest.mark.parametrize(
    ("method", "max_memory", "backend", "io"), sample("peaks of methods", CASES, 4)
)
def test_peak_is_projected(models, tmp_path, method, max_memory, backend, io):
    """With tensors that fit into a chunk and others that don't."""
    base, other = models
    options = {"method": method, "base_model": base, "backend": backend, "io": io}
    options |= METHODS[method] | {"max_memory": max_memory}
    check_peak([base, other], tmp_path / "out", **options)
