"""Weights in the modules of sentence-transformers models are merged as all others are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import shardmix
from shardmix.errors import MismatchError, SourceError
from shardmix.output.destination import check_output
from shardmix.sources.resolve import open_source
from tests.support.cut_off import cut_off
from tests.support.sentence_models import (
    LAYOUTS,
    WIDTH,
    embeddings,
    encoder,
    mean_embeddings,
    move_first_module,
    rename_module,
    two_models,
)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_mean(out: Path, sources: list[Path], kind: type = SentenceTransformer) -> None:
    merged = embeddings(kind(str(out), device="cpu"))
    assert torch.allclose(merged, mean_embeddings(sources, kind), atol=1e-5)


def halves(folders) -> list[tuple[Path, float]]:
    return [(folder, 0.5) for folder in folders]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_embeds_as_the_mean_does(tmp_path, layout):
    sources = two_models(layout, tmp_path)
    report = shardmix.merge(halves(sources), tmp_path / "out")
    assert not report.warnings
    assert files(tmp_path / "out") == files(sources[0]) | {"shardmix.json"}
    assert_mean(tmp_path / "out", sources, LAYOUTS[layout][0])
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


@pytest.mark.parametrize(
    ("layout", "place"), [("dense", "0_Transformer"), ("static", "0_StaticEmbedding")]
)
def test_the_first_module_may_be_in_a_folder(tmp_path, layout, place):
    sources = [move_first_module(folder, place) for folder in two_models(layout, tmp_path)]
    report = shardmix.merge(halves(sources), tmp_path / "out", dtype="bfloat16")
    assert not report.warnings
    assert files(tmp_path / "out") == files(sources[0]) | {"shardmix.json"}
    for name in files(tmp_path / "out"):
        if name.endswith(".safetensors"):
            stored = load_file(tmp_path / "out" / name).values()
            assert {tensor.dtype for tensor in stored if tensor.is_floating_point()} == {
                torch.bfloat16
            }
    if layout == "dense":
        config = json.loads((tmp_path / "out" / place / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        dense = json.loads((tmp_path / "out" / "2_Dense" / "config.json").read_text())
        assert "torch_dtype" not in dense
    SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["yes"])


@pytest.mark.parametrize("moved", [0, 1])
def test_folders_may_be_called_otherwise(tmp_path, moved):
    """The output is laid out as the first model is."""
    sources = two_models("dense", tmp_path)
    rename_module(sources[1], "2_Dense", "Projection")
    move_first_module(sources[moved], "0_Transformer")
    shardmix.merge(halves(sources), tmp_path / "out")
    assert files(tmp_path / "out") == files(sources[0]) | {"shardmix.json"}
    assert_mean(tmp_path / "out", sources)


def test_base_lays_out_the_output(tmp_path):
    sources = two_models("dense", tmp_path)
    base = move_first_module(Path(shutil.copytree(sources[0], tmp_path / "base")), "0_Transformer")
    shardmix.merge(halves(sources), tmp_path / "out", config_from=base)
    assert files(tmp_path / "out") == files(base) | {"shardmix.json"}
    assert_mean(tmp_path / "out", sources)


def test_each_part_has_its_own_shards(tmp_path):
    """The first model's, or as many as the largest size makes of each; each with its index."""
    sources = [
        move_first_module(folder, "0_Transformer") for folder in two_models("dense", tmp_path)
    ]
    shardmix.merge(halves(sources), tmp_path / "split", max_shard_size="40KB")
    index = json.loads(
        (tmp_path / "split" / "0_Transformer" / "model.safetensors.index.json").read_text()
    )
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert {f"0_Transformer/{name}" for name in shards} < files(tmp_path / "split")
    assert "2_Dense/model.safetensors" in files(tmp_path / "split")
    assert_mean(tmp_path / "split", sources)
    again = shardmix.merge([(tmp_path / "split", 0.5), (sources[1], 0.5)], tmp_path / "again")
    assert {f"0_Transformer/{name}" for name in shards} <= {shard.name for shard in again.shards}


