"""LoRA adapters as PEFT (0.21) saves them: the config's meaning, and the names of tensors.

A module's weight W becomes W + scaling · B·A. Whatever else an adapter may ask for is supported
here by name, or refused by name: an adapter that is applied in part is a wrong model. Source:
`peft/tuners/lora` (`config`, `layer`, `model`) and `peft/utils/save_and_load`. Reads no file.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardmix.conventions.adapters import CONFIG_NAME, MOST_RANK
from shardmix.errors import SourceError, listed, shown

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
LORA = "LORA"

# Kinds of PEFT besides LoRA, by `peft_type`, as people call them.
_KINDS = {
    "ADALORA": "AdaLoRA",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "BOFT": "BOFT",
    "FOURIERFT": "FourierFT",
    "HRA": "HRA",
    "IA3": "IA³",
    "LN_TUNING": "tuned layer norms",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "OFT": "OFT",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning",
    "RANDLORA": "RandLoRA",
    "TRAINABLE_TOKENS": "trainable tokens without LoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "XLORA": "X-LoRA",
}
# Variants of LoRA whose effect is no W + scaling · B·A, by the config's key that asks for them.
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which acts only after some tokens",
    "arrow_config": "Arrow, which routes each token to other adapters",
    "kasa_config": "KaSA, which cuts the base's small singular values off",
    "layer_replication": "replicated layers, which the base's files do not have",
    "monteclora_config": "MonteCLoRA, which samples its matrices",
    "use_bdlora": "BD-LoRA, whose matrices are block-diagonal",
    "use_qalora": "QA-LoRA, which pools the input by groups",
}
# Initialisations that subtract B·A from the base's weights before the training.
_CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Keys that are of no consequence to merged values.
_WITHOUT_EFFECT = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
        *("eva_config", "exclude_modules", "inference_mode", "layers_pattern", "lora_ga_config"),
        *("layers_to_transform", "loftq_config", "lora_dropout", "megatron_config", "task_type"),
        *("megatron_core", "modules_to_save", "parent_library", "peft_version", "revision"),
        *("qalora_group_size", "runtime_config", "target_modules", "velora_config"),
    )
)
_READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("fan_in_fan_out", "use_dora", "lora_bias", "init_lora_weights", "target_parameters"),
        *("trainable_token_indices", *_VARIANTS),
    )
)

CONV1D_TYPES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
)
"""Types of models with layers whose weights are stored as (in, out) ..."""
CONV1D_MODULES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""... and the names of such layers."""
TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Types of models whose stacked experts are (experts, in, out); elsewhere (experts, out, in)."""
PARAMETER_ORDER = ("gate_up_proj", "down_proj")
"""Stacked experts in the order of their module. Of two parameters of one module that an adapter
changes, the first one's matrices are named after a `base_layer` more."""

_TASK_REMEDY = "merge it with PEFT's merge_and_unload() and give the model that this makes"
_MOST_PATTERNS = 100_000
_MOST_PATTERN_LENGTH = 1_000
_MOST_UNBOUNDED = 3
# A repetition within a repeated group makes a search take exponential time.
_NESTED = re.compile(r"[*+}][^()]*\)\s*[*+{?]|\)\s*[*+{][^()]*\)\s*[*+{]")

A, B, EMBEDDING_A, EMBEDDING_B = "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, BIAS, TOKENS, VALUE = "lora_magnitude_vector", "bias", "tokens", "value"

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)*(?:base_model\.model\.|base_model\.)?")
_PART = re.compile(
    r"^(?P<module>.*?)(?P<depth>(?:\.base_layer)*)\."
    r"(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?$"
)
_TOKENS = re.compile(r"^(?P<module>.*?)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.(?!weight$|bias$)[^.]+)?|original_module)(?=\.)")
_LEFT_OVER = re.compile(r"(^|\.)(lora_\w+|token_adapter)(\.|$)")


def weights_name(names: Collection[str]) -> str | None:
    """Return the file of an adapter's weights, by its files' names; None if it is no adapter."""
    found = next((name for name in (WEIGHTS_NAME, PICKLE_NAME) if name in names), None)
    return found if CONFIG_NAME in names else None


