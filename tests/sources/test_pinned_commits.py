"""A Hub id stands for one commit from scoring to merging, even if its branch moves in between."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.sources.test_hub import Machine, hub, machine  # noqa: F401 - fixtures
from tests.support.hub_server import HubServer
from tests.support.language_models import TEXTS, save_language_model
from tests.support.sampling import sample

# Says when the models are scored, and merges once it is told to.
WAITS = """
import json, sys
from shardmix import api, mix_models_with_data
from shardmix.score_and_merge import merge_by_examples

merge_opened = api.merge_opened

def wait(*arguments, **options):
    print("scored", flush=True)
    sys.stdin.readline()
    return merge_opened(*arguments, **options)

api.merge_opened = wait
models, output, examples = sys.argv[1:3], sys.argv[3], json.loads(sys.argv[4])
"""
WAYS = {
    "merge --weights-from": (
        "merge_by_examples(models, output, examples, 'decoder', scoring={}, fsync=False)"
    ),
    "mix_models_with_data": (
        "mix_models_with_data(models, 'decoder', examples, output_path=output, quiet=True)"
    ),
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("way", sample("ways to score and merge", WAYS, 1))
def test_the_scored_commit_is_merged(
    hub: HubServer,  # noqa: F811
    machine: Machine,  # noqa: F811
    tmp_path: Path,
    way: str,
) -> None:
    """A branch that moves while models are scored: the merge takes the bytes that were scored."""
    one, two, later = (
        save_language_model("llama", tmp_path / str(seed), seed=seed) for seed in range(3)
    )
    hub.push("org/one", files_of(one))
    scored = hub.push("org/two", files_of(two))
    words = ["org/one", "org/two", str(tmp_path / "merged"), json.dumps(TEXTS)]
    with machine.start("-c", WAITS + WAYS[way], *words) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "scored\n", process.communicate()[1]
        hub.push("org/two", files_of(later))
        _, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, errors
    record = json.loads((tmp_path / "merged" / "shardmix.json").read_bytes())
    assert record["sources"][1]["commit"] == scored
    weights = [model["parameters"]["weight"] for model in record["recipe"]["models"]]
    merged, sources = tensors_of(tmp_path / "merged"), (tensors_of(one), tensors_of(two))
    for name, tensor in merged.items():
        parts = zip(weights, sources, strict=True)
        expected = sum(weight * tensors[name] for weight, tensors in parts)
        np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-7)


def test_revision_is_known_offline(hub: HubServer, machine: Machine) -> None:  # noqa: F811
    """What a branch stood for stays known without the Hub, though it is fetched by commit."""
    from tests.sources.test_hub import model

    hub.push("org/name", model(1.0), revision="refs/pr/1")
    online = machine.find("org/name@refs/pr/1")
    assert machine.find("org/name@refs/pr/1", HF_HUB_OFFLINE="1") == online
