"""The files that make a bare encoder a sentence-transformers model, and its modules' configs.

They follow the layout that all versions of sentence-transformers read. Knows only names and
contents of files.
"""

from collections.abc import Mapping
from typing import Any

from shardmix.errors import RecipeError

MODULES_NAME = "modules.json"
MODEL_CONFIG_NAME = "config_sentence_transformers.json"
"""Settings of the whole model: prompts, and the comparison of vectors."""
TRANSFORMER_CONFIG_NAMES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Names of a Transformer module's settings for reading texts, by version and architecture."""

CLS = "cls"
"""The state of the first token: LM-Cocktail's way, and the default."""
POOLINGS = (CLS, "mean", "max", "mean_sqrt_len", "weightedmean", "lasttoken")
"""The ways to pool the states of a text's tokens into one vector."""
# Their names in configs: one key in the newest versions of sentence-transformers, else a switch
# each.
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
    """Raise `RecipeError` if this is no way to pool."""
    if pooling not in POOLINGS:
        raise RecipeError(f"must be one of {', '.join(POOLINGS)}", subject=f"pooling {pooling!r}")


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the pooling of a Pooling module: one of `POOLINGS`, or several, whose vectors are
    joined.

    The default is the mean, as in sentence-transformers. An unknown mode is returned by its own
    name.
    """
    modes = config.get("pooling_mode")
    if modes is None:
        switched = tuple(mode for key, mode in _SWITCHES.items() if config.get(key))
        return switched or ("mean",)
    names = {mode: name for name, mode in _MODES.items()}
    listed = modes if isinstance(modes, list | tuple) else (modes,)
    return tuple(names.get(str(mode), str(mode)) for mode in listed)


def pooling_config(config: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """Return a Pooling module's config with one of `POOLINGS`, in the config's own style."""
    changed = dict(config)
    if "pooling_mode" in config:
        return changed | {"pooling_mode": _MODES.get(pooling, pooling)}
    own = next(key for key, mode in _SWITCHES.items() if mode == pooling)
    switches = [key for key in _SWITCHES if key in config or key in (own, *_OLDEST_SWITCHES)]
    return changed | {key: key == own for key in switches}


def sentence_modules(config: Mapping[str, Any], pooling: str) -> dict[str, Any]:
    """Return path within the model's folder → content, of the module files for a model's config.

    They embed a text as its states, pooled in one of `POOLINGS` and normalised.
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


def moved_to_root(modules: list[Any], subfolder: str) -> list[Any]:
    """Return the content of a modules.json with one module moved to the model's own folder."""
    return [
        module | {"path": ""}
        if isinstance(module, dict) and module.get("path") == subfolder
        else module
        for module in modules
    ]
