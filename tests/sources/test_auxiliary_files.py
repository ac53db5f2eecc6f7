"""Which files of a model's folder go along with the weights, and what is said of the others."""

import json
import os

import pytest

import shardmix
from shardmix.conventions import file_kinds
from shardmix.conventions.file_kinds import divide
from shardmix.errors import SourceError
from shardmix.sources.auxiliary_files import find_auxiliary_files, left_out_warning
from tests.support.models import random_model, save_model

OTHER_FORMAT = "weights in another format"
OTHER_WEIGHTS = "other weights of the model"
CHECKPOINT = "a trainer's checkpoint"


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def reasons(*names, **options):
    """Return name → reason for what does not go along, of files of one byte."""
    kept, left_out = divide(dict.fromkeys(names, 1), **options)
    told = {finding.name: finding.reason for finding in left_out}
    assert sorted((*kept, *told)) == sorted({*kept, *told})
    return told


@pytest.mark.parametrize(
    "name",
    [
        *("colbert_linear.pt", "sparse_linear.pt", "mean_std.pth", "speakers_xtts.pth"),
        "model_head.pkl",
        *("bpe.codes", "vocab", "dict.txt", "source.spm", "sentencepiece.bpe.model", "lang.yaml"),
        *("mel_filters.npz", "embedding.npy", "voice.wav", "figure.png", "LICENSE", "samples.csv"),
        *("params.json", "tekken.json", "tokenizer.model.v3", "qwen.tiktoken", "requirements.txt"),
        *("configuration.json", "tokenization_x.py", "layers/attention.py", "a/b/c/d.py"),
        *("speech_tokenizer/model.safetensors", "speech_tokenizer/config.json"),
        *("vocoder/pytorch_model.bin", "vocoder/model.ckpt", "assets/vocos.pt"),
        *("tokenizer-e351c8d8.safetensors", "latest.json", "scheduler/scheduler_config.json"),
        *("kernels/csrc/op.cpp", "images/model.png", "model_card.pdf", "modelling.md"),
    ],
)
def test_unknown_kinds_go_along(name):
    """Whatever is of no known kind goes along."""
    assert reasons("config.json", name) == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((f"pytorch_model{end}.bin", OTHER_FORMAT) for end in ("", "-00001-of-00002", ".fp16")),
        ("pytorch_model.pt", OTHER_FORMAT),
        ("model.pth", OTHER_FORMAT),
        ("open_clip_pytorch_model.bin", OTHER_FORMAT),
        ("tf_model.h5", OTHER_FORMAT),
        ("flax_model-00001-of-00002.msgpack", OTHER_FORMAT),
        ("flax_model.msgpack.index.json", OTHER_FORMAT),
        ("rust_model.ot", OTHER_FORMAT),
        ("sd-v1-4.ckpt", OTHER_FORMAT),
        ("model.ckpt.data-00000-of-00001", OTHER_FORMAT),
        ("consolidated.00.pth", OTHER_FORMAT),
        ("model-q4_k_m.gguf", OTHER_FORMAT),
        ("64-fp16.tflite", OTHER_FORMAT),
        ("model_quantized.onnx", OTHER_FORMAT),
        ("model.onnx_data", OTHER_FORMAT),
        ("openvino_model.xml", OTHER_FORMAT),
        ("openvino_tokenizer.bin", OTHER_FORMAT),
        ("model.fp16.safetensors", OTHER_WEIGHTS),
        ("model-00001-of-00003.safetensors", OTHER_WEIGHTS),
        ("consolidated.safetensors", OTHER_WEIGHTS),
        ("gpt-neox-2-of-3.safetensors", OTHER_WEIGHTS),
        ("adapter_model.safetensors", file_kinds.ADAPTER),
        ("adapter_config.json", file_kinds.ADAPTER),
        (".env", "hidden"),
        ("optimizer.pt", "a trainer's"),
        ("rng_state_0.pth", "a trainer's"),
        ("training_args.bin", "a trainer's"),
        ("eval_results.json", "a trainer's"),
        ("similarity_evaluation_sts-dev_results.csv", "a trainer's"),
        ("events.out.tfevents.1700000000.host.1.0", "a trainer's"),
        ("zero_to_fp32.py", "a trainer's"),
        ("latest", "a trainer's"),
        (".gitattributes", "version control"),
        (".DS_Store", "a cache"),
        ("model.safetensors.incomplete", "a cache"),
        ("README.md", "written anew"),
        ("shardmix.json", "written anew"),
        ("model.safetensors.index.json", "written anew"),
        ("model.safetensors.index.fp16.json", "written anew"),
    ],
)
def test_a_file_of_a_known_kind_stays_behind(name, reason):
    assert reasons("config.json", name) == {name: reason}


