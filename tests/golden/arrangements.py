"""The table of merges whose outputs are recorded: models, weights and options.

A new arrangement is a new entry; `python -m tests.golden` then records its digests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.golden.sources import Model, Tensors


@dataclass(frozen=True, slots=True)
class Arrangement:
    """A merge, but for what changes no byte of its output."""

    models: tuple[Model, ...]
    """The sources, in order."""
    weights: tuple[float, ...]
    """One a model."""
    words: tuple[str, ...] = ()
    """Options of the command line that decide bytes."""
    config_from: Model | None = None
    """The model that gives the config; None: the first of the sources."""
    as_files: bool = False
    """The sources are named as .safetensors files, not as folders."""


# The shapes of a small model; odd, so that neither vectors nor pages divide them.
_SHAPES = {
    "model.embed_tokens.weight": (37, 8),
    "model.layers.0.mlp.weight": (13, 17),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.mlp.weight": (13, 17),
    "model.layers.1.norm.weight": (8,),
    "model.scale": (),
    "model.nothing": (0, 4),
    "model.cube": (3, 1, 5, 7),
    "lm_head.weight": (37, 8),
}
_SEEDS = "abcdefgh"


def _of(dtype: str) -> Tensors:
    return {name: (dtype, shape) for name, shape in _SHAPES.items()}


def _pair(tensors: Tensors, **options: Any) -> tuple[Model, Model]:
    return Model("a", tensors, **options), Model("b", tensors, **options)


def _merge(
    *models: Model, weights: Sequence[float] | None = None, words: str = "", **options: Any
) -> Arrangement:
    shares = (0.6, 0.4) if weights is None else tuple(weights)
    return Arrangement(models, shares, tuple(words.split()), **options)


# --- Dtypes

_INTEGERS = ("I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL")
_MIXED: Tensors = {
    # Bytes before wider elements: what follows lies at odd offsets.
    "model.mask": ("BOOL", (3,)),
    "model.a.weight": ("F32", (9, 5)),
    "model.b.weight": ("BF16", (9, 5)),
    "model.steps": ("I64", (4,)),
    "model.c.weight": ("F16", (9, 5)),
    "model.d.weight": ("F64", (9, 5)),
    "model.e.weight": ("BF16", (1,)),
}
_WITH_INTEGERS: Tensors = {
    **{f"model.buffer_{dtype.lower()}": (dtype, (7,)) for dtype in _INTEGERS},
    "model.position_ids": ("I64", (1, 11)),
    "model.num_batches_tracked": ("I64", ()),
    "model.weight": ("F32", (5, 3)),
}

DTYPES = {
    "f64": _merge(*_pair(_of("F64"))),
    "f32": _merge(*_pair(_of("F32"))),
    "f16": _merge(*_pair(_of("F16"))),
    "bf16": _merge(*_pair(_of("BF16"))),
    "mixed within a model": _merge(*_pair(_MIXED)),
    "mixed within a model to bfloat16": _merge(*_pair(_MIXED), words="--dtype bfloat16"),
    "f32 with bf16": _merge(Model("a", _of("F32")), Model("b", _of("BF16"))),
    "bf16 with f32": _merge(Model("a", _of("BF16")), Model("b", _of("F32"))),
    "f16 with bf16": _merge(Model("a", _of("F16")), Model("b", _of("BF16"))),
    "f32 with f64": _merge(Model("a", _of("F32")), Model("b", _of("F64"))),
    "f64 with f16": _merge(Model("a", _of("F64")), Model("b", _of("F16"))),
    "all float dtypes": _merge(
        *(Model(dtype, _of(dtype)) for dtype in ("BF16", "F16", "F32", "F64")),
        weights=(0.1, 0.2, 0.3, 0.4),
    ),
    "f64 to float32": _merge(*_pair(_of("F64")), words="--dtype float32"),
    "f32 to float16": _merge(*_pair(_of("F32")), words="--dtype float16"),
    "f32 to bfloat16": _merge(
        *_pair(_of("F32"), config={"model_type": "test", "torch_dtype": "float32"}),
        words="--dtype bfloat16",
    ),
    "bf16 to float32": _merge(
        *_pair(_of("BF16"), config={"model_type": "test"}), words="--dtype float32"
    ),
    "equal integers": _merge(*_pair(_WITH_INTEGERS)),
    "integers that differ": _merge(
        Model("a", _WITH_INTEGERS, integer_seed="a"), Model("b", _WITH_INTEGERS, integer_seed="b")
    ),
    "integers of other widths": _merge(
        Model("a", {"model.steps": ("I64", (6,)), "model.weight": ("F32", (3,))}),
        Model("b", {"model.steps": ("I32", (6,)), "model.weight": ("F32", (3,))}),
    ),
}

# --- Weights


def _many(num_models: int, dtype: str = "BF16") -> tuple[Model, ...]:
    return tuple(Model(seed, _of(dtype)) for seed in _SEEDS[:num_models])


WEIGHTS = {
    "halves": _merge(*_many(2), weights=(0.5, 0.5)),
    "thirds": _merge(*_many(3, "F32"), weights=(1, 1, 1), words="--normalize"),
    "negative": _merge(*_many(2, "F32"), weights=(1.5, -0.5)),
    "zero": _merge(*_many(2, "F32"), weights=(1, 0)),
    "zero first": _merge(*_many(2), weights=(0, 1)),
    "minus zero": _merge(*_many(2, "F32"), weights=(-0.0, 1)),
    "sum is not 1": _merge(*_many(2), weights=(0.9, 0.8), words="--allow-weight-sum"),
    "small": _merge(*_many(2, "F32"), weights=(1, 1e-30)),
    "not exact in float32": _merge(*_many(2, "F64"), weights=(0.1, 0.9)),
    "one model twice": _merge(*_many(1), *_many(1), weights=(0.3, 0.7)),
    "five models": _merge(*_many(5, "F16"), weights=(0.1, 0.3, 0.2, 0.25, 0.15)),
    "eight models": _merge(*_many(8), weights=(1, 2, 3, 4, 5, 6, 7, 8), words="--normalize"),
}

# --- Layouts

_NAMES = list(_SHAPES)


def _sharded(*shards: Sequence[str], stem: str = "model") -> Mapping[str, Sequence[str]]:
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


_BACKWARDS = dict(reversed(_of("F32").items()))
_THREE_SHARDS = _sharded(_NAMES[:2], _NAMES[2:7], _NAMES[7:])
_INTERLEAVED = _sharded(_NAMES[::2], _NAMES[1::2])
_MANY_SMALL: Tensors = {
    f"model.layers.{number}.{part}": (dtype, shape)
    for number in range(60)
    for part, dtype, shape in (
        ("norm.weight", "F32", (number % 5 + 1,)),
        ("mlp.weight", "BF16", (3, number % 7)),
        ("mlp.bias", "BF16", (3,)),
        ("scale", "F32", ()),
    )
}

LAYOUTS = {
    "tensors in other orders": _merge(Model("a", _of("F32")), Model("b", _BACKWARDS)),
    "one file with shards": _merge(
        Model("a", _of("F32")), Model("b", _of("F32"), files=_THREE_SHARDS)
    ),
    "shards with one file": _merge(
        Model("a", _of("BF16"), files=_THREE_SHARDS), Model("b", _of("BF16"))
    ),
    "shards of other kinds": _merge(
        Model("a", _of("F16"), files=_INTERLEAVED), Model("b", _of("F16"), files=_THREE_SHARDS)
    ),
    "split into small shards": _merge(*_pair(_of("F32")), words="--max-shard-size 1KB"),
    "split into middling shards": _merge(
        Model("a", _MIXED), Model("b", _MIXED), words="--max-shard-size 600"
    ),
    "shards put together": _merge(
        *_pair(_of("F32"), files=_THREE_SHARDS), words="--max-shard-size 1GB"
    ),
    "many small tensors": _merge(
        Model("a", _MANY_SMALL), Model("b", dict(reversed(_MANY_SMALL.items())))
    ),
    "all tensors empty but one": _merge(
        *_pair({"a": ("F32", (0,)), "b": ("BF16", (3, 0, 2)), "c": ("F16", ())})
    ),
    "files without a folder": _merge(*_pair(_of("BF16"), config=None), as_files=True),
    "weights of diffusers": _merge(
        *_pair(
            _of("F16"),
            config={"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"},
            files={"diffusion_pytorch_model.safetensors": _NAMES},
        )
    ),
    "metadata of a trainer": _merge(
        *_pair(_of("F32"), metadata={"title": "ü", "modelspec.hash_sha256": "0", "format": "pt"})
    ),
    "no metadata": _merge(*_pair(_of("F32"), metadata={})),
}

# --- Names, ties, configs

_E, _H = "model.embed_tokens.weight", "lm_head.weight"
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_BART = {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}
_MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
_BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 4}


def _matrices(*names: str, dtype: str = "F32") -> Tensors:
    return dict.fromkeys(names, (dtype, (6, 4)))


_EMBEDDING, _BOTH = _matrices(_E), _matrices(_E, _H)
_INNER = ("embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight")
_ENCODER = _matrices(*_INNER)
_EXPERTS = "model.layers.0.block_sparse_moe.experts"
_FUSED_EXPERTS = "model.layers.0.mlp.experts"
_APART = Model(
    "a",
    {
        f"{_EXPERTS}.{number}.{part}.weight": ("F32", shape)
        for number in range(2)
        for part, shape in (("w1", (3, 2)), ("w3", (3, 2)), ("w2", (2, 3)))
    },
    config=_MIXTRAL,
)
_FUSED = Model(
    "b",
    {
        f"{_FUSED_EXPERTS}.gate_up_proj": ("F32", (2, 6, 2)),
        f"{_FUSED_EXPERTS}.down_proj": ("F32", (2, 2, 3)),
    },
    config=_MIXTRAL,
)

NAMES = {
    "both tied": _merge(*_pair(_EMBEDDING, config=_LLAMA | _TIED)),
    "tied with the head stored": _merge(*_pair(_BOTH, config=_LLAMA | _TIED)),
    "tied with untied": _merge(
        Model("a", _EMBEDDING, config=_LLAMA | _TIED), Model("b", _BOTH, config=_LLAMA | _UNTIED)
    ),
    "untied with tied": _merge(
        Model("a", _BOTH, config=_LLAMA | _UNTIED), Model("b", _EMBEDDING, config=_LLAMA | _TIED)
    ),
    "one stores the tied head": _merge(
        Model("a", _EMBEDDING, config=_LLAMA | _TIED), Model("b", _BOTH, config=_LLAMA | _TIED)
    ),
    "three ties of an encoder-decoder": _merge(
        Model("a", _matrices("model.shared.weight"), config=_BART),
        Model(
            "b",
            _matrices(
                *("model.shared.weight", "model.encoder.embed_tokens.weight"),
                *("model.decoder.embed_tokens.weight", _H),
            ),
            config=_BART | _UNTIED,
        ),
    ),
    "prefix of the base model": _merge(
        Model("a", _ENCODER, config=_BERT),
        Model("b", _matrices(*(f"bert.{name}" for name in _INNER)), config=_BERT),
    ),
    "names of older versions": _merge(
        Model("a", _matrices(*_INNER, "embeddings.LayerNorm.weight"), config=_BERT),
        Model("b", _matrices(*_INNER, "embeddings.LayerNorm.gamma"), config=_BERT),
    ),
    "names of torch.compile": _merge(
        Model("a", _matrices(f"_orig_mod.{_E}", f"_orig_mod.{_H}"), config=_LLAMA),
        Model("b", _BOTH, config=_LLAMA),
    ),
    "experts apart with fused": _merge(_APART, _FUSED),
    "experts fused with apart": _merge(_FUSED, _APART),
    "config of a third model": _merge(
        *_pair(_BOTH, config=_LLAMA | _UNTIED),
        config_from=Model(
            "c", _BOTH, config=_LLAMA | _UNTIED | {"torch_dtype": "float16", "rope_theta": 10000.0}
        ),
    ),
    "configs that differ, allowed": _merge(
        Model("a", _BOTH, config=_LLAMA | _UNTIED | {"num_attention_heads": 2}),
        Model("b", _BOTH, config=_LLAMA | _UNTIED | {"num_attention_heads": 4}),
        words="--allow-differences num_attention_heads",
    ),
    "stale quantisation, allowed": _merge(
        *_pair(_BOTH, config=_LLAMA | {"quantization_config": {"quant_method": "gptq"}}),
        words="--allow-differences quantization_config",
    ),
}

# --- Encoders and their modules

_MODULE_KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
_DENSE: dict[str, Any] = {
    "files": {
        "model.safetensors": list(_ENCODER),
        "2_Dense/model.safetensors": ["linear.weight", "linear.bias"],
    },
    "others": {
        "modules.json": [
            {
                "idx": idx,
                "name": str(idx),
                "path": path,
                "type": f"sentence_transformers.models.{k}",
            }
            for idx, (path, k) in enumerate(_MODULE_KINDS.items())
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 4, "out_features": 3, "bias": True},
    },
    "config": _BERT,
}
_WITH_DENSE: Tensors = {**_ENCODER, "linear.weight": ("F32", (3, 4)), "linear.bias": ("F32", (3,))}

MODULES = {
    "bare encoder": _merge(*_pair(_ENCODER, config=_BERT), words="--model-type encoder"),
    "bare encoder, mean": _merge(
        *_pair(_ENCODER, config=_BERT), words="--model-type encoder --pooling mean"
    ),
    "module with weights": _merge(*_pair(_WITH_DENSE, **_DENSE)),
    "module with weights to float16": _merge(
        *_pair(_WITH_DENSE, **_DENSE), words="--dtype float16"
    ),
}

# --- Values that are no ordinary numbers

_SPECIAL_BITS = {
    # Of F32: infinity, -infinity, NaN, the largest, the least subnormal, -0.
    "F32": (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00000001, 0x80000000),
    "BF16": (0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0x0001, 0x8000),
    "F16": (0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0x0001, 0x8000),
}


def _with_specials(seed: str, dtype: str) -> Model:
    """Return a model of special values, among them pairs of every two in models "a" and "b"."""
    bits = _SPECIAL_BITS[dtype]
    count = len(bits)
    chosen = {at: bits[at // count if seed == "a" else at % count] for at in range(count * count)}
    return Model(seed, {"model.weight": (dtype, (20, 5))}, bits={"model.weight": chosen})


_LARGEST_F16 = {"model.weight": dict.fromkeys(range(5), 0x7BFF)}

SPECIAL = {
    **{
        f"special values of {dtype.lower()}": _merge(
            _with_specials("a", dtype), _with_specials("b", dtype)
        )
        for dtype in _SPECIAL_BITS
    },
    "sums that overflow": _merge(
        *_pair({"model.weight": ("F16", (5,))}, bits=_LARGEST_F16),
        weights=(1, 1),
        words="--allow-weight-sum",
    ),
}

# --- Large enough for several strips and leaves

_LARGE: Tensors = {
    "model.embed_tokens.weight": ("BF16", (1001, 1003)),
    "model.layers.0.mlp.weight": ("F32", (1301, 1009)),
    "model.layers.0.mlp.bias": ("F32", (1301,)),
    "model.layers.1.mlp.weight": ("F16", (1009, 701)),
    "model.position_ids": ("I64", (1, 20011)),
    "lm_head.weight": ("BF16", (1001, 1003)),
}
_LARGE_NAMES = list(_LARGE)
_NAN_LAST = {"lm_head.weight": {1001 * 1003 - 1: 0x7FC0}}

LARGE = {
    "large": _merge(
        Model("a", _LARGE),
        Model("b", _LARGE, files=_sharded(_LARGE_NAMES[2:], _LARGE_NAMES[:2])),
        Model("c", _LARGE),
        weights=(0.5, 0.3, 0.2),
    ),
    "large with a NaN at its end": _merge(*_pair(_LARGE, bits=_NAN_LAST)),
    "large in shards": _merge(
        *(
            replace(model, files=_sharded(_LARGE_NAMES[:2], _LARGE_NAMES[2:]))
            for model in _pair(_LARGE)
        ),
        words="--max-shard-size 3MB",
    ),
}

# --- A model that transformers loads


def _llama(width: int, hidden: int, num_tokens: int) -> tuple[Tensors, Mapping[str, Any]]:
    layer = "model.layers.0"
    attention = {f"{layer}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
    shapes = {
        "lm_head.weight": (num_tokens, width),
        "model.embed_tokens.weight": (num_tokens, width),
        f"{layer}.input_layernorm.weight": (width,),
        f"{layer}.mlp.down_proj.weight": (width, hidden),
        f"{layer}.mlp.gate_proj.weight": (hidden, width),
        f"{layer}.mlp.up_proj.weight": (hidden, width),
        f"{layer}.post_attention_layernorm.weight": (width,),
        **attention,
        "model.norm.weight": (width,),
    }
    config = {
        **_LLAMA,
        **_UNTIED,
        **{"hidden_size": width, "intermediate_size": hidden, "vocab_size": num_tokens},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
        "torch_dtype": "float32",
    }
    return {name: ("F32", shape) for name, shape in shapes.items()}, config


_LLAMA_TENSORS, _LLAMA_CONFIG = _llama(width=8, hidden=12, num_tokens=19)
LOADABLE = {
    "llama": _merge(*_pair(_LLAMA_TENSORS, config=_LLAMA_CONFIG), words="--model-type decoder")
}

_RAGGED_TENSORS, _RAGGED_CONFIG = _llama(width=136, hidden=300, num_tokens=19)
_QUANTISED = _pair(_RAGGED_TENSORS, config=_RAGGED_CONFIG)
QUANTISED = {
    "fp8 blocks": _merge(*_QUANTISED, words="--quantize fp8-blocks --dtype bfloat16"),
    "fp8 blocks in shards": _merge(
        *_QUANTISED, words="--quantize fp8-blocks --max-shard-size 100KB"
    ),
}

ARRANGEMENTS: Mapping[str, Arrangement] = {
    **DTYPES,
    **WEIGHTS,
    **LAYOUTS,
    **NAMES,
    **MODULES,
    **SPECIAL,
    **LARGE,
    **LOADABLE,
    **QUANTISED,
}
"""Name → merge."""
