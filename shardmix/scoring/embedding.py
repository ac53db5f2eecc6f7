"""An encoder's steps from states to one vector, by its sentence-transformers modules or its user.

Reads the weights of small modules; knows nothing of how the encoder itself runs.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shardmix.conventions.module_tree import Module
from shardmix.conventions.sentence_modules import CLS, POOLINGS, pooling_modes
from shardmix.errors import SourceError
from shardmix.scoring.empty_model import TORCH_DTYPES
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import read_config

# Steps without effect on cosines, or only in training.
_WITHOUT_EFFECT = ("Normalize", "Dropout")
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU", "ELU", "LeakyReLU")

Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Embedding:
    """The steps that turn a text's states into one vector."""

    pooling: tuple[str, ...]
    """Ways to pool states; the vectors of several ways are joined."""
    steps: tuple[tuple[str, Step], ...] = ()
    """Modules after pooling, by kind: from float32 [texts, width] to [texts, width]."""
    nbytes: int = 0
    """Bytes of their weights."""
    note: str = ""
    """Note for the user, or ""."""

    @property
    def name(self) -> str:
        """Its name in reports: `mean`, or `mean, Dense`."""
        return ", ".join((" and ".join(self.pooling), *(kind for kind, _ in self.steps)))

    def vectors(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return float32 [texts, width] on the CPU, from [texts, length, width] and its mask."""
        pooled = torch.cat([_pooled(states, mask, mode) for mode in self.pooling], dim=-1).cpu()
        for _, step in self.steps:
            pooled = step(pooled)
        return pooled


def embedding_of(source: Source, asked: str | None) -> Embedding:
    """Return a model's embedding, by its modules; `asked` overrides its pooling.

    A model without modules pools by the first token. Raises `SourceError` if its modules are not
    supported and nothing was asked for.
    """
    modules = [module for module in source.modules if module.subfolder != source.subfolder]
    if not source.modules:
        return Embedding((asked or CLS,))
    text = source.text
    finding = _cannot_be_followed(modules)
    if finding is not None:
        if asked is None:
            raise SourceError(
                f"{finding}, so that it cannot be scored as it embeds",
                subject=text,
                remedy="--pooling scores its encoder by itself",
            )
        return Embedding((asked,), note=f"{text}: scored without its modules, since it {finding}")
    subfolder = next(module.subfolder for module in modules if module.kind == "Pooling")
    own = pooling_modes(read_config(source.root / subfolder))
    unknown = [mode for mode in own if mode not in POOLINGS]
    if unknown and asked is None:
        raise SourceError(
            f"{subfolder}/config.json pools by {unknown[0]!r}, which is unknown",
            subject=text,
            remedy=f"say how with --pooling: {', '.join(POOLINGS)}",
        )
    pooling = own if asked is None else (asked,)
    note = ""
    if asked is not None and own != pooling:
        note = f"{text}: pooled by {asked}, as was asked for, though it pools by {_joined(own)}"
    steps = [
        (module.kind, *_step(source, module))
        for module in modules
        if module.kind not in ("Pooling", *_WITHOUT_EFFECT)
    ]
    made = Embedding(
        pooling,
        steps=tuple((kind, step) for kind, step, _ in steps),
        nbytes=sum(nbytes for _, _, nbytes in steps),
    )
    if asked is None and made.name != CLS:
        note = f"{text}: pooled by {made.name}, as its modules say (--pooling is for another way)"
    return Embedding(made.pooling, made.steps, made.nbytes, note)


def _joined(modes: tuple[str, ...]) -> str:
    return " and ".join(modes)


def _cannot_be_followed(modules: list[Module]) -> str | None:
    """Return why modules are not supported, or None if they are."""
    kinds = [module.kind for module in modules]
    known = ("Pooling", "Dense", "LayerNorm", *_WITHOUT_EFFECT)
    others = [kind or "a module without a class" for kind in kinds if kind not in known]
    if others:
        return f"embeds by {', '.join(dict.fromkeys(others))}"
    if kinds.count("Pooling") != 1:
        return "has no Pooling module" if "Pooling" not in kinds else "pools more than once"
    before = [kind for kind in kinds[: kinds.index("Pooling")] if kind not in _WITHOUT_EFFECT]
    return f"has {before[0]} before its pooling" if before else None


def _step(source: Source, module: Module) -> tuple[Step, int]:
    """Return a module's function on vectors, and the bytes of its weights."""
    part = next((part for part in source.others if part.subfolder == module.subfolder), None)
    if part is None:
        raise SourceError(
            f"{module.subfolder} has no model.safetensors to score it with",
            subject=source.text,
            remedy="load the model in sentence-transformers and save it: that writes one",
        )
    tensors = _read(part)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        if module.kind == "LayerNorm":
            weight, bias = tensors["norm.weight"], tensors["norm.bias"]
            norm = partial(functional.layer_norm, normalized_shape=weight.shape)
            return partial(norm, weight=weight, bias=bias), nbytes
        return _dense(part, tensors), nbytes
    except KeyError as error:
        raise SourceError(
            f"stores no {error.args[0]}, which a {module.kind} module has",
            subject=part.text,
            remedy="fetch it again",
        ) from None


def _dense(part: Source, tensors: dict[str, torch.Tensor]) -> Step:
    name = str(part.config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise SourceError(
            f"has the activation {name}, which the scorer does not know; known are "
            f"{', '.join(_ACTIVATIONS)}",
            subject=part.text,
            remedy="leave the model out",
        )
    activation = getattr(nn, name)()
    weight, bias = tensors["linear.weight"], tensors.get("linear.bias")
    is_residual = bool(part.config.get("use_residual", False))

    def project(vectors: torch.Tensor) -> torch.Tensor:
        if vectors.shape[-1] != weight.shape[-1]:
            raise SourceError(
                f"takes vectors of {weight.shape[-1]} values, and is given {vectors.shape[-1]}",
                subject=part.text,
                remedy="pool as it was trained (--pooling)",
            )
        projected: torch.Tensor = activation(functional.linear(vectors, weight, bias))
        if not is_residual:
            return projected
        residual = tensors.get("residual.weight")
        return projected + (vectors if residual is None else functional.linear(vectors, residual))

    return project


def _read(part: Source) -> dict[str, torch.Tensor]:
    """Return a small module's weights in float32."""
    found = {}
    with closing(part.open_reader()) as reader:
        for row, info in enumerate(part.tensors):
            if info.dtype not in TORCH_DTYPES:
                raise SourceError(
                    f"{info.name} is {info.dtype}",
                    subject=part.text,
                    remedy="save it in float32",
                )
            stored = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
            if stored.numel():
                room: Any = stored.view(-1).view(torch.uint8).numpy()
                reader.read(row, 0, memoryview(room))
            found[info.name] = stored.float()
    return found


def _pooled(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return [texts, width] from [texts, length, width], padded on the right."""
    if pooling == CLS:
        return states[:, 0]
    if pooling == "lasttoken":
        return states[torch.arange(len(states)), mask.sum(dim=1) - 1]
    if pooling == "max":
        return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).max(dim=1).values
    weights = mask.unsqueeze(-1).to(states.dtype)
    if pooling == "weightedmean":
        weights = weights * torch.arange(
            1, states.shape[1] + 1, dtype=states.dtype, device=states.device
        ).view(1, -1, 1)
    total, count = (states * weights).sum(dim=1), weights.sum(dim=1)
    return total / (count.sqrt() if pooling == "mean_sqrt_len" else count)
