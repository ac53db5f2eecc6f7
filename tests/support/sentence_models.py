"""Small sentence-transformers models of every layout, and the mean of two by the library itself."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules as models
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder import modules as sparse
from tokenizers import Tokenizer

from tests.support.language_models import VOCABULARY, save_language_model

TEXTS = ["why does it rain", "the cat sat on the mat because of the dog", "yes"]
WIDTH = 32


def encoder(folder: Path, seed: int, kind: str = "bert") -> str:
    """Save a small encoder with its tokenizer, in one file; return its path."""
    return str(save_language_model(kind, folder, seed=seed))


def save(
    folder: Path, modules: Sequence[Any], kind: type = SentenceTransformer, **options: Any
) -> Path:
    """Save a model of these modules."""
    kind(modules=list(modules), device="cpu", **options).save_pretrained(str(folder))
    return folder


def _transformer(tmp_path: Path, seed: int, name: str = "bare") -> Any:
    return models.Transformer(encoder(tmp_path / f"{name}-{seed}", seed))


def _dense(tmp_path: Path, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    pooling = models.Pooling(WIDTH, "mean")
    return [_transformer(tmp_path, seed), pooling, models.Dense(WIDTH, 8), models.LayerNorm(8)]


def _router(tmp_path: Path, seed: int) -> list[Any]:
    query, document = (
        [_transformer(tmp_path, seed + step, name), models.Pooling(WIDTH)]
        for step, name in ((0, "query"), (2, "document"))
    )
    router = models.Router.for_query_document(query_modules=query, document_modules=document)
    return [router, models.Normalize()]


def _lstm(tmp_path: Path, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    vectors = torch.randn(len(VOCABULARY) + 1, 10).numpy()
    words = models.WordEmbeddings(WhitespaceTokenizer(VOCABULARY), vectors)
    return [words, models.LSTM(10, 6), models.Pooling(12)]


def _cnn(tmp_path: Path, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    return [_transformer(tmp_path, seed), models.CNN(WIDTH, 5), models.Pooling(15)]


def _static(tmp_path: Path, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(Path(encoder(tmp_path / "t", 0)) / "tokenizer.json"))
    return [models.StaticEmbedding(tokenizer, embedding_dim=8), models.Normalize()]


def _sparse(tmp_path: Path, seed: int) -> list[Any]:
    masked = encoder(tmp_path / f"masked-{seed}", seed, "bert-masked")
    return [sparse.MLMTransformer(masked), sparse.SpladePooling()]


LAYOUTS: dict[str, tuple[type, Callable[[Path, int], list[Any]]]] = {
    "dense": (SentenceTransformer, _dense),
    "router": (SentenceTransformer, _router),
    "lstm": (SentenceTransformer, _lstm),
    "cnn": (SentenceTransformer, _cnn),
    "static": (SentenceTransformer, _static),
    "splade": (SparseEncoder, _sparse),
}
"""Name → class of the library, and what makes the modules."""


def two_models(layout: str, tmp_path: Path) -> list[Path]:
    """Save two models of one layout."""
    kind, make = LAYOUTS[layout]
    return [save(tmp_path / name, make(tmp_path, seed), kind) for seed, name in enumerate("ab")]


def move_first_module(folder: Path, place: str) -> Path:
    """Put the first module into a folder of its own, as old versions of the library did."""
    shared = {"modules.json", "config_sentence_transformers.json", "README.md"}
    modules = json.loads((folder / "modules.json").read_text())
    (folder / place).mkdir()
    for path in [path for path in folder.iterdir() if path.is_file() and path.name not in shared]:
        shutil.move(path, folder / place / path.name)
    modules[0]["path"] = place
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def rename_module(folder: Path, old: str, new: str) -> Path:
    """Call a module's folder otherwise."""
    text = (folder / "modules.json").read_text()
    (folder / old).rename(folder / new)
    (folder / "modules.json").write_text(text.replace(f'"{old}"', f'"{new}"'))
    return folder


def mean_embeddings(folders: Sequence[Path], kind: type = SentenceTransformer) -> torch.Tensor:
    """Return what the mean of all parameters embeds the texts as, by the library alone."""
    first, *others = (kind(str(folder), device="cpu") for folder in folders)
    states = [model.state_dict() for model in (first, *others)]
    # All before the first is written: tied parameters are there twice.
    means = {
        name: sum(state[name].double() for state in states) / len(states) for name in states[0]
    }
    with torch.no_grad():
        for name, value in first.state_dict().items():
            value.copy_(means[name])
    return embeddings(first)


def embeddings(model: Any) -> torch.Tensor:
    """Return what a model embeds the texts as; a Router's query and document side, in turn."""
    if not isinstance(model[0], models.Router):
        vectors = model.encode(TEXTS, convert_to_tensor=True)
        return vectors.to_dense() if vectors.is_sparse else vectors
    sides = (model.encode_query(TEXTS), model.encode_document(TEXTS))
    return torch.cat([torch.tensor(side) for side in sides])