def no_adapter(names: Collection[str]) -> SourceError:
    """Return the error for a folder that is no adapter's, by its files' names."""
    if CONFIG_NAME not in names:
        what = "a model" if "config.json" in names else "not an adapter"
        return SourceError(
            f"is {what}: it has no {CONFIG_NAME}; after a `+` comes an adapter that PEFT saved",
            remedy="give its folder or Hub id",
        )
    return SourceError(
        f"has no {WEIGHTS_NAME}; the download may be incomplete", remedy="fetch it again"
    )


@dataclass(frozen=True, slots=True)
class Part:
    """The meaning of one of an adapter's tensors."""

    module: str
    """Dotted name of the module that it changes; of a value, of the parameter that it replaces."""
    kind: str
    """`A`, `B`, `EMBEDDING_A`, `EMBEDDING_B`, `MAGNITUDE`, `BIAS`, `TOKENS` or `VALUE`."""
    depth: int = 0
    """Number of `base_layer`s before the kind: of stacked parameters of one module, all but the
    last have some."""


def part_of(name: str) -> Part:
    """Return the meaning of a tensor by its name. Raises `SourceError` if it has none known.

    Example:
        >>> part_of("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
        Part(module='model.layers.0.mlp.up_proj', kind='lora_A', depth=0)
    """
    plain = _PREFIX.sub("", name, count=1)
    found = _PART.match(plain)
    if found is not None:
        kind, end = found["kind"], found["end"]
        if end == ".bias":
            kind = BIAS if kind == B else None
        if kind is not None:
            return Part(found["module"], kind, found["depth"].count("."))
    found = _TOKENS.match(plain)
    if found is not None:
        return Part(found["module"], TOKENS)
    if _LEFT_OVER.search(plain) is None:
        return Part(_SAVED.sub("", plain).replace(".base_layer.", "."), VALUE)
    raise SourceError(
        f"holds {shown(name)}, which is no part of a LoRA adapter that is known here",
        remedy=_TASK_REMEDY,
    )


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The content of adapter_config.json that decides values."""

    rank: int
    """Rank of modules without one of their own."""
    alpha: float
    """Numerator of their scaling."""
    is_rank_stabilised: bool
    """True for rsLoRA: the scaling is alpha/√rank, not alpha/rank."""
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    """Pattern of module names → rank; the first one that fits counts."""
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    """Pattern of module names → alpha."""
    fan_in_fan_out: bool
    """True if weights are stored as (in, out)."""
    has_magnitudes: bool
    """True for DoRA."""
    target_parameters: tuple[str, ...]
    """Endings of names of parameters, not modules, that it changes."""
    token_indices: Mapping[str, tuple[int, ...]]
    """Ending of an embedding's name → the rows that it replaces; "" for any embedding."""
    base_model: str
    """Name or path of the model that it was trained on; "" if it names none."""
    is_tied: bool = False
    """True if parameters that share a tensor do so with the adapter, which may hold copies."""
    task_type: str = ""
    """PEFT's name of the model's task; "" if it names none."""
    notes: tuple[str, ...] = ()
    """Warnings for the user."""

    def rank_of(self, name: str) -> int:
        """Return the rank for a module or a parameter by its dotted name."""
        return next((rank for pattern, rank in self.ranks if pattern.match(name)), self.rank)

    def scaling_of(self, name: str) -> float:
        """Return the factor of B·A, in double precision."""
        rank = self.rank_of(name)
        alpha = next((each for pattern, each in self.alphas if pattern.match(name)), self.alpha)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)


