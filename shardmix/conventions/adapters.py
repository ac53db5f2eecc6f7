"""Adapters such as LoRA: small weights that change a base model.

Known by the names of their tensors, and by the texts of a user, `BASE+ADAPTER` as in mergekit. A
model's output depends on the product of their matrices, and the mean of products is not the
product of means.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
"""Name of the config that makes a folder an adapter's."""
MOST_RANK = 1 << 16
"""The largest rank: beyond that of any matrix that is trained."""

ADAPTER_RULE = (
    "the mean of two adapters' matrices is not the mean of what they do to the model (mean B × "
    "mean A is not mean B·A)"
)
ADAPTER_REMEDY = "give each with its base model, as BASE+ADAPTER"

# Cheap to search in all names at once; the pattern then judges.
_HINTS = ("lora", "hada_w", "lokr_w", "ia3_l", "prompt_embeddings", "vera_", "oft_", "boft_")
_ADAPTER_TENSOR = re.compile(
    r"(^|\.)(?P<kind>"
    r"lora_(A|B|E|down|up|mid|embedding_A|embedding_B|magnitude_vector|bias)|"  # PEFT, kohya
    r"\w*lora\.(up|down)|lora_linear_layer\.(up|down)|"  # older diffusers
    r"hada_w\w+|hada_t\d|lokr_w\w+|lokr_t\d|"  # LyCORIS: LoHa, LoKr
    r"ia3_l|vera_(A|B|lambda_b|lambda_d)|"
    r"boft_(R|s)|oft_(r|R|s|blocks|diag)|vblora_\w+|randlora_\w+"
    r")(\.|$)"
)
_PROMPT = "prompt_embeddings"  # the only tensor that PEFT stores for a prompt or prefix
PEFT_PREFIX = "base_model.model."
"""Added by PEFT before every name of a model that it wraps."""
_BASE_ENDINGS = (".weight", ".base_layer.weight", ".linear.weight", ".original.weight")


def adapter_tensor(names: Collection[str]) -> str | None:
    """Return a tensor that only an adapter has, or None if the names are those of a model.

    A model may store adapters beside the weights that they change. These are its own parameters,
    unless PEFT wrapped the model.
    """
    stored: frozenset[str] = frozenset()
    for name, changed in _adapter_tensors(names):
        stored = stored or frozenset(names)
        has_base = any(f"{changed}{ending}" in stored for ending in _BASE_ENDINGS)
        if not has_base or name.startswith(PEFT_PREFIX):
            return name
    return None


def inner_adapter_tensor(names: Collection[str]) -> str | None:
    """Return the first tensor of an adapter, even within a whole model, or None."""
    return next((name for name, _ in _adapter_tensors(names)), None)


def is_of_adapter(name: str) -> bool:
    """Return True if a tensor is an adapter's, or was renamed by PEFT to add an adapter."""
    return (
        name.startswith(PEFT_PREFIX)
        or ".base_layer." in name
        or ".modules_to_save." in name
        or _ADAPTER_TENSOR.search(name) is not None
    )


def _adapter_tensors(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each tensor of an adapter, and the name of the layer that it changes."""
    text = "\n".join(names)
    if not any(hint in text for hint in _HINTS):
        return
    for name in names:
        match = _ADAPTER_TENSOR.search(name)
        if match is not None:
            yield name, name[: match.start()]
        elif name == _PROMPT:
            yield name, name


def divided(text: str) -> tuple[str, str | None]:
    """Return the model and the adapter that a text names; the adapter is None for a mere model.

    As in mergekit the last `+` divides them, unless all is an existing path. Of several, it is the
    last that an existing path follows.

    Example:
        >>> divided("org/base+org/math+org/code@main")
        ('org/base+org/math', 'org/code@main')
    """
    if "+" not in text or _exists(text):
        return text, None
    places = [at for at, letter in enumerate(text) if letter == "+"][::-1]
    at = next((at for at in places if text[at + 1 :] and _exists(text[at + 1 :])), places[0])
    return text[:at], text[at + 1 :]


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError):
        return False


def is_adapted(text: str) -> bool:
    """Return True if a text names a model with an adapter."""
    return divided(text)[1] is not None


def parts_of(text: str) -> list[str]:
    """Return the model and the adapters that a text names, in order."""
    base, adapter = divided(text)
    return [base] if adapter is None else [*parts_of(base), adapter]
