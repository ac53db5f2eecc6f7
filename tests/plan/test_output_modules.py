"""Whose modules an output has, and how it pools."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st

import shardmix
from shardmix.conventions.sentence_modules import POOLINGS, pooling_config, pooling_modes
from shardmix.errors import RecipeError
from tests.support.sentence_models import (
    WIDTH,
    embeddings,
    encoder,
    mean_embeddings,
    move_first_module,
    save,
)


def embedder(tmp_path: Path, name: str, seed: int, pooling="mean") -> Path:
    modules = [st.Transformer(encoder(tmp_path / f"{name}-bare", seed)), st.Pooling(WIDTH, pooling)]
    return save(tmp_path / name, [*modules, st.Normalize()])


def pooled(folder: Path) -> tuple[str, ...]:
    return pooling_modes(json.loads((folder / "1_Pooling" / "config.json").read_text()))


def merge(folders, out: Path, **options):
    return shardmix.merge([(folder, 0.5) for folder in folders], out, **options)


@pytest.mark.parametrize("model_type", ["encoder", None])
@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_bare_first_model_gets_modules(tmp_path, model_type, place):
    """A bare first model gets the others' modules."""
    bare, other = Path(encoder(tmp_path / "bare", 0)), embedder(tmp_path, "st", 1)
    expected = mean_embeddings([other, embedder(tmp_path, "same", 0)])
    if place:
        move_first_module(other, place)
    report = merge([bare, other], tmp_path / "out", model_type=model_type)
    [warning] = [each for each in report.warnings if "modules.json" in each]
    assert f"the output takes {other}'s modules (pooling by mean)" in warning
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert torch.allclose(embeddings(model), expected, atol=1e-5)
    assert (tmp_path / "out" / "config_sentence_transformers.json").exists()
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_a_bare_second_model_changes_nothing(tmp_path):
    first = embedder(tmp_path, "st", 0)
    bare = Path(encoder(tmp_path / "bare", 1))
    assert not merge([first, bare], tmp_path / "out", model_type="encoder").warnings
    assert pooled(tmp_path / "out") == ("mean",)


def test_a_decoder_gets_no_modules(tmp_path):
    bare, other = Path(encoder(tmp_path / "bare", 0)), embedder(tmp_path, "st", 1)
    config = json.loads((bare / "config.json").read_text())
    for folder in (bare, other):
        (folder / "config.json").write_text(json.dumps(config | {"architectures": []}))
    plan = shardmix.plan_merge([(bare, 0.5), (other, 0.5)], model_type="reranker")
    assert not plan.modules.files


@pytest.mark.parametrize("pooling", POOLINGS)
def test_users_word_decides_bare_encoders(tmp_path, pooling):
    """The user's word decides for bare encoders."""
    bare = [Path(encoder(tmp_path / f"{seed}", seed)) for seed in range(2)]
    merge(bare, tmp_path / "out", model_type="encoder", pooling=pooling)
    library = SentenceTransformer(str(tmp_path / "out"), device="cpu")[1].pooling_mode
    assert library == {"mean_sqrt_len": "mean_sqrt_len_tokens"}.get(pooling, pooling)
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_bare_encoders_pool_by_cls(tmp_path):
    """Bare encoders pool by CLS without a word."""
    bare = [Path(encoder(tmp_path / f"{seed}", seed)) for seed in range(2)]
    assert not merge(bare, tmp_path / "out", model_type="encoder").warnings
    assert pooled(tmp_path / "out") == ("cls",)


@pytest.mark.parametrize("style", ["name", "switches"])
def test_the_users_word_overrides_a_folders(tmp_path, style):
    """The conflict is told; what the folder says besides stays."""
    folders = [embedder(tmp_path, name, seed) for seed, name in enumerate("ab")]
    if style == "switches":
        for folder in folders:
            content = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
            (folder / "1_Pooling" / "config.json").write_text(json.dumps(content))
    report = merge(folders, tmp_path / "out", pooling="cls")
    [warning] = report.warnings
    assert "1_Pooling/config.json: pools by mean, and --pooling cls was given" in warning
    assert pooled(tmp_path / "out") == ("cls",)
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified
    again = shardmix.plan_merge([(folder, 0.5) for folder in folders], pooling="mean")
    assert not again.warnings


def test_pooling_that_nothing_heeds_is_told(tmp_path):
    bare = [Path(encoder(tmp_path / f"{seed}", seed)) for seed in range(2)]
    plan = shardmix.plan_merge([(folder, 0.5) for folder in bare], pooling="mean")
    assert "with --model-type encoder the output pools so" in plan.warnings[0]


def test_an_unknown_pooling_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="pooling 'average': must be one of cls, mean"):
        shardmix.plan_merge([("a", 0.5), ("b", 0.5)], pooling="average")


def test_pooling_is_part_of_the_recipe(tmp_path):
    bare = [Path(encoder(tmp_path / f"{seed}", seed)) for seed in range(2)]
    recipe = {
        "models": [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in bare],
        "model_type": "encoder",
        "pooling": "mean",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    shardmix.merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert pooled(tmp_path / "out") == ("mean",)
    assert "pooling: mean" in (tmp_path / "out" / "README.md").read_text()
    with_cls = shardmix.plan_merge(tmp_path / "recipe.yaml", pooling="cls")
    assert with_cls.digest() != shardmix.plan_merge(tmp_path / "recipe.yaml").digest()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_config_keeps_its_style(pooling):
    for config in ({"pooling_mode": "mean"}, {"pooling_mode_mean_tokens": True}, {}):
        changed = pooling_config({**config, "embedding_dimension": 3}, pooling)
        assert pooling_modes(changed) == (pooling,)
        assert changed["embedding_dimension"] == 3
        assert ("pooling_mode" in changed) == ("pooling_mode" in config)


def test_common_projection_goes_along(tmp_path):
    """A projection of all goes with the modules.

    The base is bare, and the models' projections are merged all the same.
    """
    folders = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        bare = encoder(tmp_path / f"{name}-bare", seed)
        chain = [st.Transformer(bare), st.Pooling(WIDTH, "mean"), st.Dense(WIDTH, 8)]
        folders.append(save(tmp_path / name, chain))
    base = Path(shutil.copytree(tmp_path / "a-bare", tmp_path / "base"))
    merge(folders, tmp_path / "out", config_from=base)
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert torch.allclose(embeddings(model), mean_embeddings(folders), atol=1e-5)
