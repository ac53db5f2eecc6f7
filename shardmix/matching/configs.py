"""Differences between the configs of models, and whether an average over them makes sense.

Pure: configs in, differences out. One config may leave out a key that another writes because it is
its class's default, and versions of transformers have several names for one thing. Neither is a
difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardmix.conventions.class_defaults import ClassDefaults, class_defaults
from shardmix.conventions.config_keys import (
    COUNTS_OF_LAYERS,
    LEGACY_DEFAULTS,
    POSITION_KINDS,
    Meaning,
    meaning,
    same_function,
    same_model_type,
)
from shardmix.errors import printable
from shardmix.matching.config_labels import LABEL_KEYS, has_no_classifier, label_difference
from shardmix.matching.differences import Difference, same_number, shown_value

_NUM_LISTED = 6
_NUM_NAMED = 3

_THETA_KEYS = ("rope_theta", "global_rope_theta", "rotary_emb_base", "rotary_embedding_base")
_LOCAL_THETA_KEYS = ("rope_local_base_freq", "local_rope_theta")
_PARTIAL_KEYS = ("partial_rotary_factor", "rotary_pct", "rope_percent")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", *_THETA_KEYS, *_LOCAL_THETA_KEYS, *_PARTIAL_KEYS)
# Added to the flat form of a config that has any RoPE key, unless it has these.
_UNSCALED_ROPE = {"partial_rotary_factor": 1.0, "rope_type": "default"}
_WINDOW_KEYS = ("sliding_window", "max_window_layers")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_PATTERN_KEYS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "global_attn_every_n_layers",
)
_MOST_LAYERS = 10_000
_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_LAYER_KIND_NAMES = {"attention": "full_attention", "mamba": "linear_attention"}


@dataclass(frozen=True, slots=True)
class NamedConfig:
    """A model's config."""

    name: str
    """The user's name for the model."""
    content: Mapping[str, Any]
    """Content of its config.json."""


class _Unsaid:
    """The value of a key that a config leaves out, if its class has no default either."""


_UNSAID = _Unsaid()
_NOT_SAID = "not said"


def config_differences(configs: Sequence[NamedConfig], *, output: int = 0) -> list[Difference]:
    """Return the differences between configs: refused ones first, a list of minor ones last.

    `output` is the number of the config that the output takes.
    """
    told = [config for config in configs if config.content]
    if len(told) < 2 or all(config.content == told[0].content for config in told[1:]):
        return []
    comparison = _Comparison(
        names=[config.name for config in told],
        output=told.index(configs[output]) if configs[output].content else None,
    )
    comparison.compare([config.content for config in told], [None] * len(told), prefix="")
    return comparison.result()


