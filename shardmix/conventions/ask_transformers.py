"""A program that asks transformers of a class that our table does not know.

    python -m shardmix.conventions.ask_transformers CLASS FOLDER

Prints JSON: the parameters of the class that share a tensor, and the values of
`tie_word_embeddings` for which they do. Builds the model without weights, in a process of its own;
runs no code of the folder.
"""

import json
import resource
import sys
from typing import Any

import psutil

from shardmix.conventions.naming import TIE_KEY

_MOST_NBYTES = 4 << 30  # layers without weights; a stranger's config may ask for any number


def ties(name: str, folder: str) -> list[dict[str, Any]]:
    """Return the shared parameters of each model in a model: pairs, and nine letters T or F."""
    import transformers

    if name not in dir(transformers):  # transformers lists its names without loading their code
        raise TypeError(f"{name} is not in transformers")
    import torch

    held = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (held + _MOST_NBYTES, resource.RLIM_INFINITY))
    cls = getattr(transformers, name)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise TypeError(f"{name} is no model class")
    config_class = cls.config_class
    if config_class is None:
        raise TypeError(f"{name} names no config")
    found: dict[str, dict[str, Any]] = {}
    letters = []
    for value in (None, True, False):
        content, _ = transformers.PretrainedConfig.get_config_dict(folder)
        content.pop(TIE_KEY, None)
        if value is not None:
            content[TIE_KEY] = value
        with torch.device("meta"):
            model = cls(config_class.from_dict(content))
        letters.append(
            {
                at: bool(getattr(module.config, TIE_KEY, False))
                for at, module in model.named_modules()
                if isinstance(module, transformers.PreTrainedModel)
            }
        )
    for at, module in model.named_modules():
        if not isinstance(module, transformers.PreTrainedModel) or not module._tied_weights_keys:
            continue
        setattr(module.config, TIE_KEY, True)
        before = f"{at}." if at else ""
        pairs = module.get_expanded_tied_weights_keys(all_submodels=False).items()
        found[at] = {
            "pairs": [[before + target, before + source] for target, source in pairs],
            "tied": "".join(("T" if state[at] else "F") * 3 for state in letters),
        }
    return list(found.values())


if __name__ == "__main__":
    print(json.dumps(ties(*sys.argv[1:])))
