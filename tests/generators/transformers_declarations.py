"""Print what transformers declares of its model classes: `conventions`' JSON table.

    python -m tests.generators.transformers_declarations [--classes REGEX] > table.json

Which parameters share one tensor, by which key of a config, and which names of a checkpoint are
read as which names of the class. Every class is built on the meta device, without weights, from its
default config, or from a small one if that fails; what a class declares for other configs as well
is asked of the class itself.
Takes about five minutes. `tests/test_declarations.py` holds the file against the installed version.
"""

import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import pkgutil
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import (
    GroupWeightRename,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from shardmix.conventions.tensor_names import without_numbers
from tests.support.small_configs import small_config

STATES = (None, True, False)
KEY = "tie_word_embeddings"
# Other keys that decide a tie, where a config class knows them.
OTHER_KEYS = ("tie_embedding", "tie_codebooks_embeddings")
SCALE_KEY = "scale_decoder_outputs"
# What some configs leave open although their models need it.
DEFAULTS = {"vocab_size": 64, "pad_token_id": 0, "num_key_value_heads": 4, "head_dim": 16}
DEFAULTS |= {"vocabulary_map": {"<image>": 1}, "prediction_length": 4}
# A backbone from transformers, for models whose default one is another library's.
BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
# Keys by which a class declares other ties; each combination is an entry of its own.
CHOICES = {
    "DeformableDetrForObjectDetection": ("with_box_refine", "two_stage"),
    "Deimv2ForObjectDetection": ("share_bbox_head",),
    "GroundingDinoForObjectDetection": ("decoder_bbox_embed_share",),
    "MMGroundingDinoForObjectDetection": ("decoder_bbox_embed_share", "decoder_cls_embed_share"),
    "MarianMTModel": ("share_encoder_decoder_embeddings",),
    "MarianModel": ("share_encoder_decoder_embeddings",),
}
# Values with which a class declares all that it ever does; other names do no harm.
BUILT_WITH = {"IdeficsForVisionText2Text": {"additional_vocab_size": 8}}
# Classes whose ties depend on a list in the config: transformers is asked for each model.
ASKED = ("Zamba2?(Model|ForCausalLM|ForSequenceClassification)",)
# Reads a tie's key in a forward pass, so that it decides more than the tie.
_IN_FORWARD = re.compile(rf"if self\.config\.{KEY}:\s*(#[^\n]*\s*)*\w+ = \w+ \*")
_PLAIN_NAME = re.compile(r"[\w.]+")
_REGEX_HEAD = re.compile(r"\^?((?:[\w]|\\?\.(?![*+?]))*)(.*)", re.DOTALL)


def model_classes() -> dict[str, type[PreTrainedModel]]:
    """Return every model class of transformers that a checkpoint can name, by name."""
    found = {}
    for folder in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        package = importlib.import_module(folder.name)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            if not module.name.startswith("modeling_"):
                continue
            with contextlib.suppress(ImportError):
                loaded = importlib.import_module(f"{folder.name}.{module.name}")
                for name, value in vars(loaded).items():
                    is_model = isinstance(value, type) and issubclass(value, PreTrainedModel)
                    if is_model and value.__module__ == loaded.__name__:
                        found[name] = value
    return {
        name: found[name]
        for name in sorted(found)
        if found[name].config_class is not None and not name.endswith("PreTrainedModel")
    }


def build(cls: type[PreTrainedModel], **chosen: int) -> PreTrainedModel | None:
    """Return a class's model without weights, or None if its default config gives none."""
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    for given in ({}, BACKBONE | {"backbone_config": backbone}):
        for changes in ({}, DEFAULTS):
            with contextlib.suppress(Exception):
                config = cls.config_class(**given, **chosen)
                for key, value in changes.items():
                    if getattr(config, key, None) is None:
                        setattr(config, key, value)
                with torch.device("meta"):
                    return cls(config)
    with contextlib.suppress(Exception), torch.device("meta"):
        return cls(small_config(cls, **chosen))
    return None


def ties(cls: type[PreTrainedModel], model: PreTrainedModel | None) -> list[dict[str, Any]]:
    """Return the declarations of a class and of the models in it: where, by which config, what."""
    found = []
    if model is None:
        for at, declared in (("", cls), (cls.base_model_prefix, base_class(cls))):
            keys = getattr(declared, "_tied_weights_keys", None)
            if isinstance(keys, dict) and keys:
                found.append({"at": at, "of": "", "pairs": normalised(keys)})
        return found
    for at, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, PreTrainedModel) or not module._tied_weights_keys:
            continue
        of = config_path(model.config, module.config)
        if of is None:
            continue
        pairs = normalised(module._tied_weights_keys)
        found.append({"at": at, "of": of, "pairs": pairs})
    return found


def base_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """Return the model without a head that a class is named after, or None."""
    stem, found, _ = cls.__name__.partition("For")
    return getattr(sys.modules[cls.__module__], f"{stem}Model", None) if found else None


