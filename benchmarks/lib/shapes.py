"""The tensors and configs of synthetic checkpoints; touches no file."""

import random
from collections.abc import Mapping
from math import ceil, prod
from typing import Any, NamedTuple

# Bytes per element; also the order within a file, which safetensors sorts by descending alignment.
DTYPE_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


class Spec(NamedTuple):
    """What a tensor's header entry needs, but the offsets."""

    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


Sizes = dict[str, int]
"""Sizes of a decoder, by their names in config.json."""
Made = tuple[dict[str, Spec], dict[str, Any]]
"""The tensors by name, in state-dict order, and the config."""
_LLAMA = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)
LLAMAS: dict[str, tuple[Sizes, int]] = {
    name: (dict(zip(_LLAMA, sizes, strict=True)), shard_bytes)
    for name, sizes, shard_bytes in (
        ("tiny", (64, 176, 2, 4, 2, 512), 5_000_000_000),
        ("llama-100m", (1024, 2816, 6, 16, 2, 16000), 80_000_000),
        ("llama-1b", (2048, 5632, 22, 32, 4, 32000), 480_000_000),
        ("llama-2b", (2560, 6912, 30, 20, 4, 32000), 600_000_000),
        ("llama-3-70b", (8192, 28672, 80, 64, 8, 128256), 5_000_000_000),
    )
}
"""Name → sizes and bytes per shard: some hundred KB, one of 0.1B in 3, TinyLlama's 1.1B in 5, 2.2B
in 8, Llama-3-70B in its 30.
"""
_DEEPSEEK_V3 = {
    "hidden_size": 7168,
    "intermediate_size": 18432,  # of the layers without experts, the first ones
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_FINE = {"n_routed_experts": 512, "moe_intermediate_size": 1024}
DEEPSEEKS: dict[str, tuple[Sizes, int]] = {
    "deepseek-v3": (_DEEPSEEK_V3, 8_420_000_000),
    "deepseek-v3-fine": (_DEEPSEEK_V3 | _FINE, 8_420_000_000),
}
"""DeepSeek-V3 in bf16, and the same with twice as many experts of half the size."""


def _weights(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Spec]:
    return {f"{prefix}.{name}.weight": Spec(shape) for name, shape in shapes.items()}


def _attention(prefix: str, hidden: int, kv: int) -> dict[str, Spec]:
    rows = {"q": hidden, "k": kv, "v": kv, "o": hidden}
    shapes = {f"{name}_proj": (size, hidden) for name, size in rows.items()}
    return _weights(f"{prefix}.self_attn", shapes)


def _norms(prefix: str, hidden: int) -> dict[str, Spec]:
    return _weights(prefix, {f"{at}_layernorm": (hidden,) for at in ("input", "post_attention")})


def _mlp(prefix: str, hidden: int, width: int) -> dict[str, Spec]:
    up, down = (width, hidden), (hidden, width)
    return _weights(prefix, {"gate_proj": up, "up_proj": up, "down_proj": down})


def _router(prefix: str, hidden: int, experts: int) -> dict[str, Spec]:
    bias = Spec((experts,), "F32")
    gate = Spec((experts, hidden))
    return {f"{prefix}.gate.weight": gate, f"{prefix}.gate.e_score_correction_bias": bias}


def _decoder(layers: dict[str, Spec], vocab: int, hidden: int) -> dict[str, Spec]:
    first = {"model.embed_tokens.weight": Spec((vocab, hidden))}
    last = {"model.norm.weight": Spec((hidden,)), "lm_head.weight": Spec((vocab, hidden))}
    return first | layers | last


def _config(architecture: str, model_type: str, sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        **sizes,
        **more,
    }


def llama(sizes: Sizes) -> Made:
    """Return an untied bf16 Llama: three tensors of its own and nine a layer."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    layers: dict[str, Spec] = {}
    for index in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        layers |= _attention(prefix, hidden, hidden // heads * sizes["num_key_value_heads"])
        layers |= _mlp(f"{prefix}.mlp", hidden, sizes["intermediate_size"])
        layers |= _norms(prefix, hidden)
    more = {"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-05}
    config = _config("Llama", "llama", sizes, tie_word_embeddings=False, **more)
    return _decoder(layers, sizes["vocab_size"], hidden), config


def deepseek(sizes: Sizes) -> Made:
    """Return DeepSeek-V3 as published, in bf16 rather than FP8 (so without scales).

    The last layer, which is not counted, predicts the token after the next.
    """
    hidden, vocab, width = sizes["hidden_size"], sizes["vocab_size"], sizes["moe_intermediate_size"]
    layers: dict[str, Spec] = {}
    for index in range(sizes["num_hidden_layers"] + 1):
        prefix = f"model.layers.{index}"
        layers |= _latent_attention(f"{prefix}.self_attn", sizes) | _norms(prefix, hidden)
        mlp = f"{prefix}.mlp"
        if index < sizes["first_k_dense_replace"]:
            layers |= _mlp(mlp, hidden, sizes["intermediate_size"])
            continue
        layers |= _router(mlp, hidden, sizes["n_routed_experts"])
        for expert in range(sizes["n_routed_experts"]):
            layers |= _mlp(f"{mlp}.experts.{expert}", hidden, width)
        layers |= _mlp(f"{mlp}.shared_experts", hidden, width * sizes["n_shared_experts"])
    last = {"embed_tokens": (vocab, hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    last |= {"eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,)}
    layers |= _weights(prefix, last | {"shared_head.head": (vocab, hidden)})
    config = _config("DeepseekV3", "deepseek_v3", sizes, tie_word_embeddings=False)
    return _decoder(layers, vocab, hidden), config


def _latent_attention(prefix: str, sizes: Sizes) -> dict[str, Spec]:
    hidden, heads, value = (
        sizes[name] for name in ("hidden_size", "num_attention_heads", "v_head_dim")
    )
    q_rank, kv_rank = sizes["q_lora_rank"], sizes["kv_lora_rank"]
    rope, key = sizes["qk_rope_head_dim"], sizes["qk_nope_head_dim"]
    shapes = {
        "q_a_proj": (q_rank, hidden),
        "q_a_layernorm": (q_rank,),
        "q_b_proj": (heads * (key + rope), q_rank),
        "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_a_layernorm": (kv_rank,),
        "kv_b_proj": (heads * (key + value), kv_rank),
        "o_proj": (hidden, heads * value),
    }
    return _weights(prefix, shapes)


def giant(tensor_bytes: int) -> Made:
    """Return a one-layer Llama whose embedding alone holds more than `tensor_bytes`."""
    sizes = LLAMAS["llama-1b"][0] | {"num_hidden_layers": 1}
    tensors, config = llama(sizes | {"vocab_size": tensor_bytes // (2 * 2048) + 1})
    # The head is left out (tied): one giant tensor a checkpoint is enough.
    del tensors["lm_head.weight"]
    return tensors, config | {"tie_word_embeddings": True}


def moe(num_tensors: int, hidden: int, intermediate: int, layers: int) -> Made:
    """Return a mixture of experts of at least `num_tensors` small tensors.

    Each layer's router bias is float32, as DeepSeek's are, so that shards hold two dtypes.
    """
    vocab, fixed_per_layer, fixed = 4096, 8, 3
    experts = max(1, ceil((num_tensors - fixed - fixed_per_layer * layers) / (3 * layers)))
    specs: dict[str, Spec] = {}
    for index in range(layers):
        prefix = f"model.layers.{index}"
        specs |= _attention(prefix, hidden, hidden)
        for expert in range(experts):
            specs |= _mlp(f"{prefix}.mlp.experts.{expert}", hidden, intermediate)
        specs |= _router(f"{prefix}.mlp", hidden, experts) | _norms(prefix, hidden)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab}
    sizes |= {"moe_intermediate_size": intermediate, "n_routed_experts": experts}
    return _decoder(specs, vocab, hidden), _config("SyntheticMoe", "synthetic_moe", sizes)


def mixed_moe(num_tensors: int, total_bytes: int) -> Made:
    """Return `num_tensors` experts, nearly all of 64 KiB and the others of 4 MiB, mixed.

    As many of the large ones as it takes to have about `total_bytes`. Raises ValueError if so many
    tensors of these sizes cannot have that total.
    """
    hidden, experts_per_layer = 1024, 128
    small, large = 64 * 1024, 4 * 1024**2
    if not small * num_tensors <= total_bytes <= large * num_tensors:
        raise ValueError(f"{num_tensors} tensors of 64 KiB to 4 MiB never have {total_bytes} bytes")
    num_large = (total_bytes - small * num_tensors) // (large - small)
    sizes = [large] * num_large + [small] * (num_tensors - num_large)
    random.Random(0).shuffle(sizes)
    specs = {}
    for index, nbytes in enumerate(sizes):
        layer, expert = divmod(index, experts_per_layer)
        name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
        specs[name] = Spec((nbytes // (2 * hidden), hidden))
    layers = ceil(num_tensors / experts_per_layer)
    known = {"hidden_size": hidden, "num_hidden_layers": layers}
    return specs, _config("SyntheticMoe", "synthetic_moe", known)
