"""Small checkpoints for tests, and an oracle that knows nothing of shardmix's own arithmetic."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

CONFIG = {"architectures": ["TestModel"], "model_type": "test", "torch_dtype": "float32"}


def save_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: Sequence[Sequence[str]] | None = None,
    config: Mapping[str, object] | None = CONFIG,
) -> Path:
    """Save a model folder: one file, or one a list of names in `shards`, with its index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    if shards is None:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        filename = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        members = {name: tensors[name] for name in names}
        save_file(members, folder / filename, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, filename))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_model(folder: Path) -> Tensors:
    """Load all tensors of a model folder, by safetensors' own reader, honouring the index."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert {path.name for path in folder.glob("*.safetensors")} == set(weight_map.values())
    else:
        assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
        weight_map = None
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                assert weight_map is None or weight_map[name] == path.name
                tensors[name] = file.get_tensor(name)
    if weight_map is not None:
        assert set(weight_map) == set(tensors)
    return tensors


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> torch.Tensor:
    """Return ordinary values, with a few that are hard to round mixed in."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    values.view(-1)[::7] *= 1e-6
    values.view(-1)[::11] *= 300.0
    return values.to(dtype)


def random_model(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return a model of a few tensors, of shapes that differ in every way."""
    shapes = {
        "model.embed_tokens.weight": (37, 8),
        "model.layers.0.mlp.weight": (13, 17),
        "model.layers.0.norm.weight": (8,),
        "model.layers.1.mlp.weight": (13, 17),
        "model.layers.1.norm.weight": (8,),
        "model.scale": (),
        "model.nothing": (0, 4),
        "lm_head.weight": (37, 8),
    }
    return {
        name: random_tensor(shape, dtype, seed=seed * 1000 + number)
        for number, (name, shape) in enumerate(shapes.items())
    }


def weighted_sum(
    sources: Sequence[torch.Tensor], weights: Sequence[float], out_dtype: torch.dtype
) -> torch.Tensor:
    """Return what the contract demands, computed by numpy, one rounding at a time.

    float32 products and sums (float64 where any source is), rounded once to the output's dtype.
    """
    wide = np.float64 if any(source.dtype == torch.float64 for source in sources) else np.float32
    total = None
    for source, weight in zip(sources, weights, strict=True):
        values = source.to(torch.float64).numpy().astype(wide)  # exact: a widening
        product = np.multiply(wide(weight), values, dtype=wide)
        total = product if total is None else np.add(total, product, dtype=wide)
    return round_once(np.asarray(total), out_dtype)


def round_once(values: np.ndarray, out_dtype: torch.dtype) -> torch.Tensor:
    """Round float32 or float64 values to nearest even in one step, also to 16 bits."""
    if out_dtype == torch.float64:
        return torch.from_numpy(values.astype(np.float64))
    if out_dtype == torch.float32:
        return torch.from_numpy(values.astype(np.float32))
    if out_dtype == torch.float16:
        return torch.from_numpy(values.astype(np.float16))  # numpy rounds float64 to it directly
    return _to_bfloat16(values.astype(np.float64))


def _to_bfloat16(values: np.ndarray) -> torch.Tensor:
    """Round float64 to bfloat16 by scaling: 8 significant bits, as many fewer when subnormal."""
    mantissa, exponent = np.frexp(values)
    lost = np.maximum(0, -125 - exponent)
    scale = np.ldexp(1.0, 8 - lost)
    rounded = np.ldexp(np.round(mantissa * scale) / scale, exponent)  # np.round: half to even
    # An overflow becomes infinite in float32; every other value is exact there and in bfloat16.
    with np.errstate(over="ignore"):
        single = np.where(np.isfinite(values), rounded, values).astype(np.float32)
    return torch.from_numpy(single).to(torch.bfloat16)


def assert_same_bits(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Assert that two models are the same, bit for bit (so -0.0 is not 0.0, and NaN is NaN)."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        mine = actual[name]
        assert mine.dtype == tensor.dtype, name
        assert mine.shape == tensor.shape, name
        assert _bits(mine) == _bits(tensor), name


def _bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )
