"""What makes a bare encoder a sentence-transformers model, and what its modules' configs mean.

In the layout that all versions of sentence-transformers read. Knows no files but their names and
contents.
"""

from collections.abc import Mapping
from typing import Any

from shardmix.errors import RecipeError

MODULES_NAME = "modules.json"
MODEL_CONFIG_NAME = "config_sentence_transformers.json"
"""What holds for the whole model: prompts, and how vectors are compared."""
TRANSFORMER_CONFIG_NAMES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Where a Transformer module says how it reads texts, by version and architecture."""

CLS = "cls"
"""The state of the first token: LM-Cocktail's way, taken if nothing else is said."""
POOLINGS = (CLS, "mean", "max", "mean_sqrt_len", "weightedmean", "lasttoken")
"""The ways in which the states of a text's tokens become one vector."""
# As configs name them: in the newest versions of sentence-transformers, and by a switch each.
_MODES = {"mean_sqrt_len": "mean_sqrt_len_tokens"}
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# These are in the configs of all versions that know switches.
_OLDEST_SWITCHES = tuple(_SWITCHES)[:4]


def check_pooling(pooling: object) -> None:
    """Raise `RecipeError` if there is no such way to pool."""
    if pooling not in POOLINGS:
        raise RecipeError(f"pooling {pooling!r}: must be one of {', '.join(POOLINGS)}")


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how a Pooling module pools: one of `POOLINGS`, or several, whose vectors are joined.

    Without a word it is the mean, as in sentence-transformers. A mode that is not known comes back
    as it is called.
    """
    modes = config.get("pooling_mode")
    if modes is None:
        switched = tuple(mode for key, mode in _SWITCHES.items() if config.get(key))
        return switched or ("mean",)
    names = {mode: name for name, mode in _MODES.items()}
    listed = modes if isinstance(modes, list | tuple) else (modes,)
    return tuple(names.get(str(mode), str(mode)) for mode in listed)


def pooling_config(config: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """Return a Pooling module's config that pools in one of `POOLINGS`, in its own style."""
    changed = dict(config)
    if "pooling_mode" in config:
        return changed | {"pooling_mode": _MODES.get(pooling, pooling)}
    own = next(key for key, mode in _SWITCHES.items() if mode == pooling)
    switches = [key for key in _SWITCHES if key in config or key in (own, *_OLDEST_SWITCHES)]
    return changed | {key: key == own for key in switches}


def sentence_modules(config: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """Return the files to write, by path within the model's folder, for a model of this config.

    A text is embedded as its normalised states, pooled in one of `POOLINGS`.
    """
    width = next(
        (config[key] for key in ("hidden_size", "d_model", "dim", "n_embd") if key in config), None
    )
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    return {
        MODULES_NAME: modules,
        "1_Pooling/config.json": pooling_config({"word_embedding_dimension": width}, pooling),
        "2_Normalize/config.json": {},
    }


def moved_to_root(modules: list[Any], place: str) -> list[Any]:
    """Return the content of a modules.json in which the module of a folder is the model's own."""
    return [
        module | {"path": ""}
        if isinstance(module, dict) and module.get("path") == place
        else module
        for module in modules
    ]
