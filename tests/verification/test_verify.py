"""`verify`: what differs from the merge is found, in the output and against its sources."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmix
from shardmix.errors import MergeCancelled, RecipeError, SourceError
from shardmix.system.hashing import file_digest
from tests.support.cut_off import cut_off, folder_bytes, large_models
from tests.support.models import random_model, save_model
from tests.support.sealed import edit_provenance


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Return a merged model, not to be changed, beside its sources."""
    folder = tmp_path_factory.mktemp("merged")
    shardmix.merge(large_models(folder), folder / "out", max_shard_size="13MB")
    return folder / "out"


@pytest.fixture
def copied(merged, tmp_path):
    """Return a copy of it to damage, with its sources out of sight."""
    shutil.copytree(merged, tmp_path / "out")
    return tmp_path / "out"


def overwrite(path, position, content):
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def problems(folder, **options):
    report = shardmix.verify(folder, **options)
    assert report.is_verified == (not report.problems)
    return report.problems


def test_verifying_reads_all_changes_none(merged):
    """An output is verified reading every byte and changing none."""
    before = folder_bytes(merged)
    report = shardmix.verify(merged)
    assert report.is_verified
    digested = {name for name in before if name not in ("README.md", "shardmix.json")}
    assert report.num_files == len(digested) == 5  # three shards, index, config
    assert report.bytes_read == sum(len(before[name]) for name in digested)
    assert folder_bytes(merged) == before


@pytest.mark.parametrize("options", [{}, {"recompute": True}])
def test_the_last_event_is_the_end(merged, options):
    events = []
    report = shardmix.verify(merged, on_progress=events.append, **options)
    assert report.is_verified
    assert [event.is_end for event in events].count(True) == 1
    end = events[-1]
    assert end.is_end
    assert end.num_bytes_done == end.num_bytes_total
    assert end.num_shards_done == end.num_shards_total == (3 if options else 5)


def test_what_is_missing_counts_as_done(copied):
    """Its bytes are not in what was read."""
    (copied / "model-00001-of-00003.safetensors").unlink()
    with (copied / "model-00003-of-00003.safetensors").open("r+b") as file:
        file.truncate(1000)
    events = []
    report = shardmix.verify(copied, on_progress=events.append)
    assert len(report.problems) == 2
    assert events[-1].is_end
    assert events[-1].num_bytes_done == events[-1].num_bytes_total > 20_000_000
    assert events[-1].num_shards_done == 5
    assert report.bytes_read < 14_000_000


@pytest.mark.parametrize("position", [0, 9, 4 * 2**20, 5_000_001, -1])
def test_one_bit_anywhere_is_found(copied, position):
    path = copied / "model-00002-of-00003.safetensors"
    position %= path.stat().st_size
    byte = path.read_bytes()[position]
    overwrite(path, position, bytes([byte ^ 1]))
    assert problems(copied) == (f"{path}: its bytes are not those that the merge wrote",)


def test_damage_of_any_kind_is_found(copied):
    """What is missing, cut short, added or edited is found."""
    (copied / "model-00001-of-00003.safetensors").unlink()
    overwrite(copied / "config.json", 0, b" ")
    with (copied / "model-00003-of-00003.safetensors").open("r+b") as file:
        file.truncate(1000)
    (copied / "model-more.safetensors").write_bytes(b"x")
    (copied / "README.md").write_text("a card is for people to edit\n")
    found = problems(copied)
    assert [problem.split("/")[-1].split(":")[0] for problem in found] == [
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model-more.safetensors",
    ]
    assert "is missing" in found[1]
    assert "has 1000 bytes, not" in found[2]
    assert "did not write" in found[3]


