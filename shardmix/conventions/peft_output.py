"""LoRA adapters as PEFT (0.21) loads them: names of tensors, and the content of the config.

An adapter's scaling is 1: its alpha is its rank, in the patterns as well. Source:
`peft/tuners/lora` and `peft/utils/save_and_load`. Writes no file.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from shardmix.conventions.declarations import class_name
from shardmix.conventions.peft import (
    CONV1D_MODULES,
    CONV1D_TYPES,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA,
    A,
    B,
)

PREFIX = "base_model.model."
"""The start of every tensor's name."""
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)


class Wrapped(NamedTuple):
    """A module, or a parameter, that an adapter changes by matrices."""

    name: str
    """Its dotted name."""
    rank: int
    """The rank of its matrices."""
    is_parameter: bool = False
    """True if it is a parameter that is no module's weight, such as stacked experts."""


def matrix_names(module: str, *, is_embedding: bool = False, depth: int = 0) -> tuple[str, str]:
    """Return the names of A and B. `depth` is the number of `base_layer`s in them."""
    start = f"{PREFIX}{module}{'.base_layer' * depth}"
    if is_embedding:
        return f"{start}.{EMBEDDING_A}", f"{start}.{EMBEDDING_B}"
    return f"{start}.{A}.weight", f"{start}.{B}.weight"


def bias_name(module: str) -> str:
    """Return the name of what is added to a module's bias."""
    return f"{PREFIX}{module}.{B}.bias"


def value_name(parameter: str, wrapped: Collection[str]) -> str:
    """Return the name of a whole parameter; within a wrapped module it lies one level deeper."""
    module, _, last = parameter.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in wrapped else PREFIX + parameter


def task_of(config: Mapping[str, Any]) -> str:
    """Return PEFT's name of the task of a model's class, or "".

    Classifiers have none: PEFT would insist on a head among the adapter's tensors.
    """
    name = class_name(config) or ""
    return next((task for ending, task in _TASKS if name.endswith(ending)), "")


def config_content(
    wrapped: Sequence[Wrapped],
    *,
    saved: Sequence[str],
    names: Collection[str],
    base: str,
    revision: str | None,
    task_type: str,
    model_types: Collection[str],
    has_bias: bool,
    saves_biases: bool,
) -> dict[str, Any]:
    """Return the content of an adapter_config.json.

    Args:
        wrapped: all that has matrices.
        saved: modules that are replaced whole.
        names: names of the base's tensors.
        base: name or path of the base.
        revision: its commit on the Hub.
        task_type: PEFT's name of the model's task, or "".
        model_types: the base's model type, and those of its parts.
        has_bias: True if the adapter adds to the biases of all wrapped modules.
        saves_biases: True if whole biases are among its tensors.
    """
    modules = [each.name for each in wrapped if not each.is_parameter]
    parameters = [each.name for each in wrapped if each.is_parameter]
    rank = Counter(each.rank for each in wrapped).most_common(1)[0][0]
    known = {each.name for each in wrapped}
    pattern = {_pattern(each.name, known): each.rank for each in wrapped if each.rank != rank}
    is_conv1d = not CONV1D_TYPES.isdisjoint(model_types) and any(
        name.rpartition(".")[2] in CONV1D_MODULES for name in modules
    )
    return {
        "peft_type": LORA,
        "task_type": task_type or None,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "lora_bias": has_bias,
        "bias": "all" if saves_biases else "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": is_conv1d and not parameters,
        "init_lora_weights": True,
        "target_modules": _short(modules, names),
        "target_parameters": parameters or None,
        "modules_to_save": [_unambiguous(name, names) for name in saved] or None,
    }


def _pattern(name: str, known: Collection[str]) -> str:
    """Return a pattern that only this name fits; patterns fit the end of a name, from a dot on."""
    is_end = any(other.endswith(f".{name}") for other in known)
    return f"^{re.escape(name)}" if is_end else name


def _short(modules: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the last parts of modules' names if no other module has them, else whole names."""
    last = {module.rpartition(".")[2] for module in modules}
    count = sum(
        name.endswith(".weight") and name.split(".")[-2] in last for name in names if "." in name
    )
    is_exact = count == len(modules) and not any(part.isdecimal() for part in last)
    return sorted(last) if is_exact else sorted(modules)


def _unambiguous(module: str, names: Collection[str]) -> str:
    """Return a module's name such that no other module's name ends with it, as PEFT compares."""
    others = {name.rpartition(".")[0] for name in names} - {module}
    return PREFIX + module if any(name.endswith(module) for name in others) else module
