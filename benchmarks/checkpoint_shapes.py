"""Lists the tensors of synthetic checkpoints and spreads them over shards; touches no file."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

# Bytes per element; also the order within a file, which safetensors sorts by descending alignment.
DTYPE_SIZES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint: all that its header entry needs but the offsets."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama decoder; the names are those of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    @property
    def kv_size(self) -> int:
        """Rows of the key and value projections."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that is written: the tensors in state-dict order and the config."""

    tensors: tuple[TensorSpec, ...]
    config: dict[str, Any]
    max_shard_bytes: int
    """No shard holds more tensor bytes, save one that holds a single larger tensor."""


PRESETS = {
    "llama-1b": (LlamaShape(2048, 5632, 22, 32, 4, 32000), 480_000_000),
    "llama-2b": (LlamaShape(2560, 6912, 30, 20, 4, 32000), 600_000_000),
    "llama-3-70b": (LlamaShape(8192, 28672, 80, 64, 8, 128256), 5_000_000_000),
}
"""Name -> shape and bytes per shard: TinyLlama's 1.1B in 5, 2.2B in 8, Llama-3-70B in its 30."""


def _attention(prefix: str, hidden: int, kv: int) -> list[TensorSpec]:
    rows = {"q": hidden, "k": kv, "v": kv, "o": hidden}
    return [
        TensorSpec(f"{prefix}.self_attn.{name}_proj.weight", (size, hidden))
        for name, size in rows.items()
    ]


def _norms(prefix: str, hidden: int) -> list[TensorSpec]:
    names = ("input_layernorm", "post_attention_layernorm")
    return [TensorSpec(f"{prefix}.{name}.weight", (hidden,)) for name in names]


def _mlp(prefix: str, hidden: int, intermediate: int) -> list[TensorSpec]:
    return [
        TensorSpec(f"{prefix}.gate_proj.weight", (intermediate, hidden)),
        TensorSpec(f"{prefix}.up_proj.weight", (intermediate, hidden)),
        TensorSpec(f"{prefix}.down_proj.weight", (hidden, intermediate)),
    ]


def _decoder(layers: Iterable[TensorSpec], vocab: int, hidden: int) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec("model.embed_tokens.weight", (vocab, hidden)),
        *layers,
        TensorSpec("model.norm.weight", (hidden,)),
        TensorSpec("lm_head.weight", (vocab, hidden)),
    )


def llama(shape: LlamaShape, *, max_shard_bytes: int) -> Checkpoint:
    """An untied bf16 Llama: three tensors of its own and nine a layer."""
    layers: list[TensorSpec] = []
    for index in range(shape.num_hidden_layers):
        prefix = f"model.layers.{index}"
        layers += _attention(prefix, shape.hidden_size, shape.kv_size)
        layers += _mlp(f"{prefix}.mlp", shape.hidden_size, shape.intermediate_size)
        layers += _norms(prefix, shape.hidden_size)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    tensors = _decoder(layers, shape.vocab_size, shape.hidden_size)
    return Checkpoint(tensors, config, max_shard_bytes)


def giant(*, tensor_bytes: int, max_shard_bytes: int) -> Checkpoint:
    """A one-layer Llama whose embedding alone holds more than `tensor_bytes`."""
    hidden = 2048
    shape = LlamaShape(hidden, 5632, 1, 32, 4, tensor_bytes // (2 * hidden) + 1)
    whole = llama(shape, max_shard_bytes=max_shard_bytes)
    # The head is left out (tied): one giant tensor a checkpoint is enough.
    tensors = tuple(spec for spec in whole.tensors if spec.name != "lm_head.weight")
    return Checkpoint(tensors, whole.config | {"tie_word_embeddings": True}, max_shard_bytes)


def moe(
    *, num_tensors: int, hidden: int, intermediate: int, layers: int, max_shard_bytes: int
) -> Checkpoint:
    """A mixture of experts of at least `num_tensors` small tensors.

    Each layer's router bias is float32, as DeepSeek's are, so that shards hold two dtypes.
    """
    vocab, fixed_per_layer, fixed = 4096, 8, 3
    experts = max(1, ceil((num_tensors - fixed - fixed_per_layer * layers) / (3 * layers)))
    specs: list[TensorSpec] = []
    for index in range(layers):
        prefix = f"model.layers.{index}"
        specs += _attention(prefix, hidden, hidden)
        for expert in range(experts):
            specs += _mlp(f"{prefix}.mlp.experts.{expert}", hidden, intermediate)
        specs.append(TensorSpec(f"{prefix}.mlp.gate.weight", (experts, hidden)))
        specs.append(TensorSpec(f"{prefix}.mlp.gate.e_score_correction_bias", (experts,), "F32"))
        specs += _norms(prefix, hidden)
    config = {
        "architectures": ["SyntheticMoeForCausalLM"],
        "model_type": "synthetic_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "n_routed_experts": experts,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }
    return Checkpoint(_decoder(specs, vocab, hidden), config, max_shard_bytes)


def mixed_moe(*, num_tensors: int, total_bytes: int, max_shard_bytes: int) -> Checkpoint:
    """Exactly `num_tensors` experts' matrices of 64 KiB to 4 MiB, about `total_bytes` together.

    Many small and few large ones, in a mixed order; as far from equal as the total allows. Raises
    ValueError where so many tensors of these sizes cannot have that total.
    """
    hidden, experts_per_layer = 1024, 128
    smallest, largest = 64 * 1024, 4 * 1024**2
    if not smallest * num_tensors <= total_bytes <= largest * num_tensors:
        raise ValueError(f"{num_tensors} tensors of 64 KiB to 4 MiB never have {total_bytes} bytes")
    row_bytes = 2 * hidden

    def rows(steepness: float) -> list[int]:
        # The size at each quantile: the steeper, the fewer large ones.
        ratio = largest / smallest
        quantiles = [index / max(1, num_tensors - 1) for index in range(num_tensors)]
        sizes = [smallest * ratio ** (quantile**steepness) for quantile in quantiles]
        return [round(size / row_bytes) for size in sizes]

    low, high = 1e-3, 1e6
    for _ in range(60):
        middle = (low * high) ** 0.5
        is_too_much = sum(rows(middle)) * row_bytes > total_bytes
        low, high = (middle, high) if is_too_much else (low, middle)
    chosen = rows(high)
    random.Random(0).shuffle(chosen)
    specs = []
    for index, height in enumerate(chosen):
        layer, expert = divmod(index, experts_per_layer)
        name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
        specs.append(TensorSpec(name, (height, hidden)))
    config = {
        "architectures": ["SyntheticMoeForCausalLM"],
        "model_type": "synthetic_moe",
        "hidden_size": hidden,
        "num_hidden_layers": ceil(num_tensors / experts_per_layer),
        "torch_dtype": "bfloat16",
    }
    return Checkpoint(tuple(specs), config, max_shard_bytes)


def split_into_shards(
    tensors: Sequence[TensorSpec], *, max_shard_bytes: int
) -> list[list[TensorSpec]]:
    """Fill shards greedily in state-dict order, as huggingface_hub does.

    A tensor larger than a shard gets a shard of its own, which leaves the open one open.
    """
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    current_bytes = 0
    for spec in tensors:
        if spec.nbytes > max_shard_bytes:
            shards.append([spec])
            continue
        if current and current_bytes + spec.nbytes > max_shard_bytes:
            shards.append(current)
            current, current_bytes = [], 0
        current.append(spec)
        current_bytes += spec.nbytes
    return [*shards, current] if current else shards
