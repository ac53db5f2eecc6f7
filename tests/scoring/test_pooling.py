"""Encoders are scored as they embed: by their own modules, unless their user says otherwise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st

from shardmix.conventions.sentence_modules import POOLINGS
from shardmix.errors import SourceError
from shardmix.scoring import score
from tests.support.language_models import QUERIES
from tests.support.sentence_models import WIDTH, encoder, move_first_module, save

LIBRARY = {"mean_sqrt_len": "mean_sqrt_len_tokens"}


def library_loss(folder: Path) -> float:
    """Return the contrastive loss of what sentence-transformers embeds, by batches of two."""
    model = SentenceTransformer(str(folder), device="cpu")
    losses = []
    for batch in (QUERIES[:2], QUERIES[2:]):
        texts = [(each["query"], each["pos"][0], *each["neg"]) for each in batch]
        vectors = [
            torch.nn.functional.normalize(model.encode(list(each), convert_to_tensor=True), dim=-1)
            for each in texts
        ]
        passages = torch.cat([each[1:] for each in vectors])
        own = torch.tensor([sum(len(each) - 1 for each in texts[:n]) for n in range(len(texts))])
        cosines = torch.stack([each[0] for each in vectors]) @ passages.T
        losses.append(float(torch.nn.functional.cross_entropy(cosines / 0.05, own)))
    return sum(losses) / len(losses)


def embedder(tmp_path: Path, *chain, seed: int = 1) -> Path:
    bare = encoder(tmp_path / f"bare-{seed}", seed)
    return save(tmp_path / f"st-{seed}", [st.Transformer(bare), *chain])


def pooler(pooling) -> st.Pooling:
    return st.Pooling(WIDTH, LIBRARY.get(pooling, pooling))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_folder_decides_how_it_is_pooled(tmp_path, pooling):
    folder = embedder(tmp_path, pooler(pooling), st.Normalize())
    report = score([folder], "encoder", QUERIES)
    assert report.losses[0] == pytest.approx(library_loss(folder), rel=1e-4)
    assert report.poolings == (pooling,)
    told = [f"pooled by {pooling}, as its modules say" in each for each in report.warnings]
    assert told == ([] if pooling == "cls" else [True])


def test_several_poolings_are_joined(tmp_path):
    """Vectors of several poolings are joined."""
    folder = embedder(tmp_path, st.Pooling(WIDTH, ("cls", "mean")))
    report = score([folder], "encoder", QUERIES)
    assert report.losses[0] == pytest.approx(library_loss(folder), rel=1e-4)
    assert report.poolings == ("cls and mean",)


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_projections_count(tmp_path, place):
    torch.manual_seed(3)
    dense = [st.Dense(WIDTH, 12), st.LayerNorm(12), st.Dense(12, 12, use_residual=True)]
    with torch.no_grad():
        dense[1].norm.weight.mul_(torch.linspace(-2, 2, 12))
    folder = embedder(tmp_path, pooler("mean"), *dense)
    expected = library_loss(folder)
    if place:
        move_first_module(folder, place)
    report = score([folder], "encoder", QUERIES)
    assert report.losses[0] == pytest.approx(expected, rel=1e-4)
    assert report.poolings == ("mean, Dense, LayerNorm, Dense",)


def test_users_word_counts_over_a_conflict(tmp_path):
    """The user's word counts, and the conflict is told."""
    folder = embedder(tmp_path, pooler("mean"))
    bare = tmp_path / "bare-1"
    report = score([folder, bare], "encoder", QUERIES, pooling="cls")
    assert report.losses[0] == pytest.approx(report.losses[1], rel=1e-6)
    assert report.poolings == ("cls", "cls")
    [warning] = report.warnings
    assert f"{folder}: pooled by cls, as was asked for, though it pools by mean" in warning


def test_a_bare_encoder_is_pooled_by_cls(tmp_path):
    bare = encoder(tmp_path / "bare", 1)
    assert score([bare], "encoder", QUERIES).poolings == ("cls",)
    mixed = score([bare, embedder(tmp_path, pooler("mean"), seed=2)], "encoder", QUERIES)
    assert mixed.poolings == ("cls", "mean")
    assert any(f"{bare}: pooled by cls, since no modules" in each for each in mixed.warnings)


def test_other_types_have_no_pooling(tmp_path):
    folder = encoder(tmp_path / "reranker", 0, "bert-reranker")
    assert score([folder], "reranker", QUERIES).poolings == ()


def test_unfollowable_modules_are_refused(tmp_path):
    """Modules that cannot be followed are refused."""
    folder = embedder(tmp_path, st.CNN(WIDTH, 5), st.Pooling(15))
    with pytest.raises(SourceError, match=r"embeds by CNN.*--pooling scores its encoder"):
        score([folder], "encoder", QUERIES)
    report = score([folder], "encoder", QUERIES, pooling="mean")
    assert any("scored without its modules" in warning for warning in report.warnings)


def test_an_unknown_activation_is_refused(tmp_path):
    folder = embedder(tmp_path, pooler("mean"), st.Dense(WIDTH, 8))
    config = json.loads((folder / "2_Dense" / "config.json").read_text())
    config["activation_function"] = "somewhere.Strange"
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"st-1/2_Dense: has the activation Strange"):
        score([folder], "encoder", QUERIES)


def test_projections_in_torch_files_are_read(tmp_path):
    """The losses are those of the same weights in safetensors."""
    folder = embedder(tmp_path, pooler("mean"), st.Dense(WIDTH, 8))
    expected = score([folder], "encoder", QUERIES).losses
    stored = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(stored), folder / "2_Dense" / "pytorch_model.bin")
    stored.unlink()
    assert score([folder], "encoder", QUERIES).losses == expected


def test_pickled_projections_are_refused(tmp_path):
    folder = embedder(tmp_path, pooler("mean"), st.Dense(WIDTH, 8))
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "model.pkl")
    with pytest.raises(SourceError, match=r"2_Dense has no model\.safetensors"):
        score([folder], "encoder", QUERIES)