@pytest.mark.parametrize(
    ("name", "folder", "reason"),
    [
        ("onnx/config.json", "onnx/", OTHER_FORMAT),
        ("original/tokenizer.model", "original/", OTHER_FORMAT),
        ("coreml/a/b/weights/w.bin", "coreml/", OTHER_FORMAT),
        ("a/b.mlpackage/x.bin", "a/b.mlpackage/", OTHER_FORMAT),
        ("fp16/model.safetensors", "fp16/", OTHER_WEIGHTS),
        ("8bit/model.safetensors", "8bit/", OTHER_WEIGHTS),
        ("checkpoint-500/config.json", "checkpoint-500/", CHECKPOINT),
        ("best/optimizer.bin", "best/", CHECKPOINT),
        ("global_step10/x.pt", "global_step10/", CHECKPOINT),
        ("wandb/run/x.txt", "wandb/", "a trainer's"),
        (".git/hooks/x", ".git/", "version control"),
        (".ssh/id_rsa", ".ssh/", "hidden"),
        ("__pycache__/x.py", "__pycache__/", "a cache"),
        (".venv/bin/python", ".venv/", "a cache"),
    ],
)
def test_folder_of_known_kind_stays_behind(tmp_path, name, folder, reason):
    """A folder of a known kind stays behind.

    Both by a list of names, as from the Hub, and by looking into a folder.
    """
    assert reasons("config.json", name) == {folder: reason}
    found = find_auxiliary_files(fill(tmp_path, "config.json", name))
    assert found.files == ("config.json",)
    assert [(finding.name, finding.reason) for finding in found.left_out] == [(folder, reason)]


def test_only_weights_of_a_part_go_along():
    """Below the model's folder pickles stay behind only beside safetensors."""
    part = ("vocoder/pytorch_model.bin", "vocoder/model.safetensors")
    assert reasons(part[0]) == {}
    assert reasons(*part) == {part[0]: OTHER_FORMAT}


def test_merged_weights_are_no_loss():
    names = ("model-1-of-2.safetensors", "weights/b.safetensors")
    assert reasons("config.json", *names, weights=names) == {}


def test_module_folders_go_along_whole():
    name, format_name = "Router/checkpoint-1/optimizer.pt", "Router/pytorch_model.onnx"
    assert reasons(name, modules=["Router"]) == {}
    assert reasons(format_name, modules=["Router"]) == {format_name: OTHER_FORMAT}
    assert reasons(name) == {"Router/checkpoint-1/": CHECKPOINT}


