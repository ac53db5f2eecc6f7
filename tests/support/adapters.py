"""LoRA adapters for tests, as PEFT saves them, and an oracle that rounds each step by itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["any"]}
PREFIX = "base_model.model."


def save_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """Save an adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def random_adapter(
    base: Mapping[str, torch.Tensor],
    modules: Sequence[str],
    *,
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    prefix: str = PREFIX,
) -> dict[str, torch.Tensor]:
    """Return matrices for the weights of some modules."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        rows, columns = base[f"{module}.weight"].shape
        a = torch.randn((rank, columns), generator=generator)
        b = torch.randn((rows, rank), generator=generator)
        tensors[f"{prefix}{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"{prefix}{module}.lora_B.weight"] = b.to(dtype)
    return tensors


def applied(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return W + scaling · B·A: float32 (float64 if W is), summed in the order of the rank."""
    wide = np.float64 if weight.dtype == torch.float64 else np.float32
    w, a, b = (x.double().numpy().astype(wide) for x in (weight, a, b))
    total = np.multiply(b[:, :1], a[:1], dtype=wide)
    for rank in range(1, a.shape[0]):
        total = np.add(total, np.multiply(b[:, rank, None], a[rank], dtype=wide), dtype=wide)
    return torch.from_numpy(np.add(w, np.multiply(wide(scaling), total, dtype=wide), dtype=wide))


def with_adapter(
    base: Mapping[str, torch.Tensor],
    adapter: Mapping[str, torch.Tensor],
    scaling: float = 2.0,
    prefix: str = PREFIX,
) -> dict[str, torch.Tensor]:
    """Return a model's tensors with a plain adapter's changes, unrounded."""
    changed = dict(base)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(prefix).removesuffix(".lora_A.weight")
            b = adapter[name.replace("lora_A", "lora_B")]
            changed[f"{module}.weight"] = applied(base[f"{module}.weight"], a, b, scaling)
    return changed