def test_digest_is_of_leaves_or_the_file(tmp_path):
    """A digest is of leaves or of the whole file. The definition, computed otherwise."""
    blake3 = pytest.importorskip("blake3").blake3
    xxhash = pytest.importorskip("xxhash")
    models = large_models(tmp_path, shards=False)
    for algorithm, leaf_hash in (
        ("xxh3", lambda data: xxhash.xxh3_128(data).digest()),
        ("blake3", lambda data: blake3(data).digest()),
        ("sha256", None),
    ):
        shardmix.merge(models, tmp_path / algorithm, digest=algorithm)
        content = (tmp_path / algorithm / "model.safetensors").read_bytes()
        record = json.loads((tmp_path / algorithm / "shardmix.json").read_text())["digests"]
        assert record["algorithm"] == algorithm
        leaf_nbytes = record["leaf_bytes"]
        if leaf_hash is None:
            expected = hashlib.sha256(content).hexdigest()
        else:
            leaves = [
                content[start : start + leaf_nbytes]
                for start in range(0, len(content), leaf_nbytes)
            ]
            assert len(leaves) == 7
            expected = leaf_hash(b"".join(map(leaf_hash, leaves))).hex()
        assert record["files"]["model.safetensors"] == {
            "bytes": len(content),
            "digest": expected,
        }
        assert problems(tmp_path / algorithm) == ()
        with (tmp_path / algorithm / "model.safetensors").open("rb") as file:
            assert file_digest(file.fileno(), algorithm) == expected


def set_weight(content):
    content["recipe"]["models"][0]["parameters"]["weight"] = 0.7


EDITS = {
    "weight": set_weight,
    "name": lambda content: content["sources"][1].update(name="somebody/else"),
    "commit": lambda content: content["sources"][0].update(commit="c0ffee"),
    "version": lambda content: content.update(shardmix="9.9"),
    "digest of itself": lambda content: content.pop("sha256_above"),
    "form": lambda content: None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_provenance_is_found(copied, edit):
    change = EDITS[edit]
    if edit == "form":  # the same content, written otherwise
        path = copied / "shardmix.json"
        path.write_text(json.dumps(json.loads(path.read_text())))
    else:
        edit_provenance(copied, change, is_sealed=False)
    (problem,) = problems(copied)
    assert problem.startswith(f"{copied / 'shardmix.json'}: is not as the merge wrote it")
    status = shardmix.status(copied)
    assert status.complete.is_edited
    assert "shardmix.json is not as the merge wrote it" in status.note


@pytest.mark.parametrize("more", [b" ", b"\n", b"x"])
def test_bytes_added_to_provenance_are_found(copied, more):
    """Bytes added to a provenance are found."""
    path = copied / "shardmix.json"
    content = path.read_bytes()
    if more != b"x":
        path.write_bytes(content + more)
        assert len(problems(copied)) == 1
    path.write_bytes(content.replace(b"{", b"{ ", 1))
    assert len(problems(copied)) == 1


def test_edited_provenance_is_recomputed(merged, copied):
    """An edited provenance is recomputed all the same.

    What its weights would give differs from what is there.
    """
    edit_provenance(copied, set_weight, is_sealed=False)
    sources = {f"m{number}": merged.parent / f"m{number}" for number in range(2)}
    report = shardmix.verify(copied, recompute=True, sources=sources)
    assert report.recomputed
    assert "shardmix.json: is not as the merge wrote it" in report.problems[0]
    assert "bytes of layer0.weight are not what" in report.problems[1]


def test_the_sha256_of_a_provenance_is_told(tmp_path):
    """By the merge, by verify and by status; a seal that was made anew changes it."""
    out = tmp_path / "out"
    report = shardmix.merge(large_models(tmp_path), out)
    sha256 = hashlib.sha256((out / "shardmix.json").read_bytes()).hexdigest()
    assert report.provenance_sha256 == sha256
    verified = shardmix.verify(out)
    assert verified.provenance_sha256 == sha256
    assert "xxh3 finds damage, but whoever edits files can make new digests" in verified.proof
    assert sha256 in verified.proof
    assert shardmix.status(out).complete.provenance_sha256 == sha256
    assert not shardmix.status(out).complete.is_edited
    edit_provenance(out, set_weight)
    forged = shardmix.verify(out)
    assert forged.is_verified
    assert forged.provenance_sha256 != sha256


def test_a_seal_is_of_all_bytes_above_it(merged):
    """The definition, computed otherwise."""
    content = (merged / "shardmix.json").read_bytes()
    above, sealed, rest = content.rpartition(b'"sha256_above": "')
    assert rest == hashlib.sha256(above + sealed).hexdigest().encode() + b'"\n}\n'


def test_provenance_with_anomalies_is_sealed(tmp_path):
    """A provenance with anomalies is sealed. They are written one by one, behind the rest."""
    models = large_models(tmp_path)
    path = models[0][0] / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    for tensor in tensors.values():
        tensor[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    shardmix.merge(models, tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "shardmix.json").read_text())["nonfinite"]) == 4
    assert problems(tmp_path / "out") == ()


