"""One spelling for configs of several versions of transformers, and of models with their own code.

One config may leave out a key that another writes because it is its class's default, and versions
of transformers have several names for one thing. Neither is a difference, so configs are brought
into this form before they are compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shardmix.conventions.class_defaults import ClassDefaults, class_defaults
from shardmix.conventions.config_keys import (
    LEGACY_DEFAULTS,
    POSITION_KINDS,
    Meaning,
    meaning,
    same_model_type,
)

_THETA_KEYS = ("rope_theta", "global_rope_theta", "rotary_emb_base", "rotary_embedding_base")
_LOCAL_THETA_KEYS = ("rope_local_base_freq", "local_rope_theta")
_PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct", "rope_percent")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", *_THETA_KEYS, *_LOCAL_THETA_KEYS, *_PARTIAL_KEYS)
# Added to the flat form of a config that has any RoPE key, unless it has these.
UNSCALED_ROPE = {"partial_rotary_factor": 1.0, "rope_type": "default"}
_WINDOW_KEYS = ("sliding_window", "max_window_layers")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_PATTERN_KEYS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "global_attn_every_n_layers",
)
_MOST_LAYERS = 10_000
_LAYER_KIND_NAMES = {"attention": "full_attention", "mamba": "linear_attention"}


class Unsaid:
    """The value of a key that a config leaves out, if its class has no default either."""


UNSAID = Unsaid()


def class_of(part: Mapping[str, Any], expected: str | None) -> ClassDefaults | None:
    """Return the class of a part, by its own statement or else the expected one."""
    stated = part.get("model_type")
    if not isinstance(stated, str):
        stated = expected
    elif expected is not None and same_model_type(stated, expected, is_nested=True):
        stated = expected  # its own statement may be the whole model's
    return None if stated is None else class_defaults(stated)


def normal_spelling(part: Mapping[str, Any], own: ClassDefaults | None) -> dict[str, Any]:
    """Return a part of a config by the keys that its class knows, RoPE as in transformers 5."""
    aliases = own.aliases if own is not None else {}
    normal = {aliases.get(key, key): value for key, value in part.items()}
    fields = own.fields if own is not None else {}
    has_rope = any(normal.get(key) is not None for key in _ROPE_KEYS)
    if has_rope or fields.get("rope_parameters"):
        rope = _rope(normal, fields.get("rope_parameters"))
        normal = {key: value for key, value in normal.items() if key not in _ROPE_KEYS}
        normal |= rope
    if normal.get("use_sliding_window", fields.get("use_sliding_window")) is False:
        # Its size is stated all the same, and nobody reads it.
        normal = {key: value for key, value in normal.items() if key not in _WINDOW_KEYS}
        normal |= {"sliding_window": None, "max_window_layers": UNSAID}
    for key in (*_KEY_VALUE_HEADS, "head_dim"):
        if key in normal and normal[key] == _derived(normal, key, fields, None):
            del normal[key]  # as if it were left out: the number of heads implies it
    if "hidden_activation" in fields and "hidden_act" not in fields and "hidden_act" in normal:
        normal.setdefault("hidden_activation", normal.pop("hidden_act"))  # Gemma's old name
        normal.pop("hidden_act", None)
    normal = _with_layer_kinds(_with_activation_of_scores(normal), fields)
    for key, value in normal.items():
        if key == "pos_att_type" and isinstance(value, str | list):
            names = value.lower().split("|") if isinstance(value, str) else map(str, value)
            normal[key] = sorted({name.strip() for name in names})  # older versions wrote a text
        elif isinstance(value, list) and meaning(key) is Meaning.LAYER_KINDS:
            kinds = [_LAYER_KIND_NAMES.get(kind, kind) for kind in map(str, value)]
            normal[key] = kinds
        elif isinstance(value, dict) and meaning(key) is Meaning.ACTIVATION:
            normal[key] = value.get("name", value)  # models with code of their own write it so
    return normal


def _with_layer_kinds(part: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part that states the kind of each layer; older versions stated a pattern."""
    pattern = _first(part, _PATTERN_KEYS)
    count = _number(part, fields, "num_hidden_layers")
    whole = {key: value for key, value in part.items() if key not in _PATTERN_KEYS}
    if whole.get("layer_types") is not None:
        return whole
    if not isinstance(pattern, int) or pattern < 1 or count is None or count > _MOST_LAYERS:
        return part
    is_first_full = str(part.get("model_type")).startswith("modernbert")
    whole["layer_types"] = [
        "sliding_attention" if number % pattern else "full_attention"
        for number in range(0 if is_first_full else 1, count + (0 if is_first_full else 1))
    ]
    return whole