def test_a_merge_that_was_cut_off_goes_on(tmp_path):
    sources = two_models("router", tmp_path)
    whole = shardmix.merge(halves(sources), tmp_path / "whole", workers=1)
    cut_off(halves(sources), tmp_path / "out", num_leaves=1)
    report = shardmix.merge(halves(sources), tmp_path / "out", workers=1)
    assert 0 < report.bytes_kept < whole.bytes_read
    for name in files(tmp_path / "whole") - {"README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_damage_in_a_module_is_found(tmp_path):
    sources = two_models("dense", tmp_path)
    shardmix.merge(halves(sources), tmp_path / "out")
    stored = tmp_path / "out" / "2_Dense" / "model.safetensors"
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.write_bytes(content)
    report = shardmix.verify(tmp_path / "out")
    assert [problem for problem in report.problems if "2_Dense/model.safetensors" in problem]


def test_a_nan_in_a_module_is_named(tmp_path):
    sources = two_models("dense", tmp_path)
    path = sources[1] / "2_Dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["linear.weight"][0, 0] = float("nan")
    save_file(tensors, path)
    report = shardmix.merge(halves(sources), tmp_path / "out")
    assert [found.name for found in report.nonfinite] == ["2_Dense/linear.weight"]


def test_inspect_tells_of_all_parts(tmp_path):
    first, _ = two_models("dense", tmp_path)
    report = shardmix.inspect(first)
    stored = {name for name in files(first) if name.endswith(".safetensors")}
    assert {shard.name for shard in report.shards} == stored
    assert report.num_tensors == sum(len(load_file(first / name)) for name in stored)
    assert "2_Dense/linear.bias" in {tensor.name for tensor in report.tensors}


def test_shapes_of_a_module_must_match(tmp_path):
    first, second = two_models("dense", tmp_path)
    save_file({"linear.weight": torch.ones(9, WIDTH)}, second / "2_Dense" / "model.safetensors")
    with pytest.raises(MismatchError, match=r"only in \S*/a/2_Dense: linear\.bias"):
        shardmix.plan_merge(halves([first, second]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_weights_of_only_one_are_refused(tmp_path, order):
    """Weights of only one model are refused. A bare encoder has no projection to average with."""
    sources = [two_models("dense", tmp_path)[0], Path(encoder(tmp_path / "bare", 3))]
    with pytest.raises(MismatchError, match=r"2_Dense.*holds weights in .*/a, .*/bare has no such"):
        shardmix.plan_merge(halves(sources[number] for number in order))


def test_what_is_allowed_is_copied_as_it_is(tmp_path):
    """The first model's modules, with their weights, if the others have none."""
    sources = [two_models("dense", tmp_path)[0], Path(encoder(tmp_path / "bare", 3))]
    report = shardmix.merge(halves(sources), tmp_path / "out", allow_differences="modules.json")
    assert any("2_Dense/" in warning and "not merged" in warning for warning in report.warnings)
    name = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (sources[0] / name).read_bytes()
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_weights_beside_a_model_recompute(tmp_path):
    """Weights beside a model can be recomputed.

    They came along as they were, and are no part of the sum.
    """
    sources = two_models("dense", tmp_path)
    (sources[0] / "codec").mkdir()
    save_file({"x": torch.ones(2)}, sources[0] / "codec" / "model.safetensors")
    shardmix.merge(halves(sources), tmp_path / "out")
    assert "codec/model.safetensors" in files(tmp_path / "out")
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_modules_in_torch_files_are_merged(tmp_path):
    """The output has the mean of `2_Dense/pytorch_model.bin`, in safetensors."""
    sources = two_models("dense", tmp_path)
    for folder in sources:
        shutil.rmtree(folder / "3_LayerNorm")
        modules = json.loads((folder / "modules.json").read_text())[:3]
        (folder / "modules.json").write_text(json.dumps(modules))
        dense = SentenceTransformer(str(folder), device="cpu")[2]
        (folder / "2_Dense" / "model.safetensors").unlink()
        dense.save_torch_weights(str(folder / "2_Dense"), safe_serialization=False)
    assert not shardmix.merge(halves(sources), tmp_path / "out").warnings
    written = {path.name for path in (tmp_path / "out" / "2_Dense").iterdir()}
    assert "model.safetensors" in written
    assert "pytorch_model.bin" not in written
    assert_mean(tmp_path / "out", sources)


def test_pickles_beside_safetensors_stay(tmp_path):
    """Pickles beside safetensors are left behind.

    They would be the first model's weights, for whoever loads those.
    """
    sources = two_models("dense", tmp_path)
    (sources[0] / "2_Dense" / "pytorch_model.bin").write_bytes(b"stale")
    shardmix.merge(halves(sources), tmp_path / "out")
    assert "2_Dense/pytorch_model.bin" not in files(tmp_path / "out")


def test_names_like_a_modules_are_refused(tmp_path):
    """Names that look like a module's are refused."""
    first, _ = two_models("dense", tmp_path)
    tensors = load_file(first / "3_LayerNorm" / "model.safetensors")
    save_file(tensors | {"x/y": torch.ones(1)}, first / "model.safetensors")
    assert len(open_source(str(first)).tensors)
    save_file({"2_Dense/linear.weight": torch.ones(1)}, first / "model.safetensors")
    with pytest.raises(SourceError, match="looks like one in a module's folder"):
        open_source(str(first))


def test_module_linked_elsewhere_is_refused(tmp_path):
    """A module linked from elsewhere is refused."""
    first, second = two_models("dense", tmp_path)
    shutil.rmtree(first / "2_Dense")
    (first / "2_Dense").symlink_to(second / "2_Dense")
    with pytest.raises(SourceError, match="outside the model's folder"):
        open_source(str(first))


@pytest.mark.parametrize("depth", [1, 20])
def test_routes_without_an_end_are_refused(tmp_path, depth):
    """A Router that names itself, and routers within routers."""
    kind = "sentence_transformers.models.Router"
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "r", "type": kind}]))
    member = "." if depth == 1 else "r"
    folder = tmp_path
    for _ in range(depth):
        folder = folder / "r"
        folder.mkdir()
        content = {"structure": {"q": [member]}, "types": {member: kind}}
        (folder / "router_config.json").write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"routes within routes|has neither"):
        open_source(str(tmp_path))


def test_model_of_modules_may_be_overwritten(tmp_path):
    """A model of modules only may be overwritten."""
    first, _ = two_models("router", tmp_path)
    check_output(first, overwrite=True, inputs=[])
