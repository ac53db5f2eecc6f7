"""Weight files keep the name that their loader looks for."""

import json

import pytest
import yaml
from safetensors.torch import load_file

import shardmix
from shardmix.conventions.weight_names import ShardName, shard_name, stem_of
from shardmix.errors import SourceError
from shardmix.sources.resolve import open_source
from tests.support.models import assert_same_bits, random_model, save_model, weighted_sum

SHARDS = [[name] for name in random_model(0)]
UNET = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}


def renamed(folder, stem, seed, *, config=None, shards=None, **files):
    """Make a model whose weights, and their index, have another name than transformers'."""
    save_model(folder, random_model(seed), config=config, shards=shards)
    for path in list(folder.glob("model*")):
        path.rename(folder / path.name.replace("model", stem, 1))
    index = folder / f"{stem}.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace('"model-', f'"{stem}-'))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content)
    return folder


def expected():
    pairs = zip(random_model(0).items(), random_model(1).values(), strict=True)
    return {name: weighted_sum([a, b], [0.5, 0.5], a.dtype) for (name, a), b in pairs}


KINDS = {
    "diffusion_pytorch_model": {"config": UNET},
    "consolidated": {"params": "{}", "tekken": "{}"},
    "open_clip_model": {"open_clip_config": "{}"},
    "open_clip_pytorch_model": {"open_clip_config": "{}", "config": {"model_type": "clip"}},
}


@pytest.mark.parametrize("stem", KINDS)
@pytest.mark.parametrize("shards", [None, SHARDS])
def test_other_loaders_folder_is_merged(tmp_path, stem, shards):
    """A folder of another loader is merged."""
    models = [
        (renamed(tmp_path / name, stem, seed, shards=shards, **KINDS[stem]), 0.5)
        for seed, name in enumerate("ab")
    ]
    report = shardmix.merge(models, tmp_path / "out")
    out = tmp_path / "out"
    found = {}
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    for name in weights:
        found |= load_file(out / name)
    assert_same_bits(found, expected())
    index = out / f"{stem}.safetensors.index.json"
    if shards is None:
        assert weights == [f"{stem}.safetensors"]
        assert not index.exists()
    else:
        assert weights == sorted(set(json.loads(index.read_text())["weight_map"].values()))
        assert {stem_of(name) for name in weights} == {stem}
    assert not any("no config.json" in warning for warning in report.warnings)
    assert len(open_source(str(out)).tensors) == len(found)
    sources = {"a": models[0][0], "b": models[1][0]}
    assert shardmix.verify(out, recompute=True, sources=sources).problems == ()
    for name in set(KINDS[stem]) - {"config"}:
        assert (out / f"{name}.json").exists()


def test_other_loaders_file_keeps_its_name(tmp_path):
    """A file of another loader keeps its name.

    Also if it is given as a file, or in another precision, as long as its config tells.
    """
    for stem, options in KINDS.items():
        models = [
            (renamed(tmp_path / stem / name, stem, seed, **options), 0.5)
            for seed, name in enumerate("ab")
        ]
        files = [(folder / f"{stem}.safetensors", weight) for folder, weight in models]
        out = tmp_path / stem / "out"
        shardmix.merge(files, out)
        assert [path.name for path in out.glob("*.safetensors")] == [f"{stem}.safetensors"]
    variants = []
    for name in "ab":
        folder = tmp_path / "diffusion_pytorch_model" / name
        path = folder / "diffusion_pytorch_model.fp16.safetensors"
        (folder / "diffusion_pytorch_model.safetensors").rename(path)
        variants.append((path, 0.5))
    shardmix.merge(variants, tmp_path / "out")
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "consolidated.safetensors"])
def test_unknown_name_becomes_model(tmp_path, name):
    """What no loader would find is called model.

    A file without the others that its loader wants gets the name that most look for.
    """
    stem = name.removesuffix(".safetensors")
    config = {"model_type": "x"}
    models = [
        (renamed(tmp_path / each, stem, seed, config=config) / name, 0.5)
        for seed, each in enumerate("ab")
    ]
    shardmix.merge(models, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_new_shard_size_keeps_the_name(tmp_path):
    models = [
        (renamed(tmp_path / name, "diffusion_pytorch_model", seed, config=UNET), 0.5)
        for seed, name in enumerate("ab")
    ]
    shardmix.merge(models, tmp_path / "out", max_shard_size=1500)
    index = json.loads(
        (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert set(index["weight_map"]) == set(random_model(0))
    assert all((tmp_path / "out" / name).exists() for name in index["weight_map"].values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"


def test_transformers_weights_come_first(tmp_path):
    """As in Mistral's repositories, which hold their own format beside that of transformers."""
    folder = renamed(tmp_path / "m", "consolidated", 1, params="{}")
    save_model(folder, random_model(0))
    assert open_source(str(folder)).identity.files[0].name == "model.safetensors"


def test_diffusers_weights_come_first(tmp_path):
    """Diffusers' own weights come first for diffusers."""
    folder = renamed(tmp_path / "m", "diffusion_pytorch_model", 1)
    save_model(folder, random_model(0), config=UNET)
    name = open_source(str(folder)).identity.files[0].name
    assert name == "diffusion_pytorch_model.safetensors"


def test_pipelines_part_merges_alone(tmp_path):
    """A pipeline's part is merged, and the pipeline refused."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        renamed(tmp_path / name / "vae", "diffusion_pytorch_model", seed, config=UNET)
    with pytest.raises(SourceError, match=r"is a pipeline of diffusers.*: vae; merge each part"):
        shardmix.plan_merge({tmp_path / "a": 0.5, tmp_path / "b": 0.5})
    shardmix.plan_merge({tmp_path / "a" / "vae": 0.5, tmp_path / "b" / "vae": 0.5})


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model-00001-of-00003.safetensors", ShardName("model", 1, 3)),
        ("a_1_of_2.safetensors", ShardName("a", 1, 2)),
        ("model.safetensors-00001-of-00014.safetensors", ShardName("model.safetensors", 1, 14)),
        ("model-00001-of-00001.safetensors", None),
        ("model.safetensors", None),
        ("best-of-3.safetensors", None),
        ("4-of-a-kind.safetensors", None),
    ],
)
def test_names_of_shards_are_read(name, read):
    assert shard_name(name) == read
