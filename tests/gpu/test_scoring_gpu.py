"""Scoring on a GPU: the same weights, within `--max-vram`."""

import pytest
import torch

from shardmix.errors import BudgetError
from shardmix.scoring import fit, score
from shardmix.scoring.units import Grain
from shardmix.system.units import MIB
from tests.support.language_models import KINDS, TEXTS, examples_for, save_language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("grain", list(Grain))
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_cpu(tmp_path, monkeypatch, kind, grain):
    models = [save_language_model(kind, tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    model_type, examples = KINDS[kind][0], examples_for(kind)
    on_cpu = score(models, model_type, examples, device="cpu", temperature=0.5)
    monkeypatch.setattr(fit, "_GRAINS", (grain,))
    on_gpu = score(models, model_type, examples, device="cuda", temperature=0.5)
    assert on_gpu.weights == pytest.approx(on_cpu.weights, abs=1e-3)
    assert on_gpu.device == "cuda"


def test_a_model_stays_within_max_vram(tmp_path):
    folder = save_language_model(
        "llama", tmp_path / "m", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    budget = 400 * MIB
    report = score([folder], "decoder", TEXTS, device="cuda", max_vram=budget)
    assert report.bytes_stored > budget
    assert report.peak_vram_bytes <= report.projected_vram_bytes <= budget
    with pytest.raises(BudgetError, match=r"--max-vram .*the least that works here"):
        score([folder], "decoder", TEXTS, device="cuda", max_vram=8 * MIB)
