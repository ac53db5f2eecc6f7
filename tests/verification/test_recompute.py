"""`verify --recompute`: which sources are taken, and what is said where they are not those."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import shardmix
from shardmix.errors import RecipeError, SourceError
from shardmix.system.hashing import file_digest
from tests.support.models import random_model, save_model
from tests.support.sealed import edit_provenance


def namesakes(folder):
    """Merge x/final and y/final into y/merged."""
    finals = [
        save_model(folder / name / "final", random_model(seed)) for seed, name in enumerate("xy")
    ]
    shardmix.merge(list(zip(finals, (0.7, 0.3), strict=True)), folder / "y" / "merged")
    return folder / "y" / "merged", finals


def test_equal_names_are_asked_by_number(tmp_path):
    """Sources of one name are asked for by number."""
    out, (x, y) = namesakes(tmp_path)
    wanted = "two sources are called final; give --source 1=PATH and --source 2=PATH"
    with pytest.raises(SourceError, match=wanted):
        shardmix.verify(out, recompute=True)
    with pytest.raises(SourceError, match=wanted):
        shardmix.verify(out, recompute=True, sources={"1": x})
    with pytest.raises(RecipeError, match=wanted):
        shardmix.verify(out, recompute=True, sources={"final": y})
    assert shardmix.verify(out, recompute=True, sources={"1": x, "2": y}).is_verified


def test_problems_name_the_paths_used(tmp_path):
    """Problems name the paths that were used."""
    out, (x, y) = namesakes(tmp_path)
    report = shardmix.verify(out, recompute=True, sources={"1": y, "2": x})
    assert not report.is_verified
    assert all(problem.endswith(f"are not what {y} and {x} give") for problem in report.problems)


def test_a_number_counts_before_a_name(tmp_path):
    models = [
        save_model(tmp_path / "far" / name, random_model(seed)) for seed, name in enumerate("21")
    ]
    shardmix.merge(list(zip(models, (0.7, 0.3), strict=True)), tmp_path / "out")
    sources = {"1": models[0], "2": models[1]}
    assert shardmix.verify(tmp_path / "out", recompute=True, sources=sources).is_verified


def test_absent_source_is_refused_first(tmp_path):
    """A source that is none is refused before anything is read."""
    out, (x, _) = namesakes(tmp_path)
    (out / "config.json").unlink()
    for key in ("finale", "0", "3", "01", ""):
        with pytest.raises(
            RecipeError, match=r"none of this output's sources: 1 \(final\), 2 \(final\)"
        ):
            shardmix.verify(out, recompute=True, sources={key: x})


def test_recompute_options_need_recompute(tmp_path):
    """What is for recomputing is refused without it."""
    out, (x, _) = namesakes(tmp_path)
    with pytest.raises(RecipeError, match="--source is for recomputing"):
        shardmix.verify(out, sources={"1": x})
    with pytest.raises(RecipeError, match="--max-memory is for recomputing"):
        shardmix.verify(out, max_memory="1GiB")


def in_subfolders(folder, tensors):
    """Save a model whose files have one name, in two folders."""
    names = sorted(tensors)
    halves = {"p/w.safetensors": names[:2], "q/w.safetensors": names[2:]}
    for path, members in halves.items():
        (folder / path).parent.mkdir(parents=True)
        save_file({name: tensors[name] for name in members}, folder / path, {"format": "pt"})
    weight_map = {name: path for path, members in halves.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def test_equal_filenames_are_told_apart(tmp_path):
    """Files of one name in several folders are told apart."""
    tensors = {name: torch.full((size,), 1.0) for size, name in enumerate("abcd", start=1)}
    models = [in_subfolders(tmp_path / name, tensors) for name in ("m0", "m1")]
    shardmix.merge([(model, 0.5) for model in models], tmp_path / "out", max_shard_size="1GB")
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified
    (models[1] / "q" / "w.safetensors").unlink()
    (models[1] / "q").rmdir()
    other = {**tensors, "d": torch.ones(2, 2)}
    swapped = in_subfolders(tmp_path / "other", other)
    with pytest.raises(SourceError, match="differs in name, size or header"):
        shardmix.verify(tmp_path / "out", recompute=True, sources={"1": swapped, "2": swapped})


def test_damage_is_told_before_recomputing(tmp_path):
    """Damage is told if recomputing would fail."""
    out, _ = namesakes(tmp_path)  # whose sources cannot be told apart
    (out / "model.safetensors").unlink()
    report = shardmix.verify(out, recompute=True)
    assert not report.recomputed
    missing, why = report.problems
    assert missing == f"{out / 'model.safetensors'}: is missing"
    assert "was not recomputed, since" in why


def test_missing_file_is_a_problem(tmp_path):
    """A file that the sources give and that is not there is a problem.

    Its digest was taken out of what somebody has edited, and the file as well.
    """
    tensors = random_model(1)
    names = sorted(tensors)
    models = [save_model(tmp_path / name, tensors, shards=[names[:2], names[2:]]) for name in "ab"]
    out = tmp_path / "out"
    shardmix.merge([(model, 0.5) for model in models], out)
    gone = "model-00002-of-00002.safetensors"
    (out / gone).unlink()
    edit_provenance(out, lambda content: content["digests"]["files"].pop(gone))
    (problem,) = shardmix.verify(out, recompute=True).problems
    assert problem.startswith(f"{out / gone}: cannot be compared with what ")


@pytest.mark.parametrize("change", [{"name": "n" * 300}, {"path": "/" + "p" * 300}, {"path": "\0"}])
def test_what_can_be_no_path_is_not_there(tmp_path, change):
    out, _ = namesakes(tmp_path)
    far = tmp_path / "far" / "out"
    far.parent.mkdir()
    out.rename(far)
    edit_provenance(far, lambda content: content["sources"][0].update({"name": "m", **change}))
    with pytest.raises(SourceError, match="cannot be found"):
        shardmix.verify(far, recompute=True)


def test_a_hub_id_without_a_commit_is_none(tmp_path):
    models = [save_model(tmp_path / name, random_model(seed)) for seed, name in enumerate("ab")]
    shardmix.merge([(model, 0.5) for model in models], tmp_path / "out")
    edit_provenance(tmp_path / "out", lambda content: content["sources"][0].update(hub_id="org/m"))
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_auxiliary_files_may_change(tmp_path):
    """What lies beside the weights may change.

    Configs and tokenizers were judged at the merge: an edited source still gives the sum.
    """
    folders = [save_model(tmp_path / name, {"w": torch.ones(2, 2)}) for name in "ab"]
    for folder in folders:
        (folder / "config.json").write_text('{"model_type": "llama", "hidden_act": "silu"}')
        (folder / "vocab.txt").write_text("one\ntwo\n")
    shardmix.merge(dict.fromkeys(folders, 0.5), tmp_path / "out")
    (folders[1] / "config.json").write_text('{"model_type": "bert", "hidden_act": "gelu"}')
    (folders[1] / "vocab.txt").write_text("two\none\n")
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_foreign_weight_file_is_found(tmp_path):
    """A weight file that no merge writes is found.

    Somebody has added it, and made the digests anew.
    """
    models = [save_model(tmp_path / name, random_model(seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    shardmix.merge([(model, 0.5) for model in models], out)
    shutil.copy(out / "model.safetensors", out / "more.safetensors")

    def add(content):
        files = content["digests"]["files"]
        files["more.safetensors"] = files["model.safetensors"]

    edit_provenance(out, add)
    assert shardmix.verify(out).is_verified
    (problem,) = shardmix.verify(out, recompute=True).problems
    assert problem.startswith(f"{out / 'more.safetensors'}: is not what a merge of ")


@pytest.mark.parametrize("more", [b"x", b"x" * 5000, None])
def test_a_file_of_another_size_is_found(tmp_path, more):
    """Its digest was made anew; what the sources give is all there, or all but its end."""
    models = [save_model(tmp_path / name, random_model(seed)) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    shardmix.merge([(model, 0.5) for model in models], out)
    path = out / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3] if more is None else content + more)

    def forge(content):
        with path.open("rb") as file:
            digest = file_digest(file.fileno(), "xxh3")
        record = {"bytes": path.stat().st_size, "digest": digest}
        content["digests"]["files"]["model.safetensors"] = record

    edit_provenance(out, forge)
    assert shardmix.verify(out).is_verified
    problems = shardmix.verify(out, recompute=True).problems
    num_bytes = 3 if more is None else len(more)
    assert f"{path}: {num_bytes} bytes of its size are not what" in "\n".join(problems)
    assert len(problems) == (2 if more is None else 1)  # its end, too


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"merge_method": "magic"}, "its recipe is none that shardmix .* understands"),
        ({"models": []}, "its recipe is none that shardmix .* understands"),
        ({"models": [{"model": name} for name in "abc"]}, "has 3 models, but it tells of 2"),
    ],
)
def test_strange_recipe_is_refused(tmp_path, change, finding):
    """A shardmix.json with a recipe that is none is refused by name."""
    a, b = (save_model(tmp_path / name, random_model(1)) for name in "ab")
    shardmix.merge({a: 0.5, b: 0.5}, tmp_path / "out")
    path = tmp_path / "out" / "shardmix.json"
    content = json.loads(path.read_text())
    content["recipe"] |= {"parameters": {"weight": 1}} | change
    path.write_text(json.dumps(content))
    with pytest.raises(shardmix.SourceError, match=finding):
        shardmix.verify(tmp_path / "out", recompute=True)
    assert finding[:5] in shardmix.status(tmp_path / "out").note
