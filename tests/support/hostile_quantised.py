"""Quantised models whose codes, scales and config contradict one another."""

import json
import math

from tests.support.hostile_inputs import Case, a_folder, safetensors_file

_WIDTHS = {"F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "F32": 4}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_COMPRESSED = {"quant_method": "compressed-tensors"}
_CODES = {"w.weight": ("F8_E4M3", [130, 4])}


def _case(
    name: str, quantisation: object, tensors: dict[str, tuple[str, list[int]]], said: str
) -> Case:
    entries, end = {}, 0
    for tensor, (dtype, shape) in tensors.items():
        start, end = end, end + _WIDTHS[dtype] * math.prod(shape)
        entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    files = {
        "model.safetensors": safetensors_file(json.dumps(entries), end),
        "config.json": json.dumps({"quantization_config": quantisation}),
    }
    return Case(f"quantised: {name}", a_folder(files), said)


def _scaled(dtype: str, shape: list[int]) -> dict[str, tuple[str, list[int]]]:
    return {**_CODES, "w.weight_scale_inv": (dtype, shape)}


def _packed(**others: tuple[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
    return {"w.weight_packed": ("I32", [4, 4]), **{f"w.{n}": each for n, each in others.items()}}


_ROWS = {"weight_shape": ("I64", [2]), "weight_scale": ("F32", [4, 1])}
CASES = (
    _case("scales too many", _FP8, _scaled("F32", [3, 1]), "does not fit the codes"),
    _case("scales of a wide dtype", _FP8, _scaled("I64", [2, 1]), "a dtype that is not known"),
    _case("no scales at all", _FP8, _scaled("F32", [0]), "does not fit the codes"),
    _case(
        "a vast block",
        {**_FP8, "weight_block_size": [1 << 62, 1]},
        _scaled("F32", [2, 1]),
        "it must be whole, from 1 to 65,536",
    ),
    _case(
        "blocks at length",
        {**_FP8, "weight_block_size": ["x" * 9_999, 1]},
        _scaled("F32", [2, 1]),
        "it must be whole",
    ),
    _case("a shape of zeros", _COMPRESSED, _packed(**_ROWS), "says [0, 0], which"),
    _case("no shape", _COMPRESSED, _packed(), "w.weight_shape, their shape before that"),
    _case(
        "a shape of a million numbers",
        _COMPRESSED,
        _packed(weight_shape=("I64", [1_000_000]), weight_scale=("F32", [4, 1])),
        "is not the shape of a matrix",
    ),
    _case(
        "a name that clears the screen",
        _COMPRESSED,
        {"\x1b[2J.weight_packed": ("I32", [4, 4])},
        "\\x1b[2J.weight_packed",
    ),
    _case(
        "experts without scales",
        {"quant_method": "mxfp4"},
        {"e.up_blocks": ("U8", [1, 2, 3, 16])},
        "e.up_scales, are not there",
    ),
    _case(
        "FP4 of half a group",
        _COMPRESSED,
        {"w.weight_packed": ("U8", [2, 20]), "w.weight_scale": ("U8", [2, 2])},
        "which groups of 32 do not divide",
    ),
    _case(
        "transforms",
        {**_COMPRESSED, "transform_config": {"config_groups": {}}},
        _scaled("F32", [2, 1]),
        "the transforms are not undone here",
    ),
    _case("another method", {"quant_method": "gptq"}, _scaled("F32", [2, 1]), "is quantised (gptq"),
)
