"""What makes a bare encoder a sentence-transformers model: three small JSON files.

In the layout that all versions of sentence-transformers read: transformer, CLS pooling, normalise.
Knows no files but their names and contents.
"""

from typing import Any

MODULES_NAME = "modules.json"
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")


def sentence_modules(config: dict[str, Any]) -> dict[str, Any]:
    """Return the files to write, by path within the model's folder, for a model of this config.

    A text is embedded as the normalised state of its first token (CLS), as LM-Cocktail has it.
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
    pooling = {f"pooling_mode_{mode}": mode == "cls_token" for mode in _POOLING_MODES}
    return {
        MODULES_NAME: modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling},
        "2_Normalize/config.json": {},
    }