def config_path(config: Any, part: Any) -> str | None:
    """Return the key of a part within a config: "" for itself, "text_config", "a.b"; or None."""
    if part is config:
        return ""
    for key, value in vars(config).items():
        if value is part:
            return key
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            inner = config_path(value, part)
            if inner is not None:
                return f"{key}.{inner}"
    # Some models copy their config for a part of them; the copy says the same.
    if type(part) is type(config):
        return ""
    for key, value in vars(config).items():
        if type(value) is type(part):
            return key
    return None


def normalised(declared: dict[str, str]) -> list[list[str]]:
    """Return pairs [target, source]; a target with a regex, marked by ~, stands for its beginning.

    What follows the match is the same in both names.
    """
    pairs = []
    for target, source in declared.items():
        target, source = target.removeprefix("^"), source.removeprefix("^").removesuffix("$")
        is_parameter = _PLAIN_NAME.fullmatch(target) and target.endswith(("weight", "bias"))
        if is_parameter and _PLAIN_NAME.fullmatch(source):
            pairs.append([target, source])
        elif _PLAIN_NAME.fullmatch(source):
            end = r"(?=\.|$)" if re.search(r"\w$|\+$|\)$", target) else ""
            pairs.append([f"~{target}{end}", source])
        else:
            head, rest = split(target)
            source_head, source_rest = split(source)
            if rest != source_rest:
                print(f"not understood: {target} <- {source}", file=sys.stderr)
                continue
            pairs.append([f"~{re.escape(head)}(?={rest})", source_head])
    return pairs


def split(pattern: str) -> tuple[str, str]:
    """Return the plain beginning of a regex, without its escapes, and the rest."""
    head, rest = _REGEX_HEAD.fullmatch(pattern).groups()  # type: ignore[union-attr]
    return head.replace("\\.", "."), rest


def flags(config_class: Any, of: str) -> dict[str, Any]:
    """Return when a tie is in force, by what config.json says at its top and in a nested config.

    Nine letters, T or F: for the top saying nothing, true, false, in each the nested one.
    """
    letters = ""
    nested = of or nested_key(config_class)
    for top in STATES:
        for inner in STATES:
            letters += "T" if effective(config_class, of, {KEY: top}, nested, inner) else "F"
    found: dict[str, Any] = {"tied": letters, "nested": nested}
    for key in OTHER_KEYS:
        said = [effective(config_class, of, {key: value}, nested, None) for value in (True, False)]
        if said == [True, False] and takes(config_class, key):
            found["key"] = key
    return found


def takes(config_class: Any, key: str) -> bool:
    """Tell whether a config class reads a key of another name for the tie."""
    return key in inspect.getsource(config_class)


def nested_key(config_class: Any) -> str:
    """Return the nested config that may say what the top leaves out; "" if there is none."""
    for key in ("text_config", "decoder", "thinker_config"):
        if key in getattr(config_class, "sub_configs", {}):
            return key
    return ""


def effective(
    config_class: Any, of: str, top: dict[str, Any], nested: str, inner: bool | None
) -> bool:
    """Return whether a tie is in force for what a config.json states."""
    content = config_class().to_dict()
    for key in (KEY, SCALE_KEY, *OTHER_KEYS):
        content.pop(key, None)
    content |= {key: value for key, value in top.items() if value is not None}
    part = content
    for key in filter(None, nested.split(".")):
        part = part.get(key) or {}
    if part is not content:
        part.pop(KEY, None)
        if inner is not None:
            part[KEY] = inner
    config = config_class.from_dict(content)
    for key in filter(None, of.split(".")):
        config = getattr(config, key)
    return bool(getattr(config, KEY, False))


def scaling(config_class: Any, source: str) -> str:
    """Return when a config scales what its head reads; "" for a class in which no tie decides it.

    Nine letters: for the tie's key saying nothing, true, false, in each the scale's own key.
    """
    if SCALE_KEY in source:
        letters = ""
        for tie in STATES:
            for scale in STATES:
                content = config_class().to_dict()
                said = {KEY: tie, SCALE_KEY: scale}
                for key, value in said.items():
                    content.pop(key, None)
                    if value is not None:
                        content[key] = value
                letters += "T" if getattr(config_class.from_dict(content), SCALE_KEY) else "F"
        return letters
    if _IN_FORWARD.search(source):
        values = [effective(config_class, "", {KEY: tie}, "", None) for tie in STATES]
        return "".join(("T" if value else "F") * 3 for value in values)
    return ""


def renames(model: PreTrainedModel | None, cls: type[PreTrainedModel]) -> list[dict[str, Any]]:
    """Return the renamings and conversions of a checkpoint's names, in order, without the legacy's.

    Each renaming as a regex with groups g0, g1, ... and what each is replaced by.
    """
    if model is not None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    else:
        model_type = cls.config_class.model_type
        conversions = get_checkpoint_conversion_mapping(cls.__name__)
        if conversions is None:
            conversions = get_checkpoint_conversion_mapping(model_type) or []
        base = base_class(cls)
        inner = get_checkpoint_conversion_mapping(base.__name__) if base is not None else None
        for conversion in inner or ():
            conversion.scope_prefix, conversion.base_model_prefix = "", cls.base_model_prefix
            conversions.append(conversion)
    return [entry for entry in map(rename, conversions) if entry]


