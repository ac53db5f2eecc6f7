"""The tensors and configs of synthetic checkpoints, by `shapes.json`; writes no file.

There, a dimension is an expression of sizes, which have their names in config.json; what is for
`each` layer or expert is there as often as `below` says. Presets: some hundred KB; 0.1B parameters
in 3 shards, TinyLlama's 1.1B in 5, 2.2B in 8, Llama-3-70B in its 30; DeepSeek-V3 as published, but
in bf16 (so without scales; its last layer, which is not counted, predicts the token after the
next), and with twice as many experts of half the size. Routers' biases are float32, as DeepSeek's
are, so that shards hold two dtypes.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

# Bytes per element; also the order within a file, which safetensors sorts by descending alignment.
DTYPE_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
KINDS: dict[str, Any] = json.loads(Path(__file__).with_name("shapes.json").read_text())
PRESETS: dict[str, Any] = KINDS.pop("presets")


class Spec(NamedTuple):
    """What a tensor's header entry needs, but the offsets."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


Made = tuple[dict[str, Spec], dict[str, Any]]
"""The tensors by name, in state-dict order, and the config."""


def preset(name: str, **sizes: int | None) -> Made:
    """Return a checkpoint, with these sizes in place of the preset's."""
    kind = KINDS[PRESETS[name]["kind"]]
    known = PRESETS[name]["sizes"] | {key: size for key, size in sizes.items() if size is not None}
    return dict(_tensors(kind["tensors"], known)), kind["config"] | known


def _tensors(entries: Sequence[Any], sizes: Mapping[str, int]) -> Iterator[tuple[str, Spec]]:
    for entry in entries:
        if isinstance(entry, dict):
            for number in range(eval(entry["below"], {}, sizes)):
                yield from _tensors(entry["tensors"], {**sizes, entry["each"]: number})
        else:
            shape = tuple(eval(dimension, {}, sizes) for dimension in entry[1:])
            name = entry[0].format_map(sizes)
            yield name, Spec(shape, "F32" if name.endswith("_bias") else "BF16")


def giant(tensor_bytes: int) -> Made:
    """Return a one-layer Llama whose embedding alone holds more than `tensor_bytes`."""
    vocab = tensor_bytes // (2 * 2048) + 1
    tensors, config = preset("llama-1b", num_hidden_layers=1, vocab_size=vocab)
    # The head is left out (tied): one giant tensor a checkpoint is enough.
    del tensors["lm_head.weight"]
    return tensors, config | {"tie_word_embeddings": True}


def moe(num_tensors: int, **sizes: int | None) -> Made:
    """Return a mixture of experts of at least `num_tensors` small tensors."""
    layers = sizes["num_hidden_layers"] or PRESETS["moe"]["sizes"]["num_hidden_layers"]
    experts = max(1, ceil((num_tensors - 3 - 8 * layers) / (3 * layers)))
    return preset("moe", n_routed_experts=experts, **sizes)


def mixed_moe(num_tensors: int, total_bytes: int) -> Made:
    """Return `num_tensors` experts, nearly all of 64 KiB and the others of 4 MiB, mixed.

    As many of the large ones as it takes to have about `total_bytes`. Raises ValueError if so many
    tensors of these sizes cannot have that total.
    """
    hidden, small, large = 1024, 64 * 1024, 4 * 1024**2
    if not small * num_tensors <= total_bytes <= large * num_tensors:
        raise ValueError(f"{num_tensors} tensors of 64 KiB to 4 MiB never have {total_bytes} bytes")
    num_large = (total_bytes - small * num_tensors) // (large - small)
    sizes = [large] * num_large + [small] * (num_tensors - num_large)
    random.Random(0).shuffle(sizes)
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    tensors = {
        name.format(*divmod(index, 128)): Spec((nbytes // (2 * hidden), hidden))
        for index, nbytes in enumerate(sizes)
    }
    known = {"hidden_size": hidden, "num_hidden_layers": ceil(num_tensors / 128)}
    return tensors, KINDS["moe"]["config"] | known
