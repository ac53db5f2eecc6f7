"""Contradictions between a config and the tensors beside it. Pure: names and shapes in.

A config that its tensors contradict would not load. A missing key says nothing, and tensors with
unknown names are not judged.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmix.conventions.class_defaults import class_defaults
from shardmix.conventions.naming import is_input_embedding

_VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size", "embedding_size", "n_words", "n_vocab")
_WIDTH_KEYS = (
    *("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "dim_model", "width"),
    *("embedding_size", "word_embed_proj_dim", "input_embedding_size", "emb_dim", "d_embed"),
    "embedding_dim",
)
_LAYER_KEYS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    *("decoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
_MORE_LAYERS_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
_HEADS_OF_OTHER_SHAPES = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "attn_output_gate")

_OWN_RULES = frozenset(
    (
        *("csm", "csm_depth_decoder_model", "dory", "hrm_text"),
        *("kyutai_speech_to_text", "mllama", "mllama_text_model", "molmo2", "molmo2_text"),
        *("moshi", "moshi_depth", "neomme", "pp_doclayout_v2"),
    )
)
"""Classes that add rows, embed in another width or count layers by rules of their own."""

# Tensors below the module with the embedding belong to its part of the model ...
_EMBEDDING_ENDING = re.compile(r"(?:embeddings\.)?\w+\.weight$")
# ... unless they are for pictures or sounds, or predict further tokens.
_OTHER_SENSES = re.compile(r"vision|visual|video|image|audio|speech|codec|tower|qformer|mtp\.")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|block)\.(\d+)\.")
_CLASSIFIERS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
_QUERIES = (".self_attn.q_proj.weight",)
_INNER = (".mlp.up_proj.weight", ".mlp.gate_proj.weight", ".intermediate.dense.weight")
_CLASSIFIES = re.compile(r"For(?:Sequence|Token|Image)Classification$")


@dataclass(frozen=True, slots=True)
class Misfit:
    """A statement of a config that tensors contradict."""

    key: str
    """The config's key, dotted if nested."""
    finding: str
    """A clause without the model's name: `vocab_size is 48, but wte.weight has 32 rows`."""
    is_certain: bool
    """True if it will not load; False if it may be intended."""


