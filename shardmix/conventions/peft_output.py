"""LoRA adapters as PEFT (0.21) loads them: names of tensors, and the content of the config.

An adapter's scaling is 1: its alpha is its rank, in the patterns as well. Source:
`peft/tuners/lora` and `peft/utils/save_and_load`. Writes no file.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from shardmix.conventions.declarations import Declaration, class_name
from shardmix.conventions.peft import (
    CONV1D_MODULES,
    CONV1D_TYPES,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA,
    A,
    B,
)
from shardmix.conventions.tensor_names import class_names, plain_ending

PREFIX = "base_model.model."
"""The start of every tensor's name."""
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
# Modules, by the last part of their names.
_EMBEDDING = re.compile(r"emb|^w[tp]e$|^shared$|^relative_attention_bias$|^lut$")
_EXPERTS = re.compile(r"(^|\.)experts\.[^.]+$")
_ROUTERS = frozenset({"gate", "router"})
_BARE_CLASS = re.compile(r"(?<!Head)(?<!Heads)Model$")
_HEAD = re.compile(r"(lm_head|score|classifier|qa_outputs|cls|pooler)\.")


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


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the types of a model and of its parts."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return frozenset(str(part["model_type"]) for part in parts if part.get("model_type"))


def is_transposed(module: str, types: Collection[str]) -> bool:
    """Return True if a linear layer stores its weight as (in, out)."""
    return not CONV1D_TYPES.isdisjoint(types) and module.rpartition(".")[2] in CONV1D_MODULES


def is_linear(name: str, shape: Sequence[int]) -> bool:
    """Return True if a parameter is the weight of a linear layer, by its name and shape.

    Embeddings are none, and routers of experts are modules of their own.
    """
    module, _, last = name.rpartition(".")
    own = module.rpartition(".")[2]
    is_other = own in _ROUTERS or _EMBEDDING.search(own) is not None
    return last == "weight" and len(shape) == 2 and bool(module) and not is_other


def adapted_names(
    names: Sequence[str], declaration: Declaration, config: Mapping[str, Any]
) -> Sequence[str]:
    """Return the names in the class that a config names, for those of a checkpoint.

    A base model's checkpoint lacks the prefix that its class with a head has.
    """
    found = class_names(names, declaration)
    prefix = f"{declaration.prefix}."
    is_bare = _BARE_CLASS.search(class_name(config) or "Model") is not None
    if not declaration.prefix or is_bare or any(name.startswith(prefix) for name in found):
        return found
    tied = [name for tie in declaration.ties for pair in tie.pairs for name in pair]
    if tied and not any(prefix in name for name in tied):
        return found  # of T5, for one, the base model is no part
    return [name if _HEAD.match(name) else prefix + name for name in found]


def stacked_names(names: Sequence[str], declaration: Declaration) -> frozenset[int]:
    """Return the indexes of parameters that the class holds in one piece with others.

    Experts that a checkpoint stores one by one are no modules in transformers 5; stacked ones are
    parameters.
    """
    endings = [
        re.escape(plain_ending(part)).replace(re.escape("*"), r"\d+")
        for renaming in declaration.renames
        if renaming.ops
        for part in renaming.sources
    ]
    pattern = re.compile(rf"(?:{'|'.join(endings)})$" if endings else "(?!)")
    return frozenset(
        index
        for index, name in enumerate(names)
        if pattern.search(name) or _EXPERTS.search(name) is not None
    )


def tied_names(
    names: Collection[str], declaration: Declaration, config: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return parameter → others that share its tensor and are not stored.

    PEFT gives each module that it replaces a copy of its own, so all of them must be replaced.
    """
    stored, found = set(names), dict[str, list[str]]()
    for tie in declaration.ties:
        start = f"{tie.at}." if tie.at else ""
        for pair in tie.pairs if tie.is_in_force(config) else ():
            for own, other in ((0, 1), (1, 0)):
                name, shared = start + pair[own], start + pair[other]
                if name in stored and shared not in stored:
                    found.setdefault(name, []).append(shared)
    return found


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
    saves_values: bool,
    is_tied: bool,
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
        saves_values: True if it sets parameters in place, such as biases.
        is_tied: True if it saves a parameter by the names of all that share it.
    """
    modules = [each.name for each in wrapped if not each.is_parameter]
    parameters = [each.name for each in wrapped if each.is_parameter]
    rank = Counter(each.rank for each in wrapped).most_common(1)[0][0]
    known = {each.name for each in wrapped}
    pattern = {_pattern(each.name, known): each.rank for each in wrapped if each.rank != rank}
    is_conv1d = any(is_transposed(name, model_types) for name in modules)
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
        "bias": "all" if saves_values else "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": is_conv1d and not parameters,
        "init_lora_weights": True,
        "target_modules": _short(modules, names),
        "target_parameters": parameters or None,
        **({"ensure_weight_tying": True} if is_tied else {}),
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