def test_sizes_are_bounded():
    one, most = file_kinds.MAX_FILE_NBYTES, file_kinds.MAX_TOTAL_NBYTES
    sizes = {"tokenizer.json": 5 * one, "a.wav": one + 1, "z.wav": 3}
    sizes |= {f"b{number}.wav": one for number in range(most // one)}
    kept, left_out = divide(sizes)
    last = f"b{most // one - 1}.wav"
    assert sorted(set(sizes) - set(kept)) == ["a.wav", last]
    assert [(finding.name, finding.reason) for finding in left_out] == [
        (last, "beyond 4.00 GB in all"),
        ("a.wav", "larger than 1.00 GB"),
    ]
    assert divide(sizes | {"1_Dense/w": 9 * most}, modules=["1_Dense"])[0] == sorted(
        {*kept, "1_Dense/w"}
    )


def test_a_folder_of_many_files_stays_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(file_kinds, "MAX_FOLDER_FILES", 4)
    names = [f"images/{number}.png" for number in range(5)]
    fill(tmp_path, "config.json", "few/1", "few/2", "few/x/3", *names)
    found = find_auxiliary_files(tmp_path)
    assert found.files == ("config.json", "few/1", "few/2", "few/x/3")
    assert [finding.name for finding in found.left_out] == ["images/"]
    assert reasons("config.json", *names) == {"images/": file_kinds.TOO_MANY_FILES}


def test_deep_folders_stay_behind(tmp_path):
    """Folders nested too deeply stay behind."""
    deep = "/".join("abcdefgh")
    fill(tmp_path, "config.json", f"{deep}/file", f"{deep}/i/file")
    found = find_auxiliary_files(tmp_path)
    assert found.files == (f"{deep}/file", "config.json")
    assert [finding.name for finding in found.left_out] == [f"{deep}/i/"]


@pytest.mark.parametrize("name", ["notes.md", "vocab", "code/x.py", "colbert_linear.pt"])
def test_a_link_to_a_file_outside_is_refused(tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    folder = fill(tmp_path / "m", "config.json", "code/y.py")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match=f"{name}: is a link to .*secret, outside"):
        find_auxiliary_files(folder)


def test_excluded_link_is_let_be(tmp_path):
    """A link that would not go along is let be."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("secret")
    folder = fill(tmp_path / "m", "config.json")
    (folder / "data").symlink_to(tmp_path / "elsewhere")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere" / "secret")
    (folder / "gone").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    found = find_auxiliary_files(folder)
    assert found.files == ("config.json",)
    assert {finding.name: finding.reason for finding in found.left_out} == {
        "data/": "a link to a folder",
        "gone": "a link to nothing",
        "pipe": "not a regular file",
        "pytorch_model.bin": OTHER_FORMAT,
    }


@pytest.mark.parametrize(
    "name", ["Screenshot at 3.04\u202fPM.png", "a\nb.png", "\udcff.wav", "\udcff.onnx"]
)
def test_unprintable_name_stays_behind(tmp_path, name):
    """A name that cannot be printed stays behind.

    It is no reason to refuse a merge, unless the file is surely the model's.
    """
    fill(tmp_path, "config.json", name)
    found = find_auxiliary_files(tmp_path)
    assert found.files == ("config.json",)
    [left_out] = found.left_out
    assert left_out.name.isprintable()
    assert left_out.reason in (file_kinds.UNPRINTABLE, OTHER_FORMAT)
    fill(tmp_path, "a\u202fb.json")
    with pytest.raises(SourceError, match="control characters in its name"):
        find_auxiliary_files(tmp_path)


def test_what_cannot_be_read_stays_behind(tmp_path, monkeypatch):
    """Unless it is surely the model's: then the merge itself says so."""
    fill(tmp_path, "config.json", "notes.md", "private/x", "code/x.py")
    real_scandir = os.scandir

    def scandir(path):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: "notes" not in str(path))
    found = find_auxiliary_files(tmp_path)
    assert found.files == ("code/x.py", "config.json")
    assert [(each.name, each.reason) for each in found.left_out] == [
        ("notes.md", "cannot be read"),
        ("private/", "cannot be read"),
    ]


def test_single_file_brings_a_models_files(tmp_path):
    """Of a single file's folder, only a model's files go along.

    It may be a folder of downloads; what stays behind is told, as it may be the model's.
    """
    models = [
        (save_model(tmp_path / name, random_model(seed)) / "model.safetensors", 0.5)
        for seed, name in enumerate("ab")
    ]
    folder = fill(tmp_path / "a", "tokenizer.json", "invoice.pdf", "other/secret", "x.gguf")
    report = shardmix.merge(models, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "tokenizer.json", "model.safetensors", "README.md", "shardmix.json"),
    }
    assert [finding.name for finding in report.left_out] == ["invoice.pdf"]
    assert any("invoice.pdf (beside a single file; name the folder)" in w for w in report.warnings)
    assert folder.exists()


@pytest.mark.parametrize(
    ("weights", "mark", "others"),
    [
        ("consolidated.safetensors", "params.json", ("tekken.json", "tokenizer.model.v3")),
        ("open_clip_model.safetensors", "open_clip_config.json", ("vocab.json", "merges.txt")),
    ],
)
def test_other_loaders_files_go_along(tmp_path, weights, mark, others):
    folder = fill(tmp_path, weights, mark, *others)
    found = find_auxiliary_files(folder, weights=[weights], is_single_file=True)
    assert found.files == tuple(sorted((mark, *others)))
    assert find_auxiliary_files(folder, weights=["my.safetensors"], is_single_file=True).files == ()


def test_what_config_from_leaves_out_is_told(tmp_path):
    """What is left out of the config source is told."""
    models = [
        (save_model(tmp_path / name, random_model(seed)), 0.5) for seed, name in enumerate("ab")
    ]
    base = fill(save_model(tmp_path / "base", random_model(3)), "model.gguf")
    plan = shardmix.plan_merge(models, config_from=base)
    assert [finding.name for finding in plan.left_out] == ["model.gguf"]
    assert any(
        warning.startswith("left out") and "base has" in warning for warning in plan.warnings
    )


def test_a_long_list_is_shortened():
    names = [f"{number}.onnx" for number in range(9)]
    _, left_out = divide(dict.fromkeys(names, 1))
    warning = left_out_warning(left_out, "m")
    assert "4.onnx and 4 more (weights in another format)" in warning
    assert left_out_warning(divide({".git/x": 1})[1], "m") is None


def test_json_lists_what_is_left_out(tmp_path):
    models = [
        (save_model(tmp_path / name, random_model(seed)), 0.5) for seed, name in enumerate("ab")
    ]
    digest = shardmix.plan_merge(models).digest()
    fill(tmp_path / "a", ".git/x", "q.gguf")
    plan = shardmix.plan_merge(models)
    assert plan.digest() == digest  # the output's bytes are the same
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    assert json.loads(plan.to_json())["left_out"] == [
        {"name": "q.gguf", "reason": OTHER_FORMAT, "is_told": True},
        {"name": ".git/", "reason": "version control", "is_told": False},
    ]
