"""A model cut into units, each of which can be in memory by itself.

A unit is what FSDP calls one: modules whose weights come and go together. Knows the structure of
modules and the sizes of their parameters; reads no weights.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from shardmix.scoring.model_weights import ModelWeights

# A larger head is worth computing in slices of its rows.
SLICE_NBYTES = 64 << 20
# Smaller embeddings stay: some are used without being called, such as relative positions.
_SMALL_EMBEDDING_NBYTES = 16 << 20
# Other smaller layers stay if single layers are units: norms, and convolutions whose weights a
# model hands to a kernel.
_SMALL_LAYER_NBYTES = 1 << 20


class Kind(Enum):
    """The way in which a unit's weights are loaded."""

    WHOLE = "whole"
    """All of them, while every pass goes through the unit."""
    ROWS = "rows"
    """An embedding: only the rows that the passes look up."""
    SLICES = "slices"
    """A large linear layer: some rows at a time, applied to all passes' inputs."""


class Grain(Enum):
    """The size of a model's units."""

    MODEL = "model"
    """The whole model."""
    BLOCK = "block"
    """Embeddings, the layers that transformers never splits, and the rest."""
    LEAF = "leaf"
    """Single layers; small ones stay in memory."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a model whose weights come and go together."""

    name: str
    """Path of its module; "" is the whole model."""
    kind: Kind
    tensors: tuple[str, ...]
    """Parameters and stored buffers, by their names in the model."""
    weights_nbytes: int
    """Their size in the model's dtype."""
    conversion_nbytes: int
    """Room that conversions need beside them while they are read."""


@dataclass(frozen=True, slots=True)
class Partition:
    """All of a model's weights: those that stay, and the units."""

    resident: tuple[str, ...]
    """Parameters of modules that enclose units; always in memory."""
    resident_nbytes: int
    """Their size."""
    units: tuple[Unit, ...]
    """Units in order of the modules."""
    width: int
    """Outputs of all matrices of the widest unit for one token, without embeddings and head:
    intermediate results scale with it."""


def cut(model: Any, weights: ModelWeights, grain: Grain, *, num_labels: int) -> Partition:
    """Cut a model into units.

    `num_labels` is the number of rows of logits over all passes. A head is sliced if that saves
    memory, since the outputs of all passes are then held together.
    """
    if grain is Grain.MODEL:
        names = [name for name in model.state_dict() if weights.comes_and_goes(name)]
        whole = _unit(model, "", Kind.WHOLE, weights, names)
        return Partition((), 0, (whole,), width=_width(model))
    blocks = frozenset(getattr(model, "_no_split_modules", None) or ())
    # Its rows of logits are counted by labels, not by tokens.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    resident: list[str] = []
    units: list[Unit] = []
    width = 0
    inputs = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name, module, is_unit in _walk(model, blocks, grain):
        if is_unit and module is not inputs and _stays(module, grain):
            resident += filter(weights.comes_and_goes, _tensor_names(module, name, recurse=True))
            continue
        own = list(filter(weights.comes_and_goes, _tensor_names(module, name, recurse=is_unit)))
        if is_unit:
            kind = _kind(module, name, weights, num_labels=num_labels)
            units.append(_unit(module, name, kind, weights, own))
            width = max(width, 0 if module is head else _width(module))
        else:
            resident += own
    tensors = model.state_dict()
    return Partition(
        tuple(resident),
        sum(tensors[name].nbytes for name in resident),
        tuple(unit for unit in units if unit.tensors),
        width,
    )


