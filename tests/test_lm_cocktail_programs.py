"""Programs written for LM_Cocktail run with the import changed: Hub ids, keywords, outputs.

Each call has the form of one in LM-Cocktail's README; small models play the large ones, on a local
server that speaks the Hub's protocol.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub_server import HubServer
from tests.support.language_models import save_language_model

REPOS = {
    "llama": ("meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-ag-news", "Shitao/llama2-nq"),
    "bert": (
        *("BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora"),
        "Shitao/bge-msmarco",
    ),
    "roberta-reranker": ("BAAI/bge-reranker-base",),
}

PROGRAM = """
from shardmix import mix_models, mix_models_by_layers, mix_models_with_data

model = mix_models(
    model_names_or_paths=["meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-ag-news"],
    model_type='decoder',
    weights=[0.7, 0.3],
    output_path='./mixed_llm')
model = mix_models(
    model_names_or_paths=["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa"],
    model_type='encoder',
    weights=[0.5, 0.5],
    output_path='./mixed_embedder')
model = mix_models(
    model_names_or_paths=["BAAI/bge-reranker-base", "BAAI/bge-reranker-base"],
    model_type='reranker',
    weights=[0.5, 0.5],
    output_path="./mixed_reranker")
model = mix_models(
    model_names_or_paths=["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora",
                          "Shitao/bge-msmarco"],
    model_type='encoder',
    weights=[0.3, 0.2, 0.2, 0.3],
    output_path='./mixed_embedder_2')

texts = [
    {"input": "Question: when does it rain? Answer:\\n", "output": "because of the cold"},
    {"input": "the cat sat on the mat. Is this sentence yes or no?\\n", "output": "Yes"},
]
for examples in ({"example_ata": texts}, {"example_data": texts}):
    model = mix_models_with_data(
        model_names_or_paths=["meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-ag-news",
                              "Shitao/llama2-nq"],
        model_type='decoder',
        temperature=5.0, **examples)

queries = [
    {"query": "How does the dog run?", "pos": [" How does a dog run?"],
     "neg": [" Why does it rain?", " the mat"]},
    {"query": "why does the cat", "pos": [" why cat"], "neg": [" a tree", " on the dog"]},
]
model = mix_models_with_data(
    model_names_or_paths=["BAAI/bge-base-en-v1.5", "Shitao/bge-hotpotqa", "Shitao/bge-quora"],
    model_type='encoder',
    example_ata=queries,
    temperature=5.0,
    max_input_length=512,
    neg_number=2)
model = mix_models_by_layers(
    model_names_or_paths=["meta-llama/Llama-2-7b-chat-hf", "Shitao/llama2-ag-news"],
    model_type='decoder',
    weights=[0.7, 0.3],
    output_path='./mixed_llm')
print("the end:", type(model).__name__)
"""


@pytest.fixture(scope="module")
def hub_of_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with HubServer() as server:
        number = 0
        for kind, names in REPOS.items():
            for name in names:
                path = save_language_model(kind, folder / str(number), seed=number)
                number += 1
                files = {file.name: file.read_bytes() for file in Path(path).iterdir()}
                server.push(name, files)
        yield server


def test_calls_of_lm_cocktails_readme_run(hub_of_models, tmp_path):
    """The calls of LM-Cocktail's README run."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub_of_models.url,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the end: LlamaForCausalLM"
    assert done.stdout.count("***weight for each model***") == 8
    for name in ("mixed_llm", "mixed_embedder", "mixed_reranker", "mixed_embedder_2"):
        assert (tmp_path / name / "tokenizer.json").exists()
    assert (tmp_path / "mixed_embedder" / "modules.json").exists()
