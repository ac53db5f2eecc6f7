"""Mapped rows keep the projection: embeddings and tokenizers of tens of megabytes."""

import pytest
import torch

from tests.support.peaks import check_peak
from tests.support.sampling import sample
from tests.support.vocabularies import model_of, numbered

pytestmark = pytest.mark.machine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of 100 MB, whose 100,000 tokens are ordered otherwise or in part others."""
    folder = tmp_path_factory.mktemp("vocabularies")
    words = [f"Ġword{number}" for number in range(100_000)]
    orders = (words, words[::-1], [*words[10_000:], *(f"Ġother{n}" for n in range(10_000))])
    for number, order in enumerate(orders):
        path = folder / str(number)
        model_of(
            path,
            numbered(order),
            [f"<{n}>" for n in range(number)],
            width=256,
            dtype=torch.bfloat16,
        )
    return [str(folder / str(number)) for number in range(3)]


CASES = [("base", None), ("base", "300MiB"), ("union", None), ("union", "300MiB")]


@pytest.mark.parametrize(
    ("source", "max_memory"), sample("peaks of vocabularies", CASES, 1, kinds=lambda _: ())
)
def test_peak_is_projected(models, tmp_path, source, max_memory):
    """Also of means and averages."""
    weights = [[model, 1 / 3] for model in models]
    options = {"tokenizer_source": source, "pad_to_multiple_of": 512, "max_memory": max_memory}
    check_peak(weights, tmp_path / "out", **options)