def lora_config(content: Mapping[str, Any]) -> LoraConfig:
    """Return the meaning of an adapter_config.json; raises `SourceError` if it is not supported."""
    kind = content.get("peft_type")
    if kind != LORA:
        raise _not_supported(_KINDS.get(kind, kind) if isinstance(kind, str) else shown(kind))
    for key, what in _VARIANTS.items():
        if content.get(key):
            raise _not_supported(f"{what} ({key})")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASES):
        raise SourceError(
            f"was trained on a base whose weights its initialisation changed ({shown(start)}), so "
            "that it does not fit the base's files",
            remedy="save it with save_pretrained(path_initial_model_for_weight_conversion=...), "
            "which makes a usual LoRA of it",
        )
    unknown = sorted(
        str(key) for key, value in content.items() if value and key not in _WITHOUT_EFFECT | _READ
    )
    rank = _rank(content.get("r", 8), "r")
    names = _texts(content.get("target_parameters"), "target_parameters")
    return LoraConfig(
        rank=rank,
        alpha=_number(content.get("lora_alpha", 8), "lora_alpha"),
        is_rank_stabilised=_flag(content, "use_rslora"),
        ranks=tuple(_patterns(content, "rank_pattern", _rank)),
        alphas=tuple(_patterns(content, "alpha_pattern", _number)),
        fan_in_fan_out=_flag(content, "fan_in_fan_out"),
        has_magnitudes=_flag(content, "use_dora"),
        target_parameters=names,
        token_indices=_token_indices(content.get("trainable_token_indices")),
        base_model=str(content.get("base_model_name_or_path") or ""),
        is_tied=_flag(content, "ensure_weight_tying"),
        task_type=str(content.get("task_type") or ""),
        notes=_notes(unknown),
    )


def _notes(unknown: list[str]) -> tuple[str, ...]:
    if not unknown:
        return ()
    names = listed([shown(key) for key in unknown])
    return (f"{CONFIG_NAME} has keys that are not known here, and have no effect: {names}",)


def _not_supported(what: str) -> SourceError:
    return SourceError(
        f"is an adapter of a kind that is not applied here: {what}; of PEFT's kinds only LoRA is",
        remedy=f"{_TASK_REMEDY}, if PEFT can",
    )


def _wrong(key: str, value: object, rule: str) -> SourceError:
    return SourceError(
        f"{CONFIG_NAME} says {key}: {shown(value)}; it must be {rule}", remedy="fetch it again"
    )


def _flag(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    if value not in (None, True, False):
        raise _wrong(key, value, "true or false")
    return bool(value)


def _rank(value: object, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MOST_RANK:
        raise _wrong(key, value, f"a whole number from 1 to {MOST_RANK}")
    return value


def _number(value: object, key: str) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < 1e30:  # type: ignore[arg-type]  # NaN is not less
        raise _wrong(key, value, "a finite number")
    return float(value)  # type: ignore[arg-type]


def _texts(value: object, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise _wrong(key, value, "a list of names")
    return tuple(value)


def _patterns(
    content: Mapping[str, Any], key: str, checked: Any
) -> Iterator[tuple[re.Pattern[str], Any]]:
    """Yield each pattern and its value. A pattern fits the end of a name, from a dot on."""
    patterns = content.get(key)
    if patterns is None:
        return
    if not isinstance(patterns, dict) or len(patterns) > _MOST_PATTERNS:
        raise _wrong(key, patterns, "a mapping of patterns")
    for text, value in patterns.items():
        unbounded = len(re.findall(r"(?<!\\)[*+]|,\}", text))
        if len(text) > _MOST_PATTERN_LENGTH or unbounded > _MOST_UNBOUNDED or _NESTED.search(text):
            raise _wrong(key, text, "a simple pattern, which takes no time to search for")
        try:
            pattern = re.compile(rf"(.*\.)?({text})$")
        except (re.error, OverflowError, RecursionError):
            raise _wrong(key, text, "a regular expression") from None
        yield pattern, checked(value, f"{key}[{shown(text)}]")


def _token_indices(value: object) -> dict[str, tuple[int, ...]]:
    key = "trainable_token_indices"
    if value is None:
        return {}
    by_name = {"": value} if isinstance(value, list) else value
    if not isinstance(by_name, dict):
        raise _wrong(key, value, "a list of rows, or a mapping of names to lists")
    for rows in by_name.values():
        are_rows = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if not are_rows or len(set(rows)) != len(rows):
            raise _wrong(key, rows, "a list of rows, each once")
    return {str(name): tuple(rows) for name, rows in by_name.items()}