def _walk(
    model: nn.Module, blocks: frozenset[str], grain: Grain
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield modules with weights of their own, or that are units, each module object once."""
    seen: set[int] = set()

    def visit(module: nn.Module, name: str, *, in_list: bool) -> Iterator[Any]:
        if id(module) in seen:
            return
        seen.add(id(module))
        children = [
            (key, child)
            for key, child in module.named_children()
            if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None
        ]
        is_block = grain is Grain.BLOCK and (type(module).__name__ in blocks or in_list)
        if is_block and any(isinstance(inner, nn.Embedding) for inner in module.modules()):
            is_block = _is_small(module)
        # Its parts are used without being called.
        is_closed = isinstance(module, nn.MultiheadAttention)
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if not is_list and (not children or is_block or is_closed):
            seen.update(id(inner) for inner in module.modules())
            yield name, module, True
            return
        yield name, module, False
        for key, child in children:
            path = f"{name}.{key}" if name else key
            yield from visit(child, path, in_list=isinstance(module, nn.ModuleList))

    yield from visit(model, "", in_list=False)


def _stays(module: nn.Module, grain: Grain) -> bool:
    """Return True if a layer is so small that it need not come and go."""
    nbytes = sum(parameter.nbytes for parameter in module.parameters())
    if isinstance(module, nn.Embedding):
        return nbytes < _SMALL_EMBEDDING_NBYTES
    is_called = isinstance(module, nn.Linear)
    return grain is Grain.LEAF and not is_called and nbytes < _SMALL_LAYER_NBYTES


def _is_small(block: nn.Module) -> bool:
    """Return True if a block's embeddings are few rows, such as a table of relative positions."""
    embeddings = [inner for inner in block.modules() if isinstance(inner, nn.Embedding)]
    whole = sum(parameter.nbytes for parameter in block.parameters())
    return sum(inner.weight.nbytes for inner in embeddings) < whole / 8


def _kind(module: nn.Module, name: str, weights: ModelWeights, *, num_labels: int) -> Kind:
    is_plain = weights.is_plain(f"{name}.weight")
    if isinstance(module, nn.Embedding) and _looks_up_rows(module) and is_plain:
        return Kind.ROWS
    if type(module) is nn.Linear and is_plain and module.weight.nbytes > SLICE_NBYTES:
        # Held together: the slice and all passes' outputs; otherwise: the matrix.
        outputs_nbytes = num_labels * module.out_features * module.weight.element_size()
        if SLICE_NBYTES + outputs_nbytes < module.weight.nbytes:
            return Kind.SLICES
    return Kind.WHOLE


def _looks_up_rows(module: nn.Embedding) -> bool:
    """Return True if it uses its argument only to look up rows.

    Embeddings of positions often compute the rows from something else.
    """
    is_plain = type(module).forward is nn.Embedding.forward
    is_scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    return (is_plain or is_scaled) and module.max_norm is None


def _unit(
    module: nn.Module, name: str, kind: Kind, weights: ModelWeights, tensors: Sequence[str]
) -> Unit:
    parameters = {id(parameter): parameter for parameter in module.parameters()}
    return Unit(
        name=name,
        kind=kind,
        tensors=tuple(tensors),
        weights_nbytes=sum(parameter.nbytes for parameter in parameters.values()),
        conversion_nbytes=weights.converted_nbytes(tensors),
    )


def _width(module: nn.Module) -> int:
    """Return the outputs of all matrices for one token, as if all were computed at once."""
    width = 0
    for inner in module.modules():
        if isinstance(inner, nn.Embedding):
            continue
        for parameter in inner.parameters(recurse=False):
            if parameter.ndim >= 2:
                # The axis of the output differs; a token meets only a few of many experts.
                width += max(parameter.shape[-2:]) * min(math.prod(parameter.shape[:-2]), 8)
    return width


def _tensor_names(module: nn.Module, name: str, *, recurse: bool) -> list[str]:
    prefix = f"{name}." if name else ""
    if recurse:
        return [prefix + key for key in module.state_dict()]
    own = {*(key for key, _ in module.named_parameters(recurse=False))}
    own |= {key for key, _ in module.named_buffers(recurse=False)} - set(
        module._non_persistent_buffers_set
    )
    return [prefix + key for key in own]
