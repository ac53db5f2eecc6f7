"""The disk that a plan asks for is what the output takes: no less, and hardly more."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import shardmix
from shardmix.errors import OutputError
from shardmix.output.counted_folder import CountedFolder
from shardmix.output.disk_need import disk_needed_nbytes
from shardmix.output.journal import journal_nbytes
from tests.faults.merges import resize
from tests.support.cut_off import large_models
from tests.support.models import random_model, save_model
from tests.support.small_disks import disk_or_skip

BLOCK = 4096
UNTIED = {"model_type": "llama", "tie_word_embeddings": True, "torch_dtype": "float16"}
LONG = "ein Modell mit ä, ö, ü und \U0001f600 " * 3


def many_tensors(root, count, num_elements=16, value=1.0):
    """Save two models of many small tensors, by hand: fast."""
    nbytes = 4 * num_elements
    names = [f"model.layers.{i // 500}.experts.{i % 500}.weight" for i in range(count)]
    entries = {
        name: {
            "dtype": "F32",
            "shape": [num_elements],
            "data_offsets": [nbytes * i, nbytes * i + nbytes],
        }
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    data = np.full(num_elements * count, value, dtype=np.float32).tobytes()
    for name in "ab":
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
        content = len(header).to_bytes(8, "little") + header + data
        (root / name / "model.safetensors").write_bytes(content)
    return [(root / "a", 0.5), (root / "b", 0.5)]


def with_auxiliary_files(root):
    """Save two models whose first one has files of many sizes beside its weights."""
    models = [(save_model(root / name, random_model(1), config=UNTIED), 0.5) for name in "ab"]
    first = models[0][0]
    (first / "tokenizer.json").write_text("x" * 1_234_567)
    (first / "vocab.txt").write_text("")
    (first / "LICENSE").write_text("y" * BLOCK)
    (first / "additional_chat_templates").mkdir()
    (first / "additional_chat_templates" / "tool.jinja").write_text("z" * (BLOCK + 1))
    return models


def two(root, **options):
    return [(save_model(root / name, random_model(1), **options), 0.5) for name in "ab"]


NAMES = sorted(random_model(0))
CASES = {
    "plain": (two, {}),
    "shards": (lambda root: two(root, shards=[NAMES[:3], NAMES[3:]]), {}),
    "split": (two, {"max_shard_size": 1500}),
    "dtype": (two, {"dtype": "bfloat16", "digest": "sha256"}),
    "paths": (two, {"record_paths": True, "normalize": True}),
    "auxiliary_files": (with_auxiliary_files, {}),
    "encoder": (
        lambda root: two(root, config={"model_type": "bert", "hidden_size": 8}),
        {"model_type": "encoder"},
    ),
    "names": (lambda root: two(root / LONG), {}),
    "many": (lambda root: many_tensors(root, 20_000), {}),
    "many, split": (lambda root: many_tensors(root, 20_000), {"max_shard_size": "300KB"}),
}


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", CASES)
def test_the_output_takes_what_was_told(tmp_path, case):
    """Not more; and all but exactly: in whole blocks, and 20 KiB for what is there meanwhile."""
    make, options = CASES[case]
    models = make(tmp_path)
    told = shardmix.plan_merge(models, tmp_path / "out", **options).disk_needed_nbytes
    shardmix.merge(models, tmp_path / "out", **options)
    files = files_of(tmp_path / "out")
    written = sum(path.stat().st_size for path in files)
    in_blocks = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)
    assert written <= in_blocks <= told
    folders = [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert told - in_blocks <= (5 + len(folders)) * BLOCK


@pytest.mark.parametrize("case", ["plain", "split", "auxiliary_files", "many, split"])
def test_a_disk_of_that_size_is_enough(tmp_path, case):
    """Also for what is there only meanwhile; and one a little smaller is refused at once."""
    make, options = CASES[case]
    models = make(tmp_path)
    told = shardmix.plan_merge(models, tmp_path / "out", **options).disk_needed_nbytes
    with disk_or_skip(tmp_path / "disk", told - BLOCK) as place:
        with pytest.raises(OutputError, match=r"needs .* free some space"):
            shardmix.merge(models, place / "out", **options)
        assert list(place.iterdir()) == []
        resize(place, told)
        shardmix.merge(models, place / "out", **options)
        assert shardmix.verify(place / "out").is_verified


def test_fifty_thousand_tensors_are_counted(tmp_path):
    """Their index is longer than their data."""
    models = many_tensors(tmp_path, 50_000, num_elements=8)
    plan = shardmix.plan_merge(models, tmp_path / "out", max_shard_size="1MB")
    shardmix.merge(models, tmp_path / "out", max_shard_size="1MB")
    written = sum(path.stat().st_size for path in files_of(tmp_path / "out"))
    assert plan.disk_needed_nbytes > plan.write_nbytes * 1.4
    assert written <= plan.disk_needed_nbytes <= written + 16 * BLOCK


def test_plan_without_an_output_tells_it_too(tmp_path):
    """A plan without an output tells it, too."""
    models = two(tmp_path)
    there = shardmix.plan_merge(models, tmp_path / "out").disk_needed_nbytes
    assert shardmix.plan_merge(models).disk_needed_nbytes == there
    assert shardmix.report_plan(shardmix.plan_merge(models)).disk_needed_bytes == there


def test_what_it_needs_is_no_part_of_a_merge(tmp_path):
    """The card has the output's name: where it goes must not make it another merge."""
    models = two(tmp_path)
    plans = [shardmix.plan_merge(models, tmp_path / name) for name in ("x", "y" * 200)]
    assert plans[0].digest() == plans[1].digest()
    assert disk_needed_nbytes(plans[0]) > 0


