"""Recipes of mergekit: recognised, and told in shardmix's words where it does the same.

Pure rules on parsed YAML; reads no files.
"""

import math
import shlex
from typing import Any

from shardmix.errors import RecipeError

_MARKS = ("merge_method", "slices", "modules", "tokenizer_source")
_DTYPES = ("float32", "float16", "bfloat16")
_SUM_TOLERANCE = 1e-3


def mergekit_error(content: object) -> RecipeError | None:
    """Return the error for parsed YAML that is a recipe of mergekit; None if it is none.

    It says what to do; the caller names the recipe.
    """
    if not isinstance(content, dict):
        return None
    models = content.get("models")
    entries = models if isinstance(models, list) else []
    has_models = bool(entries) and all(
        isinstance(entry, dict) and "model" in entry and "source" not in entry for entry in entries
    )
    if not has_models and not any(key in content for key in _MARKS):
        return None
    method = content.get("merge_method", "linear")
    if not isinstance(method, str) or method.lower() != "linear":
        return RecipeError(
            f"is a recipe of mergekit for its method {str(method)[:60]!r}; shardmix merges by "
            "weighted sums only (mergekit's linear)",
            remedy="run that recipe with mergekit",
        )
    command = _command(content, entries) if has_models else None
    if command is None:
        return RecipeError(
            "is a recipe of mergekit that is no plain weighted sum of whole models (slices, "
            "weights by layer, or adapters)",
            remedy="run that recipe with mergekit",
        )
    return RecipeError(
        "is a recipe of mergekit", remedy=f"the same merge by shardmix is: {command}"
    )


def _command(content: dict[Any, Any], entries: list[dict[Any, Any]]) -> str | None:
    """Return the command that merges as a linear recipe does; None if there is none."""
    shared = content.get("parameters")
    shared = shared if isinstance(shared, dict) else {}
    weights = []
    words = ["shardmix", "merge"]
    for entry in entries:
        own = entry.get("parameters")
        weight = (own if isinstance(own, dict) else {}).get("weight", shared.get("weight"))
        model = entry["model"]
        is_plain = isinstance(model, str) and "+" not in model
        if not is_plain or isinstance(weight, bool) or not isinstance(weight, int | float):
            return None
        weights.append(float(weight))
        words.append(f"{model}={weight}")
    if any(key in content for key in ("slices", "modules")):
        return None
    if abs(math.fsum(weights) - 1) > _SUM_TOLERANCE:
        words.append("--normalize" if shared.get("normalize", True) else "--allow-weight-sum")
    dtype = content.get("out_dtype") or content.get("dtype")
    if dtype in _DTYPES:
        words += ["--dtype", dtype]
    base = content.get("base_model")
    if isinstance(base, str) and base != entries[0]["model"]:
        words += ["--config-from", base]
    return f"{shlex.join(words)} -o OUT"
