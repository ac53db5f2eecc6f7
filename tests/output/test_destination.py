import os

import pytest

import shardmix
from shardmix.errors import OutputError
from shardmix.output import destination
from shardmix.output.destination import check_disk, check_output, resolve_output
from shardmix.system.held_folder import HeldFolder
from tests.support.models import random_model, save_model
from tests.support.small_disks import disk_or_skip


def model(folder, seed=1):
    return save_model(folder, random_model(seed))


def refused(output, finding, *, overwrite=False, inputs=()):
    with pytest.raises(OutputError, match=finding):
        check_output(output, overwrite=overwrite, inputs=list(inputs))


def test_existing_output_is_refused(tmp_path):
    """An existing output is refused unless it is to be overwritten."""
    out = model(tmp_path / "out")
    refused(out, "exists.*--overwrite")
    check_output(out, overwrite=True, inputs=[])


def test_only_a_model_is_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    refused(tmp_path / "home", "holds no safetensors weights", overwrite=True)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a folder", overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=True, inputs=[])


@pytest.mark.parametrize("overwrite", [True, False])
def test_output_touching_an_input_is_refused(tmp_path, overwrite):
    """An output that is or touches an input is refused."""
    a = model(tmp_path / "x" / "a")
    options = {"overwrite": overwrite, "inputs": [a]}
    refused(a, "is the input", **options)
    refused(resolve_output(tmp_path / "x" / "b" / ".." / "a"), "is the input", **options)
    refused(a / "merged", "lies inside", **options)
    refused(tmp_path / "x", "contains the input", **options)
    link = tmp_path / "link"
    link.symlink_to(a.parent)
    refused(resolve_output(link / "a"), "is the input", **options)
    check_output(tmp_path / "x" / "merged", **options)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("target", ["model", "missing"])
def test_an_output_that_is_a_link_is_refused(tmp_path, overwrite, target):
    """It could lead to a model that nobody has named, or to a place that nobody wants one at."""
    model(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / target)
    refused(resolve_output(tmp_path / "link"), "is a link", overwrite=overwrite)


def test_folder_beside_an_input_file_is_fine(tmp_path):
    """A folder beside a single-file input is fine."""
    path = model(tmp_path / "a") / "model.safetensors"
    check_output(tmp_path / "a" / "merged", overwrite=False, inputs=[path])


def test_output_named_like_a_file_is_refused(tmp_path):
    refused(tmp_path / "out.safetensors", "names a file")


def test_too_little_disk_names_both_figures(tmp_path, monkeypatch):
    """Too little disk is refused, with both figures."""
    monkeypatch.setattr(destination, "free_nbytes", lambda path: 1000)
    check_disk(tmp_path / "out", 1000)
    with pytest.raises(OutputError, match=r"needs 1.00 kB \(1001 bytes\).*1.00 kB free"):
        check_disk(tmp_path / "out", 1001)


@pytest.mark.parametrize("name", ["checkpoint-500/trainer_state.json", "other/model.safetensors"])
def test_model_above_models_is_kept(tmp_path, name):
    """A model with other models below is not overwritten."""
    out = model(tmp_path / "out")
    (out / name).parent.mkdir()
    (out / name).write_text("precious")
    refused(out, "besides a model", overwrite=True)


def test_sentence_model_may_be_overwritten(tmp_path):
    """A sentence-transformers model may be overwritten."""
    out = model(tmp_path / "out")
    (out / "2_Dense").mkdir()
    (out / "2_Dense" / "model.safetensors").write_text("weights")
    check_output(out, overwrite=True, inputs=[])


def test_output_linked_by_input_is_refused(tmp_path):
    """An output whose files are an input's is refused.

    The input is a folder of links into the output, which would be deleted with it.
    """
    out = model(tmp_path / "out")
    link = tmp_path / "in" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(out / "model.safetensors")
    refused(out, "contains the input", overwrite=True, inputs=[link])


def test_path_of_dots_is_what_it_means(tmp_path, monkeypatch):
    """A path of dots is the folder that it means."""
    monkeypatch.chdir(tmp_path)
    assert resolve_output("new/..") == tmp_path
    refused(resolve_output("new/.."), "exists", overwrite=False)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "surrogate\udcff"])
def test_what_cannot_be_a_path_is_refused(name):
    with pytest.raises(OutputError, match="cannot be a path"):
        resolve_output(name)


def test_impossible_name_is_refused(tmp_path):
    """A name that no disk takes is refused."""
    refused(tmp_path / ("x" * 300), "cannot be used")


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.pdf", "model-q4.gguf", "runs/exp1/model.safetensors", "a/b/c/notes.txt"),
        *(".git/HEAD", "thesis.txt", "results.json", "analysis.py", "another.safetensors"),
    ],
)
def test_foreign_files_are_never_deleted(tmp_path, name):
    """What is not the model's is never deleted with it."""
    out = model(tmp_path / "out")
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("precious")
    refused(out, f"holds {name} besides a model", overwrite=True)


def test_a_downloaded_model_is_overwritten(tmp_path):
    """What programs give a model's files as names may go with it."""
    out = model(tmp_path / "out")
    names = [
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
        *(
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "chat_template.jinja",
        ),
        *("preprocessor_config.json", "modeling_own.py", "configuration_own.py", "LICENSE.txt"),
        *("USE_POLICY.md", "sentencepiece.bpe.model", "spiece.model", "README.md"),
        *("1_Pooling/config.json", "sentence_bert_config.json", "modules.json"),
        *("config_sentence_transformers.json", ".gitattributes", "qwen.tiktoken"),
    ]
    (out / "1_Pooling").mkdir()
    for name in names:
        (out / name).write_text("[]")
    check_output(out, overwrite=True, inputs=[])


def test_only_what_a_merge_wrote_may_go(tmp_path):
    """Of a merged model, all that the merge wrote may go, and nothing else."""
    sources = {model(tmp_path / "a"): 0.5, model(tmp_path / "b"): 0.5}
    shardmix.merge(sources, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("edited")
    shardmix.merge(sources, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "vocab.txt").write_text("looks like a model's, but the merge wrote none")
    refused(tmp_path / "out", "holds vocab.txt besides a model", overwrite=True)


def test_a_mount_point_is_not_overwritten(tmp_path, monkeypatch):
    """It cannot be renamed, and what is mounted there may be anything."""
    model = save_model(tmp_path / "out", random_model(1))
    check_output(model, overwrite=True, inputs=())
    status = HeldFolder.status

    def on_another_disk(folder):
        mode, inode, device, *rest = status(folder)
        return os.stat_result((mode, inode, device + 1, *rest))

    monkeypatch.setattr(HeldFolder, "status", on_another_disk)
    with pytest.raises(OutputError, match="out: is a mount point; name a folder in it"):
        check_output(model, overwrite=True, inputs=())


def test_mounted_disk_is_not_overwritten(tmp_path):
    """A disk mounted there is not overwritten."""
    with disk_or_skip(tmp_path / "out", 400_000) as place:
        save_model(place, random_model(1))
        with pytest.raises(OutputError, match="out: is a mount point"):
            check_output(place, overwrite=True, inputs=())
