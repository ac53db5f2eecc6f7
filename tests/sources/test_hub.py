"""Sources on the Hub: what is fetched, what is kept, and what is said when something is amiss.

huggingface_hub reads its settings when it is imported, so every scenario is a process of its own.
"""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save

from tests.support.dcp_checkpoints import cut_along, save_dcp
from tests.support.hub_server import EXPIRED_TOKEN, NARROW_TOKEN, HubServer

INDEX = "model.safetensors.index.json"

# Prints what became of each source; whatever is not a SourceError ends it with a traceback.
INSPECT = """
import json, sys, shardmix
outcomes = {}
for source in sys.argv[1:]:
    try:
        outcomes[source] = {"folder": shardmix.inspect(source).path}
    except shardmix.SourceError as error:
        outcomes[source] = {"error": str(error)}
print(json.dumps(outcomes))
"""
# huggingface_hub sleeps between its attempts at a broken download.
INSPECT_IMPATIENTLY = "import time; time.sleep = lambda seconds: None\n" + INSPECT
MERGE = """
import json, sys, shardmix
shardmix.merge(json.loads(sys.argv[1]), sys.argv[2], fsync=False)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> "Machine":
    return Machine(hub, tmp_path / "hf-home")


class Machine:
    """A user's machine: a cache of its own, and processes that know one Hub."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        own = ("HF_", "HUGGING", "TRANSFORMERS_")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(own) and not name.lower().endswith("_proxy")
        }
        self._environment = inherited | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments and environment variables."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=self._environment | settings,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start Python with these arguments, to talk to it."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=self._environment,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def find(self, *sources: str, **settings: str) -> list[Path]:
        """Inspect sources, and return the folders that they came to lie in."""
        return [Path(outcome["folder"]) for outcome in self._inspect(INSPECT, sources, settings)]

    def refusals(self, *sources: str, program: str = INSPECT, **settings: str) -> list[str]:
        """Inspect sources that are all refused, and return what is said of them."""
        return [outcome["error"] for outcome in self._inspect(program, sources, settings)]

    def _inspect(
        self, program: str, sources: tuple[str, ...], settings: dict[str, str]
    ) -> list[dict[str, str]]:
        done = self.run("-c", program, *sources, **settings)
        assert done.returncode == 0, done.stderr
        outcomes = json.loads(done.stdout)
        return [outcomes[source] for source in sources]


def weights(value: float, *names: str) -> bytes:
    """Return a safetensors file in which all is this value."""
    return save({name: np.full((3, 5), value, np.float32) for name in names or ("w",)})


def model(value: float = 1.0, **files: bytes) -> dict[str, bytes]:
    """Return the files of a small model."""
    return {
        "config.json": b'{"model_type": "test"}',
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": weights(value),
        **files,
    }