def nan_models(tmp_path):
    """16 MB, five leaves, 2,000 tensors that are all NaN."""
    return many_tensors(tmp_path, 2000, num_elements=2048, value=np.nan)


def test_anomalies_without_room_end_early(tmp_path):
    """Anomalies without room end a merge early.

    What is told of NaN is not known before; once it is, a disk that lacks room is named.
    """
    models = nan_models(tmp_path)
    told = shardmix.plan_merge(models, tmp_path / "out").disk_needed_nbytes
    with disk_or_skip(tmp_path / "disk", told) as place:
        with pytest.raises(OutputError, match=r"needs .* are done and kept in .* goes on"):
            shardmix.merge(models, place / "out", workers=1)
        staged = place / ".out.shardmix" / "model"
        assert not (staged / "shardmix.json").exists()
        resize(place, told + 1_000_000)
        report = shardmix.merge(models, place / "out", workers=1)
        assert report.bytes_kept > 0
        assert len(report.nonfinite) == 2000


def test_anomalies_with_room_end_no_merge(tmp_path):
    models = nan_models(tmp_path)
    told = shardmix.plan_merge(models, tmp_path / "out").disk_needed_nbytes
    with disk_or_skip(tmp_path / "disk", told + 600_000) as place:
        report = shardmix.merge(models, place / "out", workers=1)
    assert len(report.nonfinite) == 2000


def test_room_for_anomalies_is_looked_for(tmp_path, monkeypatch):
    """As above, for those who may not mount a disk."""
    models = nan_models(tmp_path)
    needs = []

    def check(output, needed_nbytes, *, staged_nbytes):
        needs.append(needed_nbytes)
        if len(needs) > 1:
            raise OutputError("no room")

    monkeypatch.setattr("shardmix.output.disk_need.check_disk", check)
    with pytest.raises(OutputError, match="no room"):
        shardmix.merge(models, tmp_path / "out", workers=1)
    told = shardmix.plan_merge(models, tmp_path / "out").disk_needed_nbytes
    assert told < needs[0] < needs[1] < told + 1_000_000


def test_finite_models_are_looked_at_once(tmp_path, monkeypatch):
    """Finite models are not looked at again."""
    monkeypatch.setattr("shardmix.output.disk_need.check_disk", None)
    tensors = {"w": torch.full((9,), float("nan"))}
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    assert len(shardmix.merge(models, tmp_path / "out").nonfinite) == 1


def test_a_tensor_is_counted_once(tmp_path, monkeypatch):
    """However many chunks of it hold NaN."""
    monkeypatch.setattr("shardmix.execute.merge._MANY", 2)
    monkeypatch.setattr("shardmix.output.disk_need.check_disk", None)
    tensors = {"w": torch.full((3_000_000,), float("nan"))}
    models = [(save_model(tmp_path / name, tensors), 0.5) for name in "ab"]
    report = shardmix.merge(models, tmp_path / "out")
    assert report.strip_bytes < tensors["w"].nbytes / 2
    assert [finding.num_nan for finding in report.nonfinite] == [3_000_000]


def test_a_folder_that_counts():
    """Whole blocks a file, one a folder; what is made anew counts as it was made last."""
    folder = CountedFolder(Path("nowhere"))
    for name, nbytes in [
        ("b", 9 * BLOCK),
        ("a", 0),
        ("b", 1),
        ("c/d/e", BLOCK),
        ("c/f", BLOCK + 1),
    ]:
        with folder.create(name) as file:
            file.write(b"x" * (nbytes // 2))
            file.count(nbytes - nbytes // 2)
    assert folder.sizes == {"a": 0, "b": 1, "c/d/e": BLOCK, "c/f": BLOCK + 1}
    assert folder.nbytes == (0 + 1 + 1 + 2 + 3) * BLOCK


def test_the_journal_counts(tmp_path, monkeypatch):
    """Of a large merge it is more than a block, as long as its lines are."""
    plan = shardmix.plan_merge(two(tmp_path), tmp_path / "out")
    need = disk_needed_nbytes(plan)
    monkeypatch.setattr("shardmix.output.journal.journal_nbytes", lambda plan: 99 * BLOCK + 1)
    assert disk_needed_nbytes(plan) - need == 99 * BLOCK


@pytest.mark.parametrize("digest", ["xxh3", "sha256"])
def test_a_journal_is_as_long_as_foretold(tmp_path, digest):
    models = large_models(tmp_path)  # whose integers differ
    plan = shardmix.plan_merge(models, tmp_path / "out", digest=digest)
    with (
        mock.patch("shardmix.execute.merge.write_provenance", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        shardmix.merge(models, tmp_path / "out", digest=digest)
    length = (tmp_path / ".out.shardmix" / "journal").stat().st_size
    assert length <= journal_nbytes(plan) <= length + 300