def config_misfits(
    config: Mapping[str, Any], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> list[Misfit]:
    """Return the statements of a config that a model's tensors contradict."""
    if not config:
        return []
    found = list(_head_misfits(config, names, shapes))
    embeddings = {
        name: shapes[row]
        for row, name in enumerate(names)
        if ("emb" in name or "wte" in name or "shared" in name) and is_input_embedding(name)
    }
    if len(set(embeddings.values())) != 1:
        return found  # none, or a model of several vocabularies
    name, shape = min(embeddings.items(), key=lambda item: len(item[0]))
    parts = [key for key, part in config.items() if isinstance(part, dict) and _has_words(part)]
    if len(shape) != 2 or len(parts) > 1:
        return found
    prefix = f"{parts[0]}." if parts else ""
    part = config[parts[0]] if parts else config
    if any(str(either.get("model_type")) in _OWN_RULES for either in (config, part)):
        return found
    module_prefix = _EMBEDDING_ENDING.sub("", name)
    found += _vocabulary_misfits(part, prefix, name, shape[0])
    found += _width_misfits(part, prefix, name, shape[1])
    found += _layer_misfits(part, prefix, names, module_prefix)
    found += _matrix_misfits(part, prefix, names, shapes, module_prefix)
    return found


def _has_words(part: Mapping[str, Any]) -> bool:
    """Return True if a part of a config describes a model of text."""
    return "vocab_size" in part or (
        isinstance(part.get("model_type"), str)
        and (own := class_defaults(part["model_type"])) is not None
        and "vocab_size" in own.fields
    )


def _integers(part: Mapping[str, Any], keys: Collection[str]) -> dict[str, int]:
    return {
        key: value
        for key in keys
        if isinstance(value := part.get(key), int) and not isinstance(value, bool)
    }


def _vocabulary_misfits(
    part: Mapping[str, Any], prefix: str, name: str, num_rows: int
) -> Iterator[Misfit]:
    stated = _integers(part, _VOCABULARY_KEYS)
    size = stated.get("vocab_size")
    if size is None or num_rows in stated.values():
        return
    finding = f"vocab_size is {size}, but {name} has {num_rows} rows"
    # Classes that we don't know may add rows by themselves.
    is_known = class_defaults(str(part.get("model_type"))) is not None
    yield Misfit(f"{prefix}vocab_size", finding, is_certain=is_known or num_rows < size)


def _width_misfits(part: Mapping[str, Any], prefix: str, name: str, width: int) -> Iterator[Misfit]:
    stated = _integers(part, _WIDTH_KEYS)
    if stated and width not in stated.values():
        key, value = next(iter(stated.items()))
        # A class may embed in another width than it works in, and say so only by a default.
        own = class_defaults(str(part.get("model_type")))
        defaults = own.fields if own is not None else {}
        silent = [other for other in _WIDTH_KEYS if other in defaults and other not in part]
        yield Misfit(
            f"{prefix}{key}",
            f"{key} is {value}, but {name} has {width} columns",
            is_certain=own is not None and not silent,
        )


def _layer_misfits(
    part: Mapping[str, Any], prefix: str, names: Sequence[str], module_prefix: str
) -> Iterator[Misfit]:
    stated = _integers(part, _LAYER_KEYS)
    if not stated:
        return
    more = sum(_integers(part, _MORE_LAYERS_KEYS).values())
    expected = {count + extra for count in stated.values() for extra in (0, more)}
    counts: dict[str, int] = {}
    layer = "\0"
    for name in names:
        # Names of one layer mostly follow one another: 90,000 experts are in few layers.
        if name.startswith(layer) or not name.startswith(module_prefix):
            continue
        match = _LAYER.search(name)
        if match is not None and not _OTHER_SENSES.search(name):
            layer, of = name[: match.end()], name[: match.start(1)]
            counts[of] = max(counts.get(of, 0), int(match[1][:9]) + 1)
    if not counts:
        return
    of, count = max(counts.items(), key=lambda item: item[1])
    if count not in expected:
        key, value = next(iter(stated.items()))
        yield Misfit(
            f"{prefix}{key}",
            f"{key} is {value}, but the tensors have {count} layers ({of}*)",
            is_certain=True,
        )


def _matrix_misfits(
    part: Mapping[str, Any],
    prefix: str,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    module_prefix: str,
) -> Iterator[Misfit]:
    """Compare one layer's matrices with heads and intermediate size."""
    query = _first(_QUERIES, names, shapes, module_prefix)
    sizes = {key: n for key, n in part.items() if isinstance(n, int) and not isinstance(n, bool)}
    heads, head_dim = sizes.get("num_attention_heads"), sizes.get("head_dim")
    is_plain = not any(part.get(key) for key in _HEADS_OF_OTHER_SHAPES)
    if query is not None and is_plain and heads is not None and head_dim is not None:
        name, shape = query
        if shape[0] not in (heads * head_dim, 2 * heads * head_dim):
            yield Misfit(
                f"{prefix}num_attention_heads",
                f"num_attention_heads × head_dim is {heads} × {head_dim}, but {name} has "
                f"{shape[0]} rows",
                is_certain=False,
            )
    matrix = _first(_INNER, names, shapes, module_prefix)
    stated = sizes.get("intermediate_size")
    others = [size for key, size in sizes.items() if "ffn" in key or "intermediate" in key]
    if matrix is not None and stated is not None and matrix[1][0] not in others:
        yield Misfit(
            f"{prefix}intermediate_size",
            f"intermediate_size is {stated}, but {matrix[0]} has {matrix[1][0]} rows",
            is_certain=True,
        )


def _head_misfits(
    config: Mapping[str, Any], names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> Iterator[Misfit]:
    """Compare the number of labels with the rows of a classifier."""
    architectures, labels = config.get("architectures"), config.get("id2label")
    if not (isinstance(architectures, list) and isinstance(labels, dict)):
        return
    if not any(_CLASSIFIES.search(str(name)) for name in architectures):
        return
    head = _first(_CLASSIFIERS, names, shapes)
    if head is not None and head[1][0] != len(labels):
        yield Misfit(
            "id2label",
            f"id2label has {len(labels)} labels, but {head[0]} has {head[1][0]} rows",
            is_certain=True,
        )


def _first(
    endings: tuple[str, ...],
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    module_prefix: str = "",
) -> tuple[str, tuple[int, ...]] | None:
    """Return the first matrix of that name in a part of a model."""
    for name, shape in zip(names, shapes, strict=True):
        is_of_it = name.endswith(endings) and name.startswith(module_prefix) and len(shape) == 2
        if is_of_it and not _OTHER_SENSES.search(name):
            return name, shape
    return None