def sharded_model(*shards: str) -> dict[str, bytes]:
    """Return the files of a model with these shards, of one tensor each."""
    weight_map = {f"w{number}": shard for number, shard in enumerate(shards)}
    files = {shard: weights(1.0, name) for name, shard in weight_map.items()}
    files["config.json"] = b'{"model_type": "test"}'
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def save_locally(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# What is merged


def test_any_revision_merges_with_a_folder(
    hub: HubServer, machine: Machine, tmp_path: Path
) -> None:
    """Branches, tags and commits merge with a local model."""
    first = hub.push("org/tuned", model(1.0))
    hub.push("org/tuned", model(3.0))
    hub.push("org/tuned", model(5.0), revision="refs/pr/1")
    hub.push("org/tuned", model(7.0), revision="v1.0")
    local = save_locally(tmp_path / "mine", model(11.0))
    sources = {
        "org/tuned": 0.5,
        "org/tuned@refs/pr/1": 0.25,
        "org/tuned@v1.0": 0.125,
        f"org/tuned@{first}": 0.0625,
        str(local): 0.0625,
    }

    done = machine.run("-c", MERGE, json.dumps(sources), str(tmp_path / "merged"))

    assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    # Powers of two: the sum is exact, and each revision has a share that no other explains.
    expected = 0.5 * 3 + 0.25 * 5 + 0.125 * 7 + 0.0625 * 1 + 0.0625 * 11
    assert set(merged) == {"w"}
    assert merged["w"].tolist() == np.full((3, 5), expected).tolist()
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == model()["tokenizer.json"]
    card = yaml.safe_load((tmp_path / "merged" / "README.md").read_text().split("---")[1])
    assert set(card["base_model"]) == {"org/tuned", "mine"}
    assert card["base_model_relation"] == "merge"


def adapter(value: float) -> dict[str, bytes]:
    """Return the files of an adapter that adds this value to all of `w`."""
    tensors = {
        "base_model.model.w.lora_A.weight": np.full((1, 5), value, np.float32),
        "base_model.model.w.lora_B.weight": np.ones((3, 1), np.float32),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    files = {"adapter_config.json": json.dumps(config).encode(), "training_args.bin": b"pickle"}
    return files | {"adapter_model.safetensors": save(tensors)}


VERIFY = """
import sys, shardmix
print(shardmix.verify(sys.argv[1], recompute=True).problems)
"""


def test_adapters_are_fetched(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    """Only what is applied; both commits are recorded, and suffice to recompute the output."""
    files = model() | {"model.safetensors": weights(1.0, "w.weight")}
    base, first = hub.push("org/base", files), hub.push("org/lora", adapter(2.0))
    local = save_locally(tmp_path / "own", adapter(4.0))
    text = f"org/base@main+org/lora+{local}"
    out = tmp_path / "out"

    done = machine.run("-c", MERGE, json.dumps({text: 1.0}), str(out))

    assert done.returncode == 0, done.stderr
    assert (
        load_file(out / "model.safetensors")["w.weight"].tolist() == np.full((3, 5), 7.0).tolist()
    )
    assert "training_args.bin" not in hub.fetched()
    [source] = json.loads((out / "shardmix.json").read_text())["sources"]
    assert (source["name"], source["commit"]) == ("org/base@main+org/lora+own", base)
    assert source["adapters"] == [
        {"name": "org/lora", "hub_id": "org/lora", "commit": first},
        {"name": "own"},
    ]
    hub.push("org/lora", adapter(9.0))
    hub.push("org/base", model(9.0))
    verified = machine.run("-c", VERIFY, str(out))
    assert verified.stdout == "()\n", verified.stderr
    offline = machine.run(
        "-c",
        MERGE,
        json.dumps({f"org/base@{base}+org/lora@{first}": 1.0}),
        str(tmp_path / "off"),
        HF_HUB_OFFLINE="1",
    )
    assert offline.returncode == 0, offline.stderr


def test_adapters_that_are_none_are_refused(hub: HubServer, machine: Machine) -> None:
    hub.push("org/base", model())
    files = adapter(1.0)
    del files["adapter_model.safetensors"]
    hub.push("org/without", files)
    expected = {
        "org/base+org/base": "org/base: is a model: it has no adapter_config.json",
        "org/base+org/without": "has no adapter_model.safetensors",
        "org/base+org/missing": "no such Hub repository",
    }
    messages = machine.refusals(*expected)
    for finding, message in zip(expected.values(), messages, strict=True):
        assert finding in message


# What is recorded, and gone on with


CUT_OFF = """
import json, sys, shardmix
from unittest import mock
with mock.patch("shardmix.execute.merge.write_provenance", side_effect=KeyboardInterrupt):
    try: shardmix.merge(json.loads(sys.argv[1]), sys.argv[2], fsync=False)
    except KeyboardInterrupt as error: print(error)
"""


def test_commit_stands_for_a_hub_model(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    """A commit stands for a model of the Hub.

    Its files may be downloaded anew, elsewhere, and later: it is the same merge.
    """
    commit = hub.push("org/tuned", model(1.0))
    local = save_locally(tmp_path / "mine", model(2.0))
    words = json.dumps({"org/tuned": 0.5, str(local): 0.5}), str(tmp_path / "merged")
    begun = machine.run("-c", CUT_OFF, *words)
    assert "are done and kept" in begun.stdout, begun.stderr
    another_machine = Machine(hub, tmp_path / "another-home")

    done = another_machine.run(
        "-c",
        "import json, sys, shardmix\nprint(shardmix.merge("
        "json.loads(sys.argv[1]), sys.argv[2], fsync=False).bytes_kept)",
        *words,
    )

    assert done.stdout.strip() == "120", done.stderr
    recorded = json.loads((tmp_path / "merged" / "shardmix.json").read_text())
    first = recorded["sources"][0]
    assert (first["hub_id"], first["commit"]) == ("org/tuned", commit)
    assert (recorded["config_from"], recorded["config_source_commit"]) == ("org/tuned", commit)
    verified = another_machine.run(
        "-m", "shardmix", "verify", words[1], "--recompute", "--source", f"mine={local}"
    )
    assert verified.returncode == 0, verified.stderr


def test_moved_branch_is_another_merge(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    """A branch that has moved since is another merge."""
    first = hub.push("org/tuned", model(1.0))
    local = save_locally(tmp_path / "mine", model(2.0))
    words = json.dumps({"org/tuned": 0.5, str(local): 0.5}), str(tmp_path / "merged")
    machine.run("-c", CUT_OFF, *words)
    second = hub.push("org/tuned", model(3.0))

    done = machine.run("-c", MERGE, *words)

    assert f"commit {first} then, {second} now" in done.stderr


def test_moved_config_is_another_merge(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    """A config source that has moved since makes another merge."""
    first = hub.push("org/base", model(1.0))
    words = [str(save_locally(tmp_path / name, model(2.0))) for name in ("a", "b")]
    command = ("-m", "shardmix", "merge", *(f"{word}=0.5" for word in words))
    options = ("-o", str(tmp_path / "merged"), "--config-from", "org/base")
    cut_off = CUT_OFF.replace("fsync=False", "fsync=False, config_from='org/base'")
    both = json.dumps(dict.fromkeys(words, 0.5))
    machine.run("-c", cut_off, both, options[1])
    second = hub.push("org/base", model(3.0))

    done = machine.run(*command, *options)

    assert done.returncode == 1
    assert f"org/base: commit {first} then, {second} now; throw it away" in done.stderr


# What is fetched


def torch_weights(value: float, *names: str) -> bytes:
    """Return a file of torch.save in which all is this value."""
    buffer = io.BytesIO()
    torch.save({name: torch.full((3, 5), value) for name in names or ("w",)}, buffer)
    return buffer.getvalue()


def test_torch_files_are_fetched_if_alone(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    """As safetensors come first, a repository's pytorch_model.bin is fetched only without them."""
    config = {"config.json": b'{"model_type": "test"}'}
    weight_map = {"v": "pytorch_model-00001-of-00002.bin", "w": "pytorch_model-00002-of-00002.bin"}
    shards = {shard: torch_weights(3.0, name) for name, shard in weight_map.items()}
    index = {"pytorch_model.bin.index.json": json.dumps({"weight_map": weight_map}).encode()}
    hub.push(
        "org/old", config | {"pytorch_model.bin": torch_weights(1.0), "training_args.bin": b""}
    )
    hub.push("org/both", model(2.0) | {"pytorch_model.bin": torch_weights(9.0)})
    hub.push("org/shards", config | shards | index)
    old, both, sharded = machine.find("org/old", "org/both", "org/shards")

    assert sorted(path.name for path in old.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert "pytorch_model.bin" not in {path.name for path in both.iterdir()}
    assert {path.name for path in sharded.iterdir()} == {*config, *shards, *index}
    pairs = json.dumps([["org/old", 0.5], ["org/both", 0.5]])
    done = machine.run("-c", MERGE, pairs, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert np.all(load_file(tmp_path / "out" / "model.safetensors")["w"] == 1.5)
    again = machine.run("-c", MERGE, pairs, str(tmp_path / "offline"), HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("below", ["", "pytorch_model_fsdp_0/"])
def test_distributed_checkpoints_are_fetched(
    hub: HubServer, machine: Machine, tmp_path: Path, below: str
) -> None:
    """Without the optimizer's, which has a folder of its own."""
    saved = save_dcp(tmp_path / "saved", {"w": torch.ones(3, 5)}, cut=cut_along(0, 2), num_files=2)
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    config = {"config.json": files.pop("config.json")}
    weights = {f"{below}{name}": content for name, content in files.items()}
    others = {f"optimizer_0/{name}": b"" for name in files}
    hub.push("org/distributed", config | weights | others)
    (folder,) = machine.find("org/distributed")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*config, *weights}
    pairs = json.dumps([["org/distributed", 0.5], [str(saved), 0.5]])
    for number, offline in enumerate("01" if not below else "0"):
        done = machine.run("-c", MERGE, pairs, str(tmp_path / f"{number}"), HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
        merged = load_file(tmp_path / f"{number}" / "model.safetensors")
        assert np.all(merged["w"] == 1.0)


def test_only_what_goes_along_is_fetched(hub: HubServer, machine: Machine) -> None:
    """What goes along is fetched, and no more."""
    wanted = {
        **model(),
        "tokenizer.model": b"sentencepiece",
        "generation_config.json": b'{"do_sample": true}',
        "chat_template.jinja": b"{{ messages }}",
        "additional_chat_templates/rag.jinja": b"{{ documents }}",
        "modeling_custom.py": b"import torch",
        "LICENSE": b"Apache-2.0",
        "colbert_linear.pt": b"pickle",
        "bpe.codes": b"a b 10",
        "images/loss.png": b"a picture",
        "speech_tokenizer/model.safetensors": weights(2.0),
    }
    unwanted = [
        ".gitattributes",
        "README.md",
        "all_results.json",
        "checkpoint-500/config.json",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/optimizer.pt",
        "consolidated.safetensors",
        "logs/loss.png",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "original/consolidated.00.pth",
        "speech_tokenizer/pytorch_model.bin",
        "model-q4_k_m.gguf",
        "onnx/config.json",
        "onnx/model.onnx",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "trainer_state.json",
        "training_args.bin",
    ]
    hub.push("org/tuned", wanted | {name: name.encode() for name in unwanted})

    [folder] = machine.find("org/tuned")

    assert hub.fetched() == sorted(wanted)
    assert {name: (folder / name).read_bytes() for name in wanted} == wanted


def test_what_is_not_fetched_is_told(hub: HubServer, machine: Machine, tmp_path: Path) -> None:
    others = {"pytorch_model.bin": b"pickle", ".gitattributes": b"", "at 3\u202fPM.png": b""}
    hub.push("org/tuned", model(1.0) | others)
    local = save_locally(tmp_path / "mine", model(2.0))
    words = ["org/tuned=0.5", f"{local}=0.5"]
    for base, telling in (("org/tuned", "org/tuned has it"), (str(local), None)):
        done = machine.run("-m", "shardmix", "plan", *words, "--config-from", base, "--json")
        report = json.loads(done.stdout)
        told = [text for text in report["warnings"] if "left out" in text]
        assert len(told) == (telling is not None)
        assert all("pytorch_model.bin (weights in another format)" in text for text in told)
        names = {finding["name"] for finding in report["left_out"]}
        assert names == (
            {*others} - {"at 3\u202fPM.png"} | {"at 3\\u202fPM.png"} if telling else set()
        )


def test_index_and_named_shards_are_fetched(hub: HubServer, machine: Machine) -> None:
    """Of a sharded model, the index and the shards it names are fetched."""
    # Brackets, since names are handed to huggingface_hub as patterns.
    files = sharded_model("model-00001-of-00002.safetensors", "model-[2].safetensors")
    strays = dict.fromkeys(["model-2.safetensors", "model-00003-of-00003.safetensors"], b"stray")
    hub.push("org/sharded", files | strays)

    machine.find("org/sharded")

    assert hub.fetched() == sorted(files)


def test_one_file_is_fetched_before_shards(hub: HubServer, machine: Machine) -> None:
    """Of a model with one file and shards, the one file is fetched."""
    hub.push("org/both", sharded_model("model-00001-of-00001.safetensors") | model())

    [folder] = machine.find("org/both")

    assert hub.fetched() == sorted(model())
    assert (folder / "model.safetensors").read_bytes() == model()["model.safetensors"]


def test_sentence_modules_are_fetched(hub: HubServer, machine: Machine) -> None:
    """Of a sentence-transformers model, the modules are fetched."""
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    files = {
        **model(),
        "modules.json": json.dumps(modules).encode(),
        "sentence_bert_config.json": b'{"max_seq_length": 256}',
        "config_sentence_transformers.json": b"{}",
        "1_Pooling/config.json": b'{"word_embedding_dimension": 5}',
        "2_Dense/config.json": b'{"in_features": 5}',
        "2_Dense/model.safetensors": weights(2.0),
    }
    hub.push("org/embedder", files | {"openvino/openvino_model.bin": b"", "pytorch_model.bin": b""})

    machine.find("org/embedder")

    assert hub.fetched() == sorted(files)


def test_weights_of_modules_are_fetched(hub: HubServer, machine: Machine) -> None:
    """Weights of modules only are fetched.

    A Router's folders have names of their own; with safetensors, no pickle is fetched.
    """
    router = {
        "structure": {"query": ["query_0_Transformer"], "document": ["doc"]},
        "types": {"query_0_Transformer": "x.Transformer", "doc": "x.StaticEmbedding"},
    }
    files = {
        "modules.json": json.dumps([{"path": "", "type": "x.Router"}]).encode(),
        "router_config.json": json.dumps(router).encode(),
        "query_0_Transformer/config.json": b'{"model_type": "bert"}',
        "query_0_Transformer/tokenizer.json": b"{}",
        "doc/model.safetensors": weights(2.0),
        "doc/tokenizer.json": b"{} ",
    }
    shards = sharded_model("model-00001-of-00001.safetensors")
    files |= {
        f"query_0_Transformer/{name}": content
        for name, content in shards.items()
        if "safetensors" in name
    }
    pickles = {"query_0_Transformer/pytorch_model.bin": b"", "doc/onnx/model.onnx": b""}
    commit = hub.push("org/router", files | pickles | {"old/model.safetensors": b""})

    [folder] = machine.find("org/router")

    assert hub.fetched() == sorted(files)
    hub.requests.clear()
    offline = machine.run("-c", INSPECT, "org/router", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert commit in str(folder)


# What is kept


def test_a_second_run_fetches_no_file_again(hub: HubServer, machine: Machine) -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    hub.push("org/one", model())
    hub.push("org/two", sharded_model(*shards))
    folders = machine.find("org/one", "org/two")
    hub.requests.clear()

    assert machine.find("org/one", "org/two") == folders
    assert {request.file for request in hub.requests} == {None}


def test_offline_revisions_are_cached(hub: HubServer, machine: Machine) -> None:
    """Offline, each revision is found in the cache."""
    # With files that are never fetched: a copy without them is complete all the same.
    extra = {"README.md": b"# Tuned", "pytorch_model.bin": b"pickle"}
    commit = hub.push("org/tuned", model(1.0) | extra)
    hub.push("org/tuned", model(2.0) | extra)
    hub.push("org/tuned", sharded_model("model-00001-of-00001.safetensors"), revision="v1.0")
    sources = ("org/tuned", "org/tuned@v1.0", f"org/tuned@{commit}")
    folders = machine.find(*sources)
    hub.requests.clear()

    offline = machine.run("-c", INSPECT, *sources, HF_HUB_OFFLINE="1")

    outcomes = json.loads(offline.stdout)
    assert [Path(outcomes[source]["folder"]) for source in sources] == folders
    assert len(set(folders)) == 3
    assert hub.requests == []
    assert "cannot be asked" not in offline.stderr  # it was meant


def test_offline_without_a_copy_says_the_way(hub: HubServer, machine: Machine) -> None:
    """Offline without a copy, the error says what to do."""
    hub.push("org/tuned", model())

    [message] = machine.refusals("org/tuned", HF_HUB_OFFLINE="1")

    assert message.startswith("org/tuned: no such local path, not in the local cache, and the Hub ")
    assert "unset HF_HUB_OFFLINE" in message
    assert "give a local folder" in message
    assert hub.requests == []


def test_unreachable_hub_falls_back_on_cache(hub: HubServer, machine: Machine) -> None:
    """A Hub out of reach falls back on the cache, and says so."""
    hub.push("org/tuned", model())
    folders = machine.find("org/tuned")

    hub.is_down = True
    down = machine.run("-c", INSPECT, "org/tuned")
    hub.is_down, hub.is_silent = False, True
    silent = machine.run("-c", INSPECT, "org/tuned", HF_HUB_ETAG_TIMEOUT="1")
    hub.stop()
    gone = machine.run("-c", INSPECT, "org/tuned", "org/other")

    for done, reason in ((down, "503"), (silent, "timed out"), (gone, "Connection")):
        assert [Path(json.loads(done.stdout)["org/tuned"]["folder"])] == folders
        assert "org/tuned: the Hub cannot be asked (" in done.stderr
        assert reason in done.stderr
    message = json.loads(gone.stdout)["org/other"]["error"]
    assert "not in the local cache, and the Hub cannot be asked (" in message
    assert "check the network" in message


def test_broken_download_completes_next_run(hub: HubServer, machine: Machine) -> None:
    """A download that breaks off is refused, and the next run completes it."""
    files = sharded_model("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    hub.push("org/sharded", files)
    hub.push("org/tuned", model())
    hub.break_off("model-00002-of-00002.safetensors", after=40)
    hub.break_off("model.safetensors", after=40)
    sources = ("org/sharded", "org/tuned")

    broken = machine.refusals(*sources, program=INSPECT_IMPATIENTLY)
    offline = machine.refusals(*sources, HF_HUB_OFFLINE="1")
    hub.break_off("model-00002-of-00002.safetensors", after=None)
    hub.break_off("model.safetensors", after=None)
    hub.requests.clear()
    machine.find(*sources)

    for source, message in zip(sources, broken, strict=True):
        assert message.startswith(f"{source}: the download failed (")
        assert message.endswith("try again")
        assert "\n" not in message
    # An incomplete copy is not taken for a model: the cache knows a revision once all is there.
    assert all("not in the local cache" in message for message in offline)
    # What had arrived whole was kept.
    assert hub.fetched() == ["model-00002-of-00002.safetensors", "model.safetensors"]


# What is refused


def test_the_token_opens_a_gated_repository(hub: HubServer, machine: Machine) -> None:
    hub.push("org/gated", model(), token="hf_secret")
    hub.push("org/hidden", model(), token="hf_secret", private=True)

    machine.find("org/gated", "org/hidden", HF_TOKEN="hf_secret")

    sent = {request.authorization for request in hub.requests if "/org/" in request.path}
    assert sent == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("token", "findings"),
    [
        pytest.param(None, ["is gated", "no such Hub repository (or it is private)"], id="none"),
        pytest.param("hf_other", ["is gated", "(or it is private)"], id="of-somebody-else"),
        pytest.param(NARROW_TOKEN, ["denies access", "(or it is private)"], id="narrow"),
        pytest.param(EXPIRED_TOKEN, ["denies access", "denies access"], id="expired"),
    ],
)
def test_without_access_the_remedy_is_named(
    hub: HubServer, machine: Machine, token: str | None, findings: list[str]
) -> None:
    hub.push("org/gated", model(), token="hf_secret")
    hub.push("org/hidden", model(), token="hf_secret", private=True)
    sources = ("org/gated", "org/hidden")

    messages = machine.refusals(*sources, **({} if token is None else {"HF_TOKEN": token}))

    for source, message, finding in zip(sources, messages, findings, strict=True):
        assert message.startswith(f"{source}: ")
        assert finding in message
        assert "`hf auth login`" in message
        assert "HF_TOKEN" in message
        assert "\n" not in message
    assert hub.fetched() in ([], ["config.json", "tokenizer.json"])  # asked for in vain


def test_unmergeable_model_is_not_fetched(hub: HubServer, machine: Machine) -> None:
    """What cannot be merged is refused before any weights are fetched."""
    config = {"config.json": b"{}"}
    hub.push("org/tuned", model())
    hub.push("org/pickled", config | {"model.pkl": b"pickle"})
    hub.push("org/gguf", config | {"model-q4.gguf": b"GGUF"})
    hub.push("org/adapter", {"adapter_model.safetensors": b"", "training_args.bin": b""})
    hub.push("org/empty", {"README.md": b"soon"})
    hub.push("org/damaged", sharded_model("a.safetensors") | {INDEX: b"[]"})
    expected = {
        "org/missing": "no such local path and no such Hub repository",
        "org/tuned@v9": "no such revision; check the branch, tag or commit",
        "org/pickled": "only as pickle (model.pkl), which may run code",
        "org/gguf": "has weights only as GGUF",
        "org/adapter": "holds an adapter (adapter_model.safetensors), not a model; ",
        "org/empty": f"has neither model.safetensors nor {INDEX}",
        "org/damaged": f"{INDEX}: has no weight_map from tensor names to files",
        "org/na--me": "not a Hub id (Cannot have -- or .. in repo_id",
        "nothing/to/see": "no such file or folder, and not a Hub id",
        "~nobody-of-this-name/model": "cannot be a path",
        "a" * 300: "cannot be a path" if sys.version_info < (3, 12) else "no such file or folder",
    }

    messages = machine.refusals(*expected)

    for (source, finding), message in zip(expected.items(), messages, strict=True):
        assert message.startswith(f"{source}: ")
        assert finding in message
        assert "\n" not in message
    assert hub.fetched() == [INDEX]


def test_command_says_it_in_one_line(machine: Machine) -> None:
    """The command line says it in one line, and exits with 1."""
    done = machine.run("-m", "shardmix", "inspect", "org/missing", "--json")

    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "SourceError"
    assert done.stderr == f"error: {error['message']}\n"
