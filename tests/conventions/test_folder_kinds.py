"""Sources that are no model in safetensors: each is told what it is, and the way on."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

import shardmix
from shardmix.conventions.folder_kinds import no_weights, no_weights_file
from shardmix.errors import SourceError
from shardmix.sources.resolve import open_source
from tests.support.models import load_model, random_model, save_model

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


def refused(source):
    with pytest.raises(SourceError) as caught:
        open_source(str(source))
    return str(caught.value)


def fill(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"x")
    return folder


FOLDERS = [
    ([], "is empty"),
    (["notes.txt"], "name the model's folder"),
    (["config.json", "tokenizer.json"], "has config.json, tokenizer.json but no weights"),
    (
        ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/x.safetensors"],
        "whose parts are models of their own: unet, vae; merge each part with its like, folder by "
        "folder, such as SOURCE/unet",
    ),
    (["model_index.json"], "none of them is here in safetensors"),
    (["adapter_model.safetensors", "adapter_config.json"], "as BASE+ADAPTER"),
    (["pytorch_lora_weights.safetensors"], "holds an adapter (pytorch_lora_weights.safetensors)"),
    (["model.fp16.safetensors"], "in a variant only (model.fp16.safetensors); give that file"),
    (["diffusion_pytorch_model.bf16.safetensors"], "give that file itself as the source"),
    (["model.fp16-00001-of-00002.safetensors"], "in a variant only (model.fp16-00001-of-00002"),
    (
        ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
        "but no model.safetensors.index.json, which says what is in which, and of 3 shards lacks "
        "number 2; fetch them",
    ),
    (["consolidated-00001-of-00002.safetensors"], "no consolidated.safetensors.index.json"),
    (["diffusion_pytorch_model_1_of_2.safetensors"], "no diffusion_pytorch_model.safetensors.ind"),
    (["model.safetensors-00001-of-00002.safetensors"], "but no model.safetensors.index.json"),
    (["model-rank-0-part-0.safetensors"], "the state of vLLM's workers"),
    (["sd15.safetensors", "vae.safetensors"], "has sd15.safetensors, vae.safetensors but neither"),
    (["models--a--b/", "models--c--d/"], "is a folder of the Hub's cache, which holds models--a--"),
    (["pytorch_model_fsdp_0/__0_0.distcp"], "has pytorch_model_fsdp_0/__0_0.distcp but no .meta"),
    (["__1_0.distcp", "__0_0.distcp", "__0.metadata"], "each rank described for itself (__0.meta"),
    (["sharded/.metadata", "sharded/__0_0.distcp"], "give one of them, such as SOURCE/sharded"),
    (["global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest"], "zero_to_fp32.py"),
    (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "zero_to_fp32.py"),
    (["iter_0001000/", "latest_checkpointed_iteration.txt"], "Megatron-LM"),
    (
        ["checkpoint-500/x", "checkpoint-1000/model.safetensors", "training_args.bin"],
        "it holds checkpoint-500/, checkpoint-1000/; give one of them, such as "
        "SOURCE/checkpoint-1000",
    ),
    (["model.Q4_K_M.gguf"], "only as GGUF (model.Q4_K_M.gguf)"),
    (["openvino_model.xml", "openvino_model.bin"], "only for OpenVINO"),
    (["consolidated.00.pth", "params.json"], "as Meta releases them (consolidated.00.pth)"),
    (["model.pkl", "config.json", "tf_model.h5"], "only as pickle (model.pkl)"),
    (["sd-v1-4.ckpt"], "give the file itself as the source"),
    (["tf_model.h5", "config.json"], "from_tf=True"),
    (["saved_model/saved_model.pb"], "from_tf=True"),
    (["bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"], "from_tf=True"),
    (["flax_model.msgpack"], "from_flax=True"),
    (["onnx/model.onnx"], "only as ONNX (onnx/)"),
    (["model.onnx", "config.json"], "only as ONNX (model.onnx)"),
    (["weights.npz"], "only for MLX"),
    (["model.tflite"], "has weights only as model.tflite"),
    (["a.mlpackage/x"], "has weights only as a.mlpackage/"),
    (["model.zip"], "unpack it"),
    (["model.tar.gz"], "unpack it"),
    (["model.safetensors.incomplete"], "a download that is not finished"),
    (["my-model/model.safetensors", "my-model/config.json"], "give that folder: SOURCE/my-model"),
    (["downloads.zip", "x.gguf", "m/model.safetensors"], "m/ below it has; give that folder"),
    (["weights.pt", "2_Dense/model.safetensors"], "has weights.pt but neither"),
    (["a/x.safetensors.index.json", "b/model.safetensors"], "but a/, b/ below it has"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "finding"), FOLDERS, ids=[str(names) for names, _ in FOLDERS])
def test_other_kind_of_folder_is_recognised(tmp_path, names, finding):
    """A folder of another kind is recognised.

    The same is said of a folder, and of a repository's list of files.
    """
    message = refused(fill(tmp_path / "m", *names))
    assert finding.replace("SOURCE", str(tmp_path / "m")) in message
    assert finding in str(no_weights([n for n in names if not n.endswith("/")], "SOURCE")) or (
        any(name.endswith("/") for name in names)
    )


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("model.safetensors.index.json", "the index of a model in shards; give its folder"),
        ("model-q4.gguf", "GGUF"),
        ("model.pkl", "a pickle"),
        ("model.onnx", "another format"),
        ("model.zip", "an archive; unpack it"),
        ("model.tar.gz", "an archive; unpack it"),
        ("recipe.yaml", "a recipe; give it without a weight"),
        ("config.json", "is JSON; give the model's folder"),
        ("model.txt", "give a model folder"),
    ],
)
def test_other_kind_of_file_is_recognised(tmp_path, name, finding):
    (tmp_path / name).write_bytes(b"x")
    message = refused(tmp_path / name)
    assert "not a .safetensors file" in message
    assert finding in message
    assert finding in str(no_weights_file(name))


@pytest.mark.parametrize(
    "name",
    [
        *("model-00001-of-00003.safetensors", "model_0001_of_0003.safetensors"),
        *("consolidated-00002-of-00002.safetensors", "diffusion_pytorch_model-1-of-2.safetensors"),
        *("model.safetensors-00001-of-00002.safetensors", "x.fp16-00001-of-00002.safetensors"),
    ],
)
def test_one_of_several_files_is_no_model(tmp_path, name):
    save_file({"w": torch.ones(2)}, tmp_path / name)
    message = refused(tmp_path / name)
    assert f"files that are a model together; give their folder, {tmp_path}" in message


def test_file_named_by_an_index_is_no_model(tmp_path):
    """A file that an index names beside others is no model."""
    folder = save_model(
        tmp_path / "m", random_model(1), shards=[["model.scale"], ["lm_head.weight"]]
    )
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "first"))
    (folder / "model-00001-of-00002.safetensors").rename(folder / "first.safetensors")
    assert "is one of 2 files" in refused(folder / "first.safetensors")


def test_the_only_shard_is_a_whole_model(tmp_path):
    path = tmp_path / "model-00001-of-00001.safetensors"
    save_file({"w": torch.ones(2)}, path)
    assert open_source(str(path)).tensors.names == ("w",)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model", "heads.pt"]
)
def test_a_git_lfs_pointer_is_recognised(tmp_path, name):
    models = [
        (save_model(tmp_path / each, random_model(seed)), 0.5) for seed, each in enumerate("ab")
    ]
    (tmp_path / "a" / name).write_bytes(LFS)
    with pytest.raises(SourceError, match=rf"a/{name}: is a Git LFS pointer.*git lfs pull"):
        shardmix.plan_merge(models)


def cached(tmp_path, *commits, main=None):
    """Make a repository's folder as the Hub's cache has it."""
    repository = tmp_path / "models--org--name"
    for number, commit in enumerate(commits):
        save_model(repository / "snapshots" / commit, random_model(number))
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


def test_cached_repository_is_its_snapshot(tmp_path):
    """A cached repository stands for its snapshot."""
    first, second = "a" * 40, "b" * 40
    for repository, commit in (
        (cached(tmp_path / "one", first), first),
        (cached(tmp_path / "two", first, second, main=second), second),
        (cached(tmp_path / "stale", first, main=second), first),
    ):
        assert open_source(str(repository)).folder == repository / "snapshots" / commit


@pytest.mark.parametrize("main", [None, "../../secret", "a" * 39, "\xff"])
def test_one_of_several_snapshots_is_named(tmp_path, main):
    """Of several snapshots, one must be named."""
    save_model(tmp_path / "secret", random_model(3))
    message = refused(cached(tmp_path, "a" * 40, "b" * 40, main=main))
    assert f"snapshots/{'a' * 40}/, snapshots/{'b' * 40}/" in message
    assert "models--org--name/snapshots/COMMIT" in message


LORA = [
    *("base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"),
    *("base_model.model.embed_tokens.lora_embedding_A", "q.lora_magnitude_vector.weight"),
    *("lora_unet_down_blocks_0_to_q.lora_up.weight", "lora_te_text_model.lora_down.weight"),
    *("unet.to_q.lora.up.weight", "unet.processor.to_q_lora.down.weight", "x.hada_w1_a"),
    *("unet.to_k.lora_linear_layer.up.weight", "lycoris_x.lokr_w1", "h.0.attn.ia3_l"),
    *("prompt_embeddings", "layers.0.q.vera_lambda_b", "x.oft_blocks", "x.boft_R", "x.oft_r"),
]


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_is_refused(tmp_path, name):
    models = []
    for each in "ab":
        save_file({name: torch.ones(2, 2)}, tmp_path / f"{each}.safetensors")
        models.append((tmp_path / f"{each}.safetensors", 0.5))
    with pytest.raises(SourceError, match=r"is an adapter, not a model.*as BASE\+ADAPTER"):
        shardmix.plan_merge(models)


def test_adapter_file_is_refused(tmp_path):
    """An adapter's file is refused, whatever is in it."""
    for each in "ab":
        (tmp_path / each).mkdir()
        save_file({"w": torch.ones(2, 2)}, tmp_path / each / "adapter_model.safetensors")
    files = [(tmp_path / each / "adapter_model.safetensors", 0.5) for each in "ab"]
    with pytest.raises(SourceError, match="is an adapter, not a model; the mean"):
        shardmix.plan_merge(files)