class _Comparison:
    """Walks through configs part by part and gathers the differences."""

    def __init__(self, names: Sequence[str], output: int | None) -> None:
        self._names = names
        self._output = output
        self._found: list[Difference] = []
        self._found_paths: set[str] = set()
        self._listed: list[tuple[str, str]] = []
        self._has_classifier = True

    def compare(
        self, parts: Sequence[Mapping[str, Any]], types: Sequence[str | None], prefix: str
    ) -> None:
        """Compare one part of all configs; `types` are their model types if they state none."""
        if not prefix:
            self._has_classifier = not all(map(has_no_classifier, parts))
        # A part without a model type is a plain group of keys, of no class.
        classes = [_class(part, own) for part, own in zip(parts, types, strict=True)]
        parts = _with_parts(parts, classes)
        normal = [_normal(part, own) for part, own in zip(parts, classes, strict=True)]
        for key in dict.fromkeys(key for part in normal for key in part):
            is_part = any(isinstance(part.get(key), dict) for part in normal)
            if is_part and key not in LABEL_KEYS and meaning(key) is not Meaning.NOTHING:
                self._compare_nested(normal, classes, key, prefix)
            else:
                values = [
                    # The tensors define a number of layers that is left out, not the class.
                    part.get(key, _UNSAID) if key in COUNTS_OF_LAYERS else _value(part, key, own)
                    for part, own in zip(normal, classes, strict=True)
                ]
                is_known = any(own is None or key in own.fields for own in classes)
                self._judge(prefix, key, values, is_known=is_known)
        self._judge_labels(parts, prefix)
        self._judge_architectures(parts, prefix)

    def result(self) -> list[Difference]:
        """Return the differences, refused ones first; minor ones are listed in one."""
        found = sorted(self._found, key=lambda difference: not difference.is_refused)
        if self._listed:
            words = [f"{key} ({values})" for key, values in self._listed[:_NUM_LISTED]]
            more = len(self._listed) - _NUM_LISTED
            rest = f" and {more} more keys" if more > 0 else ""
            found.append(
                Difference(
                    key=self._listed[0][0],
                    other_keys=tuple(key for key, _ in self._listed[1:]),
                    finding=f"configs also differ in {', '.join(words)}{rest}",
                    consequence=(
                        ""
                        if self._output is None
                        else f"the output takes those of {self._names[self._output]}"
                    ),
                    is_refused=False,
                )
            )
        return found

    def _compare_nested(
        self,
        normal: Sequence[Mapping[str, Any]],
        classes: Sequence[ClassDefaults | None],
        key: str,
        prefix: str,
    ) -> None:
        parts = [part.get(key) for part in normal]
        if all(isinstance(part, dict) for part in parts):
            types = [None if own is None else own.parts.get(key) for own in classes]
            self.compare(parts, types, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif any(parts):
            # A missing part says nothing; the tensors show if a part of the model is missing.
            self._list(f"{prefix}{key}", [{} if part else _UNSAID for part in parts])

    def _judge(self, prefix: str, key: str, values: Sequence[object], *, is_known: bool) -> None:
        """Judge a key's values; `is_known`: a class may read the key."""
        path, kind = f"{prefix}{key}", meaning(key)
        if kind is Meaning.CLASSIFIER:
            is_known = True  # to every class, by the base of all
            kind = Meaning.COMPUTATION if self._has_classifier else Meaning.UNKNOWN
        if kind is Meaning.NOTHING or key == "architectures" or key in LABEL_KEYS:
            return
        said = [value for value in values if value is not _UNSAID]
        if key == "model_type":
            self._judge_model_type(path, values, is_nested=bool(prefix))
        elif all(_same(value, said[0]) for value in said[1:]):
            if len(said) == len(values) or all(_is_blank(value, key) for value in said):
                return
            if kind in (Meaning.COMPUTATION, Meaning.ACTIVATION) and is_known:
                self._tell(path, values, is_refused=False)
            elif kind is not Meaning.LAYER_KINDS and not self._is_of_told_rope(path):
                self._list(path, values)
        elif kind is Meaning.ACTIVATION and all(isinstance(value, str) for value in said):
            verdicts = {same_function(str(said[0]), str(value)) for value in said[1:]}
            if verdicts != {True}:
                self._tell(path, values, is_refused=False in verdicts)
        elif kind is Meaning.LAYER_KINDS:
            self._tell(path, values, is_refused=not all(map(_is_attention, said)))
        elif kind in (Meaning.COMPUTATION, Meaning.ACTIVATION):
            # null says no more than a missing key.
            stated = [value for value in said if value is not None]
            is_refused = not all(_same(value, stated[0]) for value in stated[1:])
            self._tell(path, values, is_refused=is_refused)
        elif kind is Meaning.TUNING and not (_is_optional(key) and None in said):
            self._tell(path, values, is_refused=False)
        else:
            self._list(path, values)

    def _is_of_told_rope(self, path: str) -> bool:
        """Return True if this parameter's kind of scaling already differs between models."""
        return f"{path.rpartition('.')[0]}.rope_type" in self._found_paths

    def _judge_model_type(self, path: str, values: Sequence[object], *, is_nested: bool) -> None:
        types = [value for value in values if isinstance(value, str)]
        if types:
            same = [same_model_type(types[0], other, is_nested=is_nested) for other in types[1:]]
            if not all(same):
                self._tell(path, values, is_refused=True)
            elif not is_nested and len(set(types)) > 1:
                self._tell(path, values, is_refused=False)

    def _judge_labels(self, parts: Sequence[Mapping[str, Any]], prefix: str) -> None:
        judged = label_difference(parts)
        if judged is not None:
            texts = [text or "none" for text in judged.texts]
            self._add(f"{prefix}{judged.key}", texts, judged.is_refused)

    def _judge_architectures(self, parts: Sequence[Mapping[str, Any]], prefix: str) -> None:
        tasks = {_task(part.get("architectures")) for part in parts} - {None}
        if len(tasks) > 1:
            names = [_shown(part.get("architectures")) for part in parts]
            # A second head beside a language model may be one that the tensors don't have.
            self._add(f"{prefix}architectures", names, len(tasks - {_LANGUAGE}) > 1)

    def _tell(self, path: str, values: Sequence[object], *, is_refused: bool) -> None:
        self._add(path, [_shown(value) for value in values], is_refused)

    def _add(self, path: str, texts: Sequence[str], is_refused: bool) -> None:
        finding = f"{printable(path)}: {self._by_text(texts)}"
        taken = ""
        if self._output is not None:
            text = texts[self._output]
            taken = "the output does not say" if text == _NOT_SAID else f"the output takes {text}"
        self._found.append(Difference(path, finding, taken, is_refused))
        self._found_paths.add(path)

    def _list(self, path: str, values: Sequence[object]) -> None:
        self._listed.append((path, self._by_text([_shown(value) for value in values])))

    def _by_text(self, texts: Sequence[str]) -> str:
        """Return each value with the models that have it: `2 in a and c, 4 in b`."""
        by_text: dict[str, list[str]] = {}
        for text, name in zip(texts, self._names, strict=True):
            by_text.setdefault(text, []).append(name)
        return ", ".join(f"{text} in {_and(names)}" for text, names in by_text.items())


def _class(part: Mapping[str, Any], expected: str | None) -> ClassDefaults | None:
    """Return the class of a part, by its own statement or else the expected one."""
    stated = part.get("model_type")
    if not isinstance(stated, str):
        stated = expected
    elif expected is not None and same_model_type(stated, expected, is_nested=True):
        stated = expected  # its own statement may be the whole model's
    return None if stated is None else class_defaults(stated)


def _normal(part: Mapping[str, Any], own: ClassDefaults | None) -> dict[str, Any]:
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
        normal |= {"sliding_window": None, "max_window_layers": _UNSAID}
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


def _with_parts(
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


def _value(part: Mapping[str, Any], key: str, own: ClassDefaults | None) -> object:
    """Return a key's value in a config, or the meaning of its absence."""
    if key in part and part[key] is _UNSAID:
        return _UNSAID
    value = part.get(key, _UNSAID)
    fields = own.fields if own is not None else {}
    if key in POSITION_KINDS and value == LEGACY_DEFAULTS[key] and "rope_parameters" in fields:
        return _UNSAID  # versions wrote the default whatever the class did
    if value is _UNSAID:
        value = fields.get(key, _legacy_default(key, own))
        if value is None and key in fields:
            # A default of None is often computed: layer_types, num_key_value_heads, ...
            value = None if _is_optional(key) or meaning(key) is Meaning.TUNING else _UNSAID
    if value is None or value is _UNSAID:
        value = _derived(part, key, fields, value)
    return value


def _legacy_default(key: str, own: ClassDefaults | None) -> object:
    """Return the meaning of a missing key that its class does not have."""
    if key in POSITION_KINDS and (own is None or "rope_parameters" in own.fields):
        return _UNSAID
    return LEGACY_DEFAULTS.get(key, _UNSAID)


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


def _is_optional(key: str) -> bool:
    """Return True if such a token, window or dropout is optional: None is a value."""
    return key.endswith(("token_id", "token_ids", "token_index", "dropout"))


def _is_attention(kinds: object) -> bool:
    return isinstance(kinds, list) and all(
        isinstance(kind, str) and kind in _ATTENTION_KINDS for kind in kinds
    )


_TASKS = (
    *("SequenceClassification", "TokenClassification", "MultipleChoice", "QuestionAnswering"),
    *("NextSentencePrediction", "ImageClassification", "AudioClassification", "CTC"),
)


_LANGUAGE = "CausalLM"
_OF_LANGUAGE = (_LANGUAGE, "LMHeadModel", "MaskedLM", "ConditionalGeneration")


def _task(architectures: object) -> str | None:
    """Return the task of a class's head, if its tensors could also be another task's."""
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    name = str(architectures[0])
    if name.endswith(_OF_LANGUAGE):
        return _LANGUAGE
    return next((task for task in _TASKS if name.endswith(f"For{task}")), None)


def _same(one: object, other: object) -> bool:
    if (_is_blank(one) and _is_blank(other)) or same_number(one, other):
        return True
    return one != one and other != other


def _is_blank(value: object, key: str = "") -> bool:
    """Return True if a value says no more than a missing key."""
    if value == _UNSCALED_ROPE.get(key.rpartition(".")[2], _UNSAID):
        return True
    return value is None or value is False or value in ("", [], {})


def _shown(value: object) -> str:
    if value is _UNSAID:
        return _NOT_SAID
    if value == {}:
        return "there"
    return shown_value(value)


def _and(names: Sequence[str]) -> str:
    shown = list(names[:_NUM_NAMED])
    if len(names) > _NUM_NAMED:
        shown.append(f"{len(names) - _NUM_NAMED} more")
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
