"""Quantisations that an output can be written in: their tensors, names and config.

The choice of tensors goes by names, as far as these tell that transformers' loader holds a linear
layer there. What it leaves out stays float, and the config names its modules, so that each loads.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardmix.conventions.declarations import Tie
    from shardmix.formats.output_coding import OutputCoding

PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wq_b", "wk"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"),
    *("query", "key", "value", "dense", "fc1", "fc2", "fc_in", "fc_out"),
    *("query_key_value", "dense_h_to_4h", "dense_4h_to_h", "Wqkv", "Wi", "Wo"),
    *("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
)
"""Names of linear layers of attention and of feed-forward networks in transformers."""
_WEIGHT = ".weight"
_PLAIN = re.compile(r"[\w.]+")
"""A name of one parameter; others stand for those of any inner model, or are regexes."""
_FUSED_EXPERTS = ("gate_up_proj", "down_proj")
_HEADS = ("lm_head",)
"""The head that a loader makes even if it is not stored."""
_OWN_LINEAR = frozenset({"falcon", "RefinedWeb", "RefinedWebModel"})
"""Model types whose layers have a class of their own, which the FP8 loader does not know."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OutputQuantisation:
    """A quantisation that an output can be written in."""

    name: str
    """Its name for a user."""
    make_coding: "Callable[[], OutputCoding]"
    """Makes the way a matrix is stored, which is loaded only if it is used."""
    scales_ending: str
    """The end of the name of a tensor's scales, after the tensor's own name."""
    chosen: Callable[[Mapping[str, Shape], Mapping[str, Any]], Iterator[str]]
    """Yields the tensors to quantise: of names and shapes of all tensors of floats, and of the
    output's config."""
    rule: str
    """That choice, in words."""
    config: Callable[[Sequence[str]], dict[str, Any]]
    """Returns the config's `quantization_config`, of the modules that stay float."""

    @property
    def coding(self) -> "OutputCoding":
        """The way a matrix is stored."""
        return self.make_coding()


def linear_weights(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tensors that transformers' FP8 loader holds as codes, of all tensors of floats.

    These are the matrices of attention and feed-forward projections in numbered layers; experts in
    one tensor if they have outputs before inputs, and no bias, as its `FP8Experts` must have them.
    """
    if config.get("model_type") in _OWN_LINEAR:
        return
    for name, shape in shapes.items():
        if 0 in shape:
            continue
        if len(shape) == 2 and name.endswith(_WEIGHT):
            module = name.removesuffix(_WEIGHT)
            if module.rpartition(".")[2] in PROJECTIONS and _is_in_a_layer(module):
                yield name
        elif len(shape) == 3 and (module := _experts(name)):
            up = shapes.get(f"{module}.gate_up_proj", ())
            down = shapes.get(f"{module}.down_proj", ())
            has_bias = f"{module}.down_proj_bias" in shapes
            if len(up) == len(down) == 3 and not has_bias and up[1:] == (2 * down[2], down[1]):
                yield name


def _is_in_a_layer(module: str) -> bool:
    """Return True if a part of a module's name, before the last, is a number."""
    return any(part.isascii() and part.isdecimal() for part in module.split(".")[:-1])


def _experts(name: str) -> str:
    """Return the module of experts in one tensor that has this name, or ""."""
    module, _, part = name.rpartition(".")
    is_experts = module.endswith(".experts") and part in _FUSED_EXPERTS
    return module if is_experts and _is_in_a_layer(module) else ""


def unconverted_modules(
    shapes: Mapping[str, Shape], chosen: set[str], ties: "Iterable[Tie]"
) -> tuple[str, ...]:
    """Return the modules of matrices that stay float, by which a loader leaves them so.

    Among them are those that are not stored, since they share a tensor (`ties`).
    """
    found = dict.fromkeys(_HEADS)
    for tie in ties:
        for tied, _ in tie.pairs:
            name = f"{tie.at}.{tied}" if tie.at else tied
            if _PLAIN.fullmatch(name) and name.endswith(_WEIGHT) and name not in chosen:
                found[name.removesuffix(_WEIGHT)] = None
    for name, shape in shapes.items():
        if name in chosen or len(shape) < 2:
            continue
        if len(shape) == 2 and name.endswith(_WEIGHT):
            found[name.removesuffix(_WEIGHT)] = None
        elif len(shape) == 3 and (experts := _experts(name)):
            found[experts] = None
    return tuple(found)


def _fp8_blocks() -> "OutputCoding":
    from shardmix.formats.fp8_blocks import Fp8Blocks

    return Fp8Blocks()


def _fp8_config(unconverted: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(_fp8_blocks().block),
        "modules_to_not_convert": list(unconverted),
    }


_ALL = (
    OutputQuantisation(
        name="fp8-blocks",
        make_coding=_fp8_blocks,
        scales_ending="_scale_inv",
        chosen=linear_weights,
        rule="the matrices of attention and feed-forward projections (q_proj, down_proj, ...) in "
        "numbered layers; embeddings, norms, heads, routers and biases stay float",
        config=_fp8_config,
    ),
)
OUTPUT_QUANTISATIONS = {each.name: each for each in _ALL}
"""By name."""
