"""Lists the tensors of synthetic checkpoints and spreads them over shards; touches no file."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import Any

# Bytes per element; also the order within a file, which safetensors sorts by descending alignment.
DTYPE_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


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


@dataclass(frozen=True, slots=True)
class DeepSeekShape:
    """The sizes of a DeepSeek-V3 decoder; the names are those of its config.json."""

    hidden_size: int
    intermediate_size: int
    """Of the layers without experts, the first ones."""
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    """How many layers have no experts."""
    n_routed_experts: int
    n_shared_experts: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int


PRESETS = {
    "llama-100m": (LlamaShape(1024, 2816, 6, 16, 2, 16000), 80_000_000),
    "llama-1b": (LlamaShape(2048, 5632, 22, 32, 4, 32000), 480_000_000),
    "llama-2b": (LlamaShape(2560, 6912, 30, 20, 4, 32000), 600_000_000),
    "llama-3-70b": (LlamaShape(8192, 28672, 80, 64, 8, 128256), 5_000_000_000),
}
"""Name -> shape and bytes per shard: one of 0.1B in 3, TinyLlama's 1.1B in 5, 2.2B in 8,
Llama-3-70B in its 30.
"""

_DEEPSEEK_V3 = DeepSeekShape(7168, 18432, 2048, 61, 3, 256, 1, 128, 1536, 512, 128, 64, 128, 129280)
DEEPSEEK_PRESETS = {
    "deepseek-v3": (_DEEPSEEK_V3, 8_420_000_000),
    "deepseek-v3-fine": (
        replace(_DEEPSEEK_V3, n_routed_experts=512, moe_intermediate_size=1024),
        8_420_000_000,
    ),
}
"""DeepSeek-V3 in bf16, and the same with twice as many experts of half the size."""


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


def deepseek(shape: DeepSeekShape, *, max_shard_bytes: int) -> Checkpoint:
    """DeepSeek-V3 as published, in bf16 rather than FP8 (so without scales).

    The last layer, which is not counted, predicts the token after the next.
    """
    hidden, vocab = shape.hidden_size, shape.vocab_size
    layers: list[TensorSpec] = []
    for index in range(shape.num_hidden_layers + 1):
        prefix = f"model.layers.{index}"
        layers += [*_latent_attention(prefix, shape), *_norms(prefix, hidden)]
        if index < shape.first_k_dense_replace:
            layers += _mlp(f"{prefix}.mlp", hidden, shape.intermediate_size)
        else:
            layers += _experts(f"{prefix}.mlp", shape)
    extra = {
        "embed_tokens": (vocab, hidden),
        "enorm": (hidden,),
        "hnorm": (hidden,),
        "eh_proj": (hidden, 2 * hidden),
        "shared_head.norm": (hidden,),
        "shared_head.head": (vocab, hidden),
    }
    layers += [TensorSpec(f"{prefix}.{name}.weight", size) for name, size in extra.items()]
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **asdict(shape),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Checkpoint(_decoder(layers, vocab, hidden), config, max_shard_bytes)


def _latent_attention(prefix: str, shape: DeepSeekShape) -> list[TensorSpec]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    sizes: dict[str, tuple[int, ...]] = {
        "q_a_proj": (shape.q_lora_rank, hidden),
        "q_a_layernorm": (shape.q_lora_rank,),
        "q_b_proj": (heads * (shape.qk_nope_head_dim + shape.qk_rope_head_dim), shape.q_lora_rank),
        "kv_a_proj_with_mqa": (shape.kv_lora_rank + shape.qk_rope_head_dim, hidden),
        "kv_a_layernorm": (shape.kv_lora_rank,),
        "kv_b_proj": (heads * (shape.qk_nope_head_dim + shape.v_head_dim), shape.kv_lora_rank),
        "o_proj": (hidden, heads * shape.v_head_dim),
    }
    return [TensorSpec(f"{prefix}.self_attn.{name}.weight", size) for name, size in sizes.items()]


def _experts(prefix: str, shape: DeepSeekShape) -> list[TensorSpec]:
    hidden, width, count = shape.hidden_size, shape.moe_intermediate_size, shape.n_routed_experts
    specs = [
        TensorSpec(f"{prefix}.gate.weight", (count, hidden)),
        TensorSpec(f"{prefix}.gate.e_score_correction_bias", (count,), "F32"),
    ]
    for expert in range(count):
        specs += _mlp(f"{prefix}.experts.{expert}", hidden, width)
    return specs + _mlp(f"{prefix}.shared_experts", hidden, width * shape.n_shared_experts)


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