def test_an_unknown_digest_is_refused(tmp_path):
    models = large_models(tmp_path)
    with pytest.raises(RecipeError, match="digest 'md5': must be one of xxh3, blake3, sha256"):
        shardmix.merge(models, tmp_path / "out", digest="md5")


def test_missing_digest_library_is_refused(tmp_path, monkeypatch):
    """A digest that is not installed is refused."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "blake3" else find(name)
    )
    models = large_models(tmp_path)
    with pytest.raises(RecipeError, match=r"pip install 'shardmix\[blake3\]'"):
        shardmix.plan_merge(models, tmp_path / "out", digest="blake3")


def test_recomputing_finds_sources_beside(merged):
    """Recomputing compares with sources beside the output."""
    report = shardmix.verify(merged, recompute=True)
    assert report.is_verified
    assert report.recomputed
    assert report.bytes_read > 3 * 28_000_000


def forge(folder, name):
    """Make the digest of a damaged file right."""

    def edit(content):
        with (folder / name).open("rb") as file:
            digest = file_digest(file.fileno(), content["digests"]["algorithm"])
        content["digests"]["files"][name]["digest"] = digest

    edit_provenance(folder, edit)


def test_recomputing_finds_a_forged_digest(merged, copied):
    """Recomputing finds what a forged digest hides."""
    name = "model-00002-of-00003.safetensors"
    overwrite(copied / name, 1_000_000, b"\1\2\3\4\5\6\7\10")
    forge(copied, name)
    sources = {f"m{number}": merged.parent / f"m{number}" for number in range(2)}
    assert problems(copied) == ()
    (problem,) = problems(copied, recompute=True, sources=sources)
    assert "8 bytes of layer" in problem
    assert problem.endswith(f"are not what {sources['m0']} and {sources['m1']} give")


def test_recomputing_finds_a_changed_header(merged, copied):
    name = "model-00002-of-00003.safetensors"
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))
    forge(copied, name)
    sources = {"1": merged.parent / "m0", "2": merged.parent / "m1"}
    (problem,) = problems(copied, recompute=True, sources=sources)
    assert "its header" in problem


def test_missing_sources_are_asked_for(copied):
    """Sources that are nowhere to be found are asked for."""
    with pytest.raises(SourceError, match=r"m0: .* cannot be found.*--source m0=PATH"):
        shardmix.verify(copied, recompute=True)


def test_other_sources_are_refused(merged, copied, tmp_path):
    other = save_model(tmp_path / "m0", random_model(9))
    with pytest.raises(shardmix.ShardmixError):
        shardmix.verify(copied, recompute=True, sources={"m1": merged.parent / "m1", "m0": other})
    third = large_models(tmp_path / "third", shards=False)[0][0]
    with pytest.raises(SourceError, match=r"third/m0: is not the m0 that was merged"):
        shardmix.verify(copied, recompute=True, sources={"m1": merged.parent / "m1", "m0": third})


def test_swapped_sources_give_other_bytes(merged, copied):
    """Sources in the wrong places do not give the output.

    Their headers are the same: the bytes tell.
    """
    found = problems(
        copied, recompute=True, sources={"1": merged.parent / "m1", "2": merged.parent / "m0"}
    )
    assert len(found) == 8  # every tensor, and integers are the first model's


def test_recorded_sources_are_found(tmp_path):
    """Sources are found where they were, if that was recorded."""
    models = large_models(tmp_path / "far" / "away")
    shardmix.merge(models, tmp_path / "out", record_paths=True)
    text = (tmp_path / "out" / "shardmix.json").read_text()
    assert json.loads(text)["sources"][1]["path"] == str(models[1][0])
    assert shardmix.verify(tmp_path / "out", recompute=True).is_verified


def test_provenance_hides_the_machine(merged):
    """By default, nothing of the machine is told."""
    for name, content in folder_bytes(merged).items():
        assert str(merged.parent).encode() not in content, name


def test_provenance_tells_sources_and_tool(merged):
    """Provenance tells what was merged, and by what."""
    content = json.loads((merged / "shardmix.json").read_text())
    assert content["recipe"] == {
        "merge_method": "linear",
        "models": [
            {"model": "m0", "parameters": {"weight": 0.6}},
            {"model": "m1", "parameters": {"weight": 0.4}},
        ],
        "parameters": {"normalize": False},
        "max_shard_size": content["recipe"]["max_shard_size"],
    }
    assert [source["name"] for source in content["sources"]] == ["m0", "m1"]
    header = (merged.parent / "m0" / "model-00001-of-00002.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    first = content["sources"][0]["files"][0]
    assert first["header_sha256"] == hashlib.sha256(header[8 : 8 + length]).hexdigest()
    assert content["shardmix"] == shardmix.__version__
    assert content["torch"] == torch.__version__
    assert len(content["plan"]) == 64


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"format": 3}, "in a format"),
        ({"digests": {"algorithm": "md5", "leaf_bytes": 4194304, "files": {}}}, "unknown"),
        ({"digests": {"algorithm": "xxh3", "leaf_bytes": 1, "files": {}}}, "in a format"),
        *[
            (
                {
                    "digests": {
                        "algorithm": "xxh3",
                        "leaf_bytes": 4194304,
                        "files": {name: {"bytes": 1, "digest": ""}},
                    }
                },
                "outside the model's folder",
            )
            for name in ("../x", "/etc/passwd", "", "a/../../x", "nul\0")
        ],
        ({"sources": 1}, "is not a merge's shardmix.json"),
        ({"recipe": 1}, "is not a merge's shardmix.json"),
        ({"digests": None}, "is not a merge's shardmix.json"),
    ],
)
def test_a_strange_provenance_is_refused(copied, change, finding):
    path = copied / "shardmix.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError, match=finding):
        shardmix.verify(copied)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"{}"])
def test_invalid_provenance_is_refused(copied, content):
    """A provenance that is none is refused."""
    (copied / "shardmix.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"is not a merge's shardmix\.json"):
        shardmix.verify(copied)


def test_foreign_model_cannot_be_verified(tmp_path):
    """What shardmix did not merge cannot be verified."""
    save_model(tmp_path / "m", random_model(1))
    with pytest.raises(SourceError, match=r"has no shardmix\.json.*nothing to verify it against"):
        shardmix.verify(tmp_path / "m")


def test_pipe_for_a_file_is_not_awaited(copied):
    """A pipe in place of a file is not waited for."""
    (copied / "config.json").unlink()
    os.mkfifo(copied / "config.json")
    (problem,) = problems(copied)
    assert problem.endswith("config.json: cannot be read (not a regular file)")


def test_link_out_of_folder_is_not_followed(copied, tmp_path):
    """A link out of the folder is not followed."""
    (copied / "config.json").rename(tmp_path / "secret.json")
    (copied / "config.json").symlink_to(tmp_path / "secret.json")
    (problem,) = problems(copied)
    assert "is a link to" in problem


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"more{ending}"
            for ending in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
        ),
        *("deep/er/model.safetensors", "modeling.py", "deep/code.py", "tokenizer.json"),
        *("1_Pooling/config.json", "pytorch_model.bin.index.json", "adapter_config.json"),
        *("model.onnx", "onnx/model.onnx_data", "onnx/config.json", "model.onnx.data"),
        *("openvino_model.xml", "openvino/openvino_model.bin", "MODEL.ONNX", "3_Evil/x"),
        *("model.pkl", "m.pickle", "m.joblib", "m.npz", "m.npy", "tf_model.h5", "m.tflite"),
        *("coreml/m.mlpackage/Data/m.mlmodel", "m.pte", "m.engine", "lib/evil.so", "evil.so.1"),
        *("evil.cpython-311-x86_64-linux-gnu.so", "__pycache__/m.pyc", "tf/saved_model.pb"),
        *("model.ckpt.data-00000-of-00001", "text_encoder/config.json", "vocab.txt", "a.model"),
    ],
)
def test_added_file_of_a_loader_is_found(copied, name):
    """An added file that a loader reads is found."""
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    (copied / name).write_text("{}")
    (problem,) = problems(copied)
    assert problem == f"{copied / name}: is a file that the merge did not write, and may be loaded"


def test_an_added_link_to_a_folder_is_found(copied, tmp_path):
    (copied / "1_Pooling").symlink_to(tmp_path)
    (problem,) = problems(copied)
    assert problem == f"{copied / '1_Pooling'}: is a link that the merge did not make"


def test_what_no_loader_reads_may_be_added(copied):
    names = ("README.md", ".gitattributes", ".git/x.bin", "plot.png", "notes/README.md")
    for name in (*names, "eval/scores.csv", "eval/results.json", "paper.pdf", "notes/list.txt"):
        (copied / name).parent.mkdir(exist_ok=True)
        (copied / name).write_text("")
    assert problems(copied) == ()


def test_weightless_provenance_is_refused(copied):
    """A provenance without weights is refused."""
    path = copied / "shardmix.json"
    content = json.loads(path.read_text())
    files = content["digests"]["files"]
    content["digests"]["files"] = {"config.json": files["config.json"]}
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match="names no weight file"):
        shardmix.verify(copied)


def test_file_shrinking_while_read_is_found(copied, monkeypatch):
    """A file that shrinks while it is read is found."""
    path = copied / "model-00002-of-00003.safetensors"
    preadv = os.preadv

    def shrink(descriptor, buffers, start):
        if start and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.truncate(path, start)
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", shrink)
    (problem,) = problems(copied)
    assert re.search(r"cannot be read \(it ended \d+ bytes early while it was read\)", problem)


def test_absent_digest_names_its_install(copied, monkeypatch):
    """A digest that is not installed is to be installed."""
    path = copied / "shardmix.json"
    path.write_text(path.read_text().replace('"xxh3"', '"blake3"'))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RecipeError, match=r"pip install 'shardmix\[blake3\]'\); install it$"):
        shardmix.verify(copied)


def test_interrupt_ends_a_long_reading(copied):
    """An interrupt does not wait for a large file to be read.

    It has holes of terabytes, which take many minutes to read.
    """
    grow(copied, "model-00002-of-00003.safetensors")
    threads = set(threading.enumerate())
    seen = []

    def interrupt(event):
        assert threading.current_thread() is threading.main_thread()
        seen.append(event)
        if event.num_bytes_done > 10_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmix.verify(copied, on_progress=interrupt)
    assert set(threading.enumerate()) == threads
    cancel = threading.Event()
    with pytest.raises(MergeCancelled):
        shardmix.verify(copied, on_progress=lambda _event: cancel.set(), cancel=cancel)
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_command(copied, number, status):
    grow(copied, "model-00002-of-00003.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "shardmix", "verify", str(copied)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "verifying" in process.stderr.readline()
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert "nothing was changed" in errors


def grow(folder, name):
    """Let a file have terabytes, nearly all of them a hole, and its record as many."""
    os.truncate(folder / name, 2 * 10**12)
    edit_provenance(
        folder, lambda content: content["digests"]["files"][name].update(bytes=2 * 10**12)
    )


def test_status_tells_what_is_there(tmp_path):
    out = tmp_path / "out"
    models = large_models(tmp_path)
    absent = shardmix.status(out)
    assert (absent.exists, absent.complete, absent.unfinished) == (False, None, None)
    cut_off(models, out, num_leaves=5)
    unfinished = shardmix.status(out).unfinished
    assert unfinished.process is None
    assert (unfinished.num_shards_done, unfinished.num_shards) == (1, 2)
    assert unfinished.bytes_done == 5 * 4 * 2**20
    assert unfinished.merge.weights == (0.6, 0.4)
    seen = []

    def look(_event):
        seen.append(shardmix.status(out).unfinished.process)

    shardmix.merge(models, out, on_progress=look)
    assert set(seen) == {os.getpid()}
    complete = shardmix.status(out)
    assert complete.unfinished is None
    assert complete.complete.sources == ("m0", "m1")
    assert complete.complete.weights == (0.6, 0.4)
    foreign = shardmix.status(models[0][0])
    assert foreign.exists
    assert foreign.complete is None
    assert "no merge by shardmix" in foreign.note
    msgspec.json.encode(complete)