def test_model_wrapped_by_peft_is_refused(tmp_path):
    tensors = {
        "base_model.model.q.base_layer.weight": torch.ones(2, 2),
        "base_model.model.q.lora_A.default.weight": torch.ones(2, 2),
    }
    models = [(save_model(tmp_path / each, tensors), 0.5) for each in "ab"]
    with pytest.raises(SourceError, match="is an adapter"):
        shardmix.plan_merge(models)


def test_a_models_own_adapters_are_told(tmp_path):
    """Such as those for speech and vision that a multimodal model has beside all weights."""
    tensors = {
        "model.q.base_layer.weight": torch.ones(2, 2),
        "model.q.lora_A.speech.weight": torch.ones(2, 2),
    }
    models = [(save_model(tmp_path / each, tensors), 0.5) for each in "ab"]
    plan = shardmix.plan_merge(models)
    assert sum("holds adapters within the model" in warning for warning in plan.warnings) == 2


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "blocks.0.attention.w_lora.lora.0.weight",
        "prompt_encoder.embedding.weight",
        "explorations.weight",
    ],
)
def test_name_like_an_adapters_is_no_adapter(tmp_path, name):
    """A name like an adapter's is no adapter."""
    models = [(save_model(tmp_path / each, {name: torch.ones(2)}), 0.5) for each in "ab"]
    assert not any("adapter" in warning for warning in shardmix.plan_merge(models).warnings)


@pytest.mark.parametrize("number", [0, 1])
def test_an_adapter_beside_weights_is_told(tmp_path, number):
    """Whichever model has it: transformers would apply it."""
    folders = [save_model(tmp_path / each, random_model(seed)) for seed, each in enumerate("ab")]
    fill(folders[number], "adapter_config.json", "adapter_model.safetensors")
    report = shardmix.merge(dict.fromkeys(folders, 0.5), tmp_path / "out")
    said = "has an adapter beside its weights (adapter_config.json, adapter_model.safetensors)"
    [warning] = [warning for warning in report.warnings if "adapter" in warning]
    assert warning.startswith(f"{folders[number]}: {said}, which is left out")
    assert set(load_model(tmp_path / "out")) == set(random_model(0))
    shutil.rmtree(tmp_path / "out")
