"""Meanings of tensor names and config keys in transformers: ties, buffers, quantised weights.

Pure tables and rules. Names are matched by their endings, since the same module sits under
`model.`, `language_model.` or no prefix at all, by model and by version of transformers.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

TIE_KEY = "tie_word_embeddings"
"""The config's key that decides if parameters share a tensor."""
SCALE_KEY = "scale_decoder_outputs"
"""The config's key that decides if the input of the output head is scaled."""

DTYPE_KEYS = ("dtype", "torch_dtype")
"""The config's key for the dtype of the weights: since transformers 5, and the one before."""

# Output heads that share the input embedding if `tie_word_embeddings` is true, so that a
# checkpoint may leave them out ...
_TIED_HEAD_ENDINGS = (
    "lm_head.weight",
    "embed_out.weight",
    "lm_head.decoder.weight",
    "cls.predictions.decoder.weight",
    "predictions.decoder.weight",
)
_TIED_HEAD_NAMES = ("proj_out.weight", "output_projection.weight")  # elsewhere, inner layers
# ... copies of one embedding in encoder-decoder models, shared whatever the config says ...
_TIED_INPUT_ENDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_TIED_BIAS_ENDING = ".decoder.bias"
# ... and the tensors that they share, the likeliest first.
_TIE_SOURCE_ENDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "backbone.embeddings.weight",
)

# Buffers that transformers computes by itself and ignores in a checkpoint. Only old versions
# saved them, so their presence says nothing about the model.
_COMPUTED_BUFFER = re.compile(
    r"(^|\.)(position_ids|rotary_emb\.(original_)?inv_freq|h\.\d+\.attn\.(masked_)?bias|"
    r"attention\.(masked_)?bias)$"
)

# Last parts of the names of side tensors that reveal quantised storage. Such weights are codes:
# a weighted sum of codes is noise.
_QUANTISED_NAMES = frozenset(
    (
        *("qweight", "qzeros", "g_idx", "absmax", "quant_map", "SCB", "weight_packed"),
        *("weight_scale", "weight_scale_inv", "input_scale"),
    )
)
_QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
_UNQUANTISED = "merge the unquantised checkpoint that it was made from"
_OTHER_QUANTISATIONS = {
    **dict.fromkeys(
        ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        f"{_UNQUANTISED}, or what transformers' dequantize() and save_pretrained() write of it",
    ),
    **dict.fromkeys(
        ("gptq", "awq", "auto-round", "hqq", "quanto", "aqlm", "exl2", "exl3", "quark", "torchao"),
        f"{_UNQUANTISED}, and quantise the output again with the same tool",
    ),
}
_QUANTISED_PREFIX = "bitsandbytes__"
_QUANTISED_BYTE_ENDINGS = ("_blocks", "_scales")  # MXFP4; ordinary names unless they hold bytes


def is_computed_buffer(name: str) -> bool:
    """Return True if transformers computes this tensor itself and ignores it in a checkpoint."""
    return _COMPUTED_BUFFER.search(name) is not None


def is_tied_head(name: str) -> bool:
    """Return True if this is an output head; a checkpoint omits it if the config ties it."""
    return _has_ending(name, _TIED_HEAD_ENDINGS) or name in _TIED_HEAD_NAMES


def is_tied_input(name: str) -> bool:
    """Return True if this is a copy of an encoder-decoder model's shared embedding."""
    return _has_ending(name, _TIED_INPUT_ENDINGS)


def is_input_embedding(name: str) -> bool:
    """Return True if this has the name of a token embedding."""
    return is_tied_input(name) or _has_ending(name, _TIE_SOURCE_ENDINGS)


def has_vocabulary_axis(name: str) -> bool:
    """Return True if the first axis of this parameter counts the vocabulary."""
    return is_tied_head(name) or is_input_embedding(name)


def tie_sources(stored: Collection[str]) -> dict[str, str]:
    """Return parameter → stored tensor, for parameters that are tied by their names."""
    embedding = input_embedding(stored)
    next_one = input_embedding([name for name in stored if name != embedding])
    found = {}
    for name in stored:
        source = None
        if name.endswith(_TIED_BIAS_ENDING):
            bias = name.removesuffix(_TIED_BIAS_ENDING) + ".bias"
            source = bias if bias in stored else None
        elif is_tied_head(name) or is_tied_input(name):
            source = next_one if name == embedding else embedding
        if source is not None:
            found[name] = source
    return found


def input_embedding(stored: Collection[str]) -> str | None:
    """Return the stored tensor that is the model's input embedding by its name, or None."""
    for ending in _TIE_SOURCE_ENDINGS:
        candidates = [name for name in stored if _has_ending(name, (ending,))]
        if candidates:
            return min(candidates, key=len)
    return None


def marks_quantisation(ending: str, dtype: str) -> bool:
    """Return True if a tensor accompanies quantised weights, by the last part of its name."""
    if ending.endswith(_QUANTISED_BYTE_ENDINGS) and dtype == "U8":
        return True
    return ending in _QUANTISED_NAMES or ending.startswith(_QUANTISED_PREFIX)


def declared_quantisation(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the key by which a config declares a quantisation, dotted if nested, and its method.

    Returns None if it declares none.
    """
    for key, quantisation in _quantisations(config):
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        return key, str(method or "unknown method")
    return None


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first quantisation that a config declares: {} for none, None for no object."""
    for _, quantisation in _quantisations(config):
        return quantisation if isinstance(quantisation, dict) else None
    return {}


def _quantisations(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield key (dotted if nested) and value of each quantisation that a config declares."""
    parts = {"": config, **{f"{key}.": part for key, part in _nested_parts(config).items()}}
    for prefix, part in parts.items():
        for key in filter(part.get, _QUANTISATION_KEYS):
            yield f"{prefix}{key}", part[key]


def quantisation_remedy(method: str) -> str:
    """Return what to merge instead of a model whose quantisation is not decoded."""
    return _OTHER_QUANTISATIONS.get(method, _UNQUANTISED)


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, and the configs nested in it, without declarations of a quantisation."""
    bare = {key: value for key, value in config.items() if key not in _QUANTISATION_KEYS}
    nested = {key: without_quantisation(part) for key, part in _nested_parts(config).items()}
    return {**bare, **nested}


def ties_word_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Return the config's `tie_word_embeddings`, or None if it has none.

    The key of the whole model precedes that of its text part.
    """
    text = config.get("text_config")
    for part in (config, *([text] if isinstance(text, dict) else []), *config_parts(config)[1:]):
        value = part.get(TIE_KEY)
        if isinstance(value, bool):
            return value
    return None


def config_parts(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a config and the configs nested in it (`text_config`, `vision_config`, ...)."""
    return [dict(config), *_nested_parts(config).values()]


def _nested_parts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder"))
        if key not in (*_QUANTISATION_KEYS, "generation_config")
    }


def _has_ending(name: str, endings: tuple[str, ...]) -> bool:
    return name.endswith(endings) and any(name == e or name.endswith("." + e) for e in endings)
