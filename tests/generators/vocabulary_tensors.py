"""Print which parameters of transformers' classes have a row for each token: `conventions`' table.

    python -m tests.generators.vocabulary_tensors [--classes REGEX] > vocabulary_tensors.json

Each class is built on the meta device with its default config, and once more for each size of a
vocabulary in it, raised. Parameters whose first axis grows with it have a row for each token.
Takes about ten minutes. `tests/conventions/test_vocabulary_tensors.py` holds the file against the
installed version.
"""

import argparse
import contextlib
import gc
import json
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tests.generators.transformers_declarations import BACKBONE, BUILT_WITH, DEFAULTS, model_classes

MORE = 8
_SIZE = re.compile(r"vocab_?size")


def sizes(config: PretrainedConfig, before: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield the dotted key of each size of a vocabulary in a config, and the part that has it."""
    seen = set()
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            seen.add(key)
            yield from sizes(value, f"{before}{key}.")
    for key, value in config.to_dict().items():
        if key not in seen and _SIZE.search(key) and type(value) is int:
            yield before + key, config


def built(cls: type[PreTrainedModel], key: str, **chosen: int) -> tuple[PreTrainedModel, list[str]]:
    """Return a class's model, and the keys of sizes; the size at `key` is raised."""
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    for given in ({}, BACKBONE | {"backbone_config": backbone}):
        for changes in ({}, DEFAULTS):
            with contextlib.suppress(Exception):
                config = cls.config_class(**given, **chosen)
                for name, value in changes.items():
                    if getattr(config, name, None) is None:
                        setattr(config, name, value)
                found = dict(sizes(config))
                if key:
                    name = key.rpartition(".")[2]
                    setattr(found[key], name, getattr(found[key], name) + MORE)
                with torch.device("meta"):
                    return cls(config), list(found)
    raise LookupError(cls.__name__)


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter and buffer that a checkpoint may store, by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def declared(name: str, cls: type[PreTrainedModel]) -> dict[str, list[str]]:
    """Return key of a size → names of the parameters with as many rows."""
    chosen = BUILT_WITH.get(name, {})
    model, keys = built(cls, "", **chosen)
    if not keys:
        return {}
    before, config = shapes(model), model.config
    stated = {key: getattr(part, key.rpartition(".")[2]) for key, part in sizes(config)}
    found = {}
    for key in keys:
        try:
            after = shapes(built(cls, key, **chosen)[0])
        except LookupError:
            print(f"{name}: not built with another {key}", file=sys.stderr)
            continue
        names = []
        for tensor, shape in before.items():
            other = after.get(tensor, shape)
            if other == shape:
                continue
            grown = [
                at for at, pair in enumerate(zip(shape, other, strict=True)) if pair[1] != pair[0]
            ]
            is_plain = len(grown) == 1 and other[grown[0]] - shape[grown[0]] == MORE
            at = grown[0] if is_plain else -1
            if is_plain and shape[at] == stated.get(key) and all(n == 1 for n in shape[:at]):
                names.append(tensor)
            else:
                names.append(f"!{tensor}")
        if names:
            found[key] = names
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--classes", default=".*")
    pattern = re.compile(parser.parse_args().classes)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(json.dumps(table(pattern), indent=0, sort_keys=True))


def table(pattern: re.Pattern[str]) -> dict[str, Any]:
    """Return the table of all classes whose names match."""
    kinds: dict[str, int] = {}
    classes = {}
    for number, (name, cls) in enumerate(model_classes().items()):
        if not pattern.fullmatch(name):
            continue
        try:
            found = declared(name, cls)
        except LookupError:
            print(f"{name}: not built", file=sys.stderr)
            continue
        if found:
            encoded = json.dumps(found, sort_keys=True)
            classes[name] = kinds.setdefault(encoded, len(kinds))
        if number % 50 == 0:
            gc.collect()
            print(number, name, file=sys.stderr)
    return {
        "transformers": transformers.__version__,
        "kinds": [json.loads(kind) for kind in kinds],
        "classes": classes,
    }


if __name__ == "__main__":
    main()