def rename(conversion: Any) -> dict[str, Any]:
    """Return one renaming or conversion for the table."""
    entry: dict[str, Any] = {"re": conversion.compiled_sources.pattern}
    if conversion.scope_prefix is not None:
        entry["scope"] = conversion.scope_prefix
        entry["base"] = conversion.base_model_prefix
    if isinstance(conversion, WeightConverter):
        entry["ops"] = [
            [type(op).__name__, *(value for value in vars(op).values() if isinstance(value, int))]
            for op in conversion.operations
        ]
        entry["from"] = conversion.source_patterns
        entry["to"] = conversion.target_patterns
    elif type(conversion) is GroupWeightRename:
        entry["to"] = conversion.target_patterns
        entry["guarded"] = True
    elif type(conversion).rename_source_key is WeightRenaming.rename_source_key:
        entry["to"] = conversion.target_patterns[:1]
    else:
        entry["ops"] = [[type(conversion).__name__]]
        entry["from"], entry["to"] = [], []
    return entry


def own_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a class's parameters that its own renamings would change.

    transformers leaves them as they are if they are read from a file.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    names, stays = model.state_dict(), {}
    for name in sorted(names, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, names)
        stays.setdefault(without_numbers(name), []).append(renamed not in names)
    return sorted(name for name, found in stays.items() if all(found))


def declared(name: str, cls: type[PreTrainedModel]) -> dict[str, Any]:
    """Return all that is declared of a class."""
    model = build(cls, **BUILT_WITH.get(name, {}))
    if model is None:
        print(f"{name}: not built", file=sys.stderr)
    entry: dict[str, Any] = {"type": cls.config_class.model_type}
    if cls.base_model_prefix:
        entry["prefix"] = cls.base_model_prefix
    if any(re.fullmatch(pattern, name) for pattern in ASKED):
        return entry | {"asked": True}
    found = ties(cls, model)
    if name in CHOICES:
        found = []
        for values in itertools.product((True, False), repeat=len(CHOICES[name])):
            chosen = dict(zip(CHOICES[name], values, strict=True))
            built = build(cls, **chosen)
            if built is None:  # some values exclude one another
                continue
            defaults = {key: getattr(cls.config_class(), key) for key in chosen}
            when = [[key, value, value == defaults[key]] for key, value in chosen.items()]
            found += [tie | {"when": when} for tie in ties(cls, built)]
    for tie in found:
        try:
            tie |= flags(cls.config_class, tie["of"])
        except Exception as error:  # some configs refuse a tie
            print(f"{name}: {error!r}"[:150], file=sys.stderr)
            tie |= {"tied": "FFFTTTFFF", "nested": ""}
    if found:
        entry["ties"] = found
    if found:
        with contextlib.suppress(Exception):
            scale = scaling(cls.config_class, inspect.getsource(cls))
            entry |= {"scale": scale} if scale else {}
    renamed = renames(model, cls)
    if renamed:
        entry["renames"] = renamed
    own = [] if model is None else own_names(model)
    if own:
        entry["own"] = own
    return entry


def read_table(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return class name → what a table has of it; empty without a table."""
    if path is None:
        return {}
    content = json.loads(path.read_text())
    return {
        name: {
            key: [content["parts"][number] for number in value]
            if key in ("ties", "renames")
            else value
            for key, value in entry.items()
        }
        for name, entry in content["classes"].items()
    }


def main() -> None:
    """Print the table, one line a class."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", default="", help="a regex of class names")
    parser.add_argument("--update", type=Path, help="a table whose other classes stay")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    legacy = [rename(conversion) for conversion in get_checkpoint_conversion_mapping("legacy")]
    shared: dict[str, int] = {}
    lines = []
    old = read_table(arguments.update)
    for name, cls in model_classes().items():
        if not re.search(arguments.classes, name):
            if name not in old:
                continue
            entry = old[name]
        else:
            entry = declared(name, cls)
        for key in ("ties", "renames"):
            if key in entry:
                entry[key] = [
                    shared.setdefault(json.dumps(part, sort_keys=True), len(shared))
                    for part in entry[key]
                ]
        lines.append(f"{json.dumps(name)}: {json.dumps(entry, sort_keys=True)}")
    parts = ",\n".join(shared)
    classes = ",\n".join(lines)
    print(
        f'{{"transformers": {json.dumps(transformers.__version__)},\n'
        f'"legacy": {json.dumps(legacy)},\n"parts": [\n{parts}\n],\n"classes": {{\n{classes}\n}}}}'
    )


if __name__ == "__main__":
    main()