def _with_activation_of_scores(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part with a cross-encoder's activation under the key of new versions."""
    settings = part.get("sentence_transformers")
    name = part.get("sbert_ce_default_activation_function")
    name = settings.get("activation_fn", name) if isinstance(settings, dict) else name
    whole = {k: v for k, v in part.items() if k != "sbert_ce_default_activation_function"}
    if isinstance(name, str):
        whole["sentence_transformers.activation_fn"] = name.rpartition(".")[2]
    return whole


def with_parts(
    parts: Sequence[Mapping[str, Any]], classes: Sequence[ClassDefaults | None]
) -> list[dict[str, Any]]:
    """Return parts of a config with nested parts if another config has them.

    Older versions wrote the keys of a text model beside the other parts. A part that is left out
    has its class's defaults.
    """
    nested = {key for part in parts for key, value in part.items() if isinstance(value, dict)}
    completed = []
    for part, own in zip(parts, classes, strict=True):
        whole = dict(part)
        for key, model_type in own.parts.items() if own is not None else ():
            if key not in nested or isinstance(whole.get(key), dict):
                continue
            below = class_defaults(model_type)
            fields = {*below.fields, *_ROPE_KEYS} if below is not None else set()
            there = own.fields if own is not None else {}
            moved = [field for field in whole if field in fields and field not in there]
            whole[key] = {field: whole.pop(field) for field in moved}
        completed.append(whole)
    return completed


def _rope(part: Mapping[str, Any], default: object) -> dict[str, Any]:
    """Return a config's statements on rotary embeddings, in flat keys.

    `rope_theta` and `partial_rotary_factor` have these names; any other KEY of `rope_parameters`
    (or `rope_scaling`) becomes `rope_parameters.KEY`, and for only one KIND of layer
    `rope_parameters.KIND.KEY`.
    """
    given = part.get("rope_parameters") or part.get("rope_scaling")
    stated = dict(given) if isinstance(given, dict) else {}
    known = default if isinstance(default, dict) else {}
    kinds = [key for key, value in {**known, **stated}.items() if isinstance(value, dict)]
    theta = _first(part, _THETA_KEYS)
    if not kinds:
        return _flat_rope(stated, known, theta, _first(part, _PARTIAL_KEYS), "")
    flat: dict[str, Any] = {}
    for kind in kinds:
        is_local = kind == "sliding_attention"
        own = stated.get(kind)
        if not isinstance(own, dict):
            # Statements of older versions hold for the layers with full attention.
            own = {} if is_local else {k: v for k, v in stated.items() if not isinstance(v, dict)}
        kind_theta = _first(part, _LOCAL_THETA_KEYS) if is_local else theta
        kind_known = known.get(kind)
        flat |= _flat_rope(
            own,
            kind_known if isinstance(kind_known, dict) else {},
            kind_theta,
            _first(part, _PARTIAL_KEYS),
            f"rope_parameters.{kind}.",
        )
    return flat


def _flat_rope(
    stated: Mapping[str, Any], known: Mapping[str, Any], theta: Any, partial: Any, prefix: str
) -> dict[str, Any]:
    merged = {key: value for key, value in stated.items() if key not in ("type", "rope_type")}
    kind = stated.get("rope_type") or stated.get("type") or known.get("rope_type") or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind) if isinstance(kind, str) else kind
    theta = merged.pop("rope_theta", None) or theta or known.get("rope_theta")
    partial = merged.pop("partial_rotary_factor", None) or partial
    partial = partial or known.get("partial_rotary_factor") or 1.0
    inner = prefix or "rope_parameters."
    flat = {f"{inner}{key}": value for key, value in merged.items()}
    if theta is not None:
        flat[f"{prefix}rope_theta"] = theta
    return {f"{inner}rope_type": kind, f"{prefix}partial_rotary_factor": partial, **flat}


def _first(part: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((part[key] for key in keys if part.get(key) is not None), None)


def value_of(part: Mapping[str, Any], key: str, own: ClassDefaults | None) -> object:
    """Return a key's value in a config, or the meaning of its absence."""
    if key in part and part[key] is UNSAID:
        return UNSAID
    value = part.get(key, UNSAID)
    fields = own.fields if own is not None else {}
    if key in POSITION_KINDS and value == LEGACY_DEFAULTS[key] and "rope_parameters" in fields:
        return UNSAID  # versions wrote the default whatever the class did
    if value is UNSAID:
        value = fields.get(key, _legacy_default(key, own))
        if value is None and key in fields:
            # A default of None is often computed: layer_types, num_key_value_heads, ...
            value = None if is_optional(key) or meaning(key) is Meaning.TUNING else UNSAID
    if value is None or value is UNSAID:
        value = _derived(part, key, fields, value)
    return value


def _legacy_default(key: str, own: ClassDefaults | None) -> object:
    """Return the meaning of a missing key that its class does not have."""
    if key in POSITION_KINDS and (own is None or "rope_parameters" in own.fields):
        return UNSAID
    return LEGACY_DEFAULTS.get(key, UNSAID)


def _derived(part: Mapping[str, Any], key: str, fields: Mapping[str, Any], value: object) -> object:
    heads = _number(part, fields, "num_attention_heads", "n_head", "num_heads", "n_heads")
    if heads is None:
        return value
    if key in _KEY_VALUE_HEADS:
        return heads
    width = _number(part, fields, "hidden_size", "n_embd", "d_model", "dim", "embed_dim")
    if key == "head_dim" and width is not None and heads > 0:
        return width // heads
    return value


def _number(part: Mapping[str, Any], fields: Mapping[str, Any], *keys: str) -> int | None:
    for source in (part, fields):
        for key in keys:
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def is_optional(key: str) -> bool:
    """Return True if such a token, window or dropout is optional: None is a value."""
    return key.endswith(("token_id", "token_ids", "token_index", "dropout"))
