"""Differences between sentence-transformers modules: their chain, and the config of each.

Reads small files, and bytes of weights that cannot be merged; changes nothing.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmix.conventions.module_tree import Module, config_names, inner_path
from shardmix.conventions.sentence_modules import MODEL_CONFIG_NAME, MODULES_NAME, pooling_modes
from shardmix.conventions.weight_names import stored_weights
from shardmix.formats.strict_json import MAX_JSON_NBYTES, read_json
from shardmix.matching.differences import Difference, shown_value
from shardmix.matching.parts import match_parts
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import main_subfolder
from shardmix.system.files import refuse_link_outside, same_content

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz")

# Modules without weights may differ at the end of a chain: they change lengths, not angles.
_KINDS_AT_THE_END = ("Normalize", "Dropout")

# Keys of modules' configs over which no average makes sense, and their values if they are absent
# (None: unknown). "*" stands for all other keys.
_REFUSED: dict[str, dict[str, Any]] = {
    "Pooling": {"pooling_mode": "mean", "include_prompt": True},
    "Dense": {
        "activation_function": "Tanh",
        "bias": True,
        "use_residual": False,
        "module_input_name": "sentence_embedding",
        "module_output_name": None,
    },
    "Transformer": {"transformer_task": "feature-extraction"},
    "LSTM": {"bidirectional": True, "num_layers": 1},
    "CNN": {"kernel_sizes": None, "stride_sizes": None},
    "WeightedLayerPooling": {"layer_start": 4, "num_hidden_layers": 12},
    "SpladePooling": {"pooling_strategy": "max", "activation_function": "relu"},
    "SparseAutoEncoder": {"k": None, "normalize": False},
    "LogitScore": {"*": None},
    "WordEmbeddings": {"tokenizer_class": None},
    "WordWeights": {"*": None},
    "BoW": {"*": None},
}
# Other keys, never reported: shapes imply them, or they have no effect when a model is used.
_IGNORED = frozenset(
    {
        *("embedding_dimension", "word_embedding_dimension", "in_features", "out_features"),
        *("dimension", "dropout", "update_embeddings", "frozen", "dead_threshold", "k_aux"),
        *("__version__", "requirements"),
    }
)
_DEFAULTS: dict[str, Any] = {"do_lower_case": False, "default_prompt_name": None}
_SIMILARITIES = {"SparseEncoder": "dot", "MultiVectorEncoder": "maxsim"}
_LENGTH, _TOKENIZER_CONFIG = "max_seq_length", "tokenizer_config.json"
_NO_LENGTH = 10**9  # tokenizers without a bound name larger numbers
# The file that maps words to rows, beside weights that have a row for each.
_VOCABULARY_ENDING = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class ModularModel:
    """A model with modules: one that is merged, or one that gives the output its files."""

    name: str
    """The user's name for it."""
    root: Path
    """Its folder."""
    modules: tuple[Module, ...]
    """Its modules; empty for a bare model."""


def module_differences(
    sources: Sequence[Source],
    config_source: ModularModel | None = None,
    pooling: str | None = None,
) -> Iterator[Difference]:
    """Yield the differences of the models' modules; nothing if at most one model has modules.

    `config_source` gives the output its modules, if it is not a model of the merge; otherwise the
    first model with modules does. `pooling` is the output's pooling, which overrides the models'.
    """
    yield from _weights_of_some(sources)
    models = [ModularModel(each.text, each.root, each.modules) for each in sources]
    modular = [
        each for each in (*([config_source] if config_source else []), *models) if each.modules
    ]
    if not modular:
        return
    if config_source is not None:
        yield from _weights_of_config_source(config_source, sources)
    giver, *others = modular
    for other in others:
        yield from _compared(giver, other, pooling)
    merged = {module.subfolder for module in giver.modules if _has_merged_weights(giver, module)}
    told = {part.key for part in match_parts(sources).unmatched}
    yield from _unmerged_weights(giver, models, merged, told)


def _weights_of_some(sources: Sequence[Source]) -> Iterator[Difference]:
    """Find modules with weights that not every model has."""
    unmatched = {id(part) for part in match_parts(sources).unmatched}
    for source in sources:
        mine = [part for part in source.parts if id(part) in unmatched]
        if not mine:
            continue
        keys = {part.key for part in mine}
        others = [other for other in sources if not keys <= {part.key for part in other.parts}]
        pickled = [name for other in others for name in _pickled(other, keys)]
        names = ", ".join(other.text for other in others)
        lack = f"{names} has no such module, or none in it"
        if pickled:
            lack = (
                f"in {names} only a pickle ({pickled[0]}), so that they cannot be "
                "merged (load that model in sentence-transformers and save it: that writes "
                "safetensors)"
            )
        yield Difference(
            MODULES_NAME,
            f"{', '.join(f'{part.subfolder}/' for part in mine)}: holds weights in "
            f"{source.text}, and {lack}",
            "they are not merged",
            is_refused=True,
        )


def _pickled(source: Source, keys: Collection[str]) -> Iterator[str]:
    """Yield the files with weights of a model's modules that are not in safetensors."""
    for module in source.modules:
        if module.key in keys and module.subfolder:
            for name in _names_in(source.root, module.subfolder):
                if name.endswith(_WEIGHTS) and not name.endswith(".safetensors"):
                    yield inner_path(module.subfolder, name)


def _weights_of_config_source(
    config_source: ModularModel, sources: Sequence[Source]
) -> Iterator[Difference]:
    """Find modules of the config source whose weights no model has: they would not be a mean."""
    merged = {part.key for part in sources[0].parts}
    main = main_subfolder(config_source.root, config_source.modules)
    for module in config_source.modules:
        if module.subfolder in ("", main) or module.key in merged:
            continue
        if any(name.endswith(_WEIGHTS) for name in _names_in(config_source.root, module.subfolder)):
            yield Difference(
                MODULES_NAME,
                f"{module.subfolder}/: has weights in {config_source.name}, and "
                f"{sources[0].text} has no "
                "such module, or is only a file (then name its folder)",
                f"the output takes {config_source.name}'s",
                is_refused=True,
            )


def _compared(
    giver: ModularModel, other: ModularModel, pooling: str | None
) -> Iterator[Difference]:
    """Find the differences of two models' chains and modules."""
    yield from _chains(giver, other)
    yield from _model_configs(giver, other)
    theirs = {module.key: module for module in other.modules}
    for module in giver.modules:
        if module.key in theirs:
            yield from _module_configs(giver, module, other, theirs[module.key], pooling)


def _chains(giver: ModularModel, other: ModularModel) -> Iterator[Difference]:
    mine, theirs = ([module.key for module in each.modules] for each in (giver, other))
    if mine == theirs:
        return
    chains = [", ".join(module.kind for module in each.modules) for each in (giver, other)]
    yield Difference(
        MODULES_NAME,
        f"{MODULES_NAME}: {chains[0]} in {giver.name}, {chains[1]} in {other.name}",
        f"the output takes {giver.name}'s",
        is_refused=_without_end(giver) != _without_end(other),
    )


def _without_end(model: ModularModel) -> list[str]:
    modules = list(model.modules)
    while modules and modules[-1].kind in _KINDS_AT_THE_END:
        modules.pop()
    return [module.key for module in modules]


def _model_configs(giver: ModularModel, other: ModularModel) -> Iterator[Difference]:
    """Compare the settings of whole models: prompts, similarity."""
    configs = [_read(each.root, MODEL_CONFIG_NAME) for each in (giver, other)]
    if any(config is None for config in configs):
        return
    mine, theirs = (_model_config(config or {}) for config in configs)
    for key in sorted(mine.keys() | theirs.keys()):
        refused = {"model_type": None}
        yield from _value(MODEL_CONFIG_NAME, key, mine, theirs, giver, other, refused=refused)


def _model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in config.items() if value is not None}
    kind = str(config.get("model_type") or "SentenceTransformer")
    known.setdefault("similarity_fn_name", _SIMILARITIES.get(kind, "cosine"))
    prompts = config.get("prompts")
    if not isinstance(prompts, dict):
        prompts = {}
    known["prompts"] = {name: prompt for name, prompt in prompts.items() if prompt}
    return known


def _module_configs(
    giver: ModularModel, mine: Module, other: ModularModel, theirs: Module, pooling: str | None
) -> Iterator[Difference]:
    """Compare the configs of two models' corresponding modules."""
    if mine.kind == "WordEmbeddings":
        yield from _vocabularies(giver, mine, other, theirs)
    name = _first_of(giver.root, mine.subfolder, config_names(mine))
    other_name = _first_of(other.root, theirs.subfolder, config_names(theirs))
    if mine.kind == "Transformer" and name and other_name:
        yield from _lengths(giver, mine, name, other, theirs, other_name)
    if not (name and other_name) or _same_bytes(giver.root, name, other.root, other_name):
        return
    configs = _read(giver.root, name), _read(other.root, other_name)
    if configs[0] is None or configs[1] is None:
        yield _other_file(name, giver, other)
        return
    values = _module_config(mine, configs[0], pooling), _module_config(theirs, configs[1], pooling)
    refused = _REFUSED.get(mine.kind, {})
    for key in sorted(values[0].keys() | values[1].keys()):
        yield from _value(name, key, *values, giver, other, refused=refused)


def _lengths(
    giver: ModularModel, mine: Module, name: str, other: ModularModel, theirs: Module, its_name: str
) -> Iterator[Difference]:
    """Compare the longest text, which the module's config or the tokenizer's states."""
    values = []
    for model, module, config in ((giver, mine, name), (other, theirs, its_name)):
        length = (_read(model.root, config) or {}).get(_LENGTH)
        if length is None:
            tokenizer = _read(model.root, inner_path(module.subfolder, _TOKENIZER_CONFIG)) or {}
            length = tokenizer.get("model_max_length")
        is_length = isinstance(length, int) and 0 < length < _NO_LENGTH
        values.append({_LENGTH: length} if is_length else {})
    yield from _value(name, _LENGTH, values[0], values[1], giver, other, refused={})


def _vocabularies(
    giver: ModularModel, mine: Module, other: ModularModel, theirs: Module
) -> Iterator[Difference]:
    """Compare the words that rows of two models' embeddings stand for."""
    for name in _names_in(giver.root, mine.subfolder):
        inner, other_inner = inner_path(mine.subfolder, name), inner_path(theirs.subfolder, name)
        is_vocabulary = name.endswith(_VOCABULARY_ENDING)
        if is_vocabulary and not _same_bytes(giver.root, inner, other.root, other_inner):
            yield _other_file(inner, giver, other)


def _other_file(name: str, giver: ModularModel, other: ModularModel) -> Difference:
    return Difference(
        name,
        f"{name}: is another in {giver.name} than in {other.name}",
        f"the output takes {giver.name}'s",
        is_refused=True,
    )


def _module_config(
    module: Module, config: Mapping[str, Any], pooling: str | None
) -> dict[str, Any]:
    """Return a module's config with absent keys filled in and spellings unified."""
    if module.kind == "Router":
        parameters = config.get("parameters")
        return dict(parameters) if isinstance(parameters, dict) else {}
    refused = _REFUSED.get(module.kind, {})
    defaults = {key: value for key, value in refused.items() if value is not None}
    values = {**_DEFAULTS, **defaults, **config}
    if module.kind == "Pooling":
        modes = (pooling,) if pooling else pooling_modes(config)
        values = {key: value for key, value in values.items() if not key.startswith("pooling_mode")}
        values["pooling_mode"] = ", ".join(modes)
    if module.kind == "Transformer":
        values.pop(_LENGTH, None)  # judged separately
    if module.kind == "Transformer" and "transformer_task" not in config:
        masked = module.class_name.endswith("MLMTransformer")
        values["transformer_task"] = "fill-mask" if masked else "feature-extraction"
    if isinstance(values.get("activation_function"), str):
        values["activation_function"] = values["activation_function"].rpartition(".")[2]
    if module.kind == "Dense" and values.get("module_output_name") is None:
        values["module_output_name"] = values["module_input_name"]
    return values


def _value(
    file: str,
    key: str,
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    giver: ModularModel,
    other: ModularModel,
    *,
    refused: Mapping[str, Any],
) -> Iterator[Difference]:
    """Compare one value of a config; a key that only one has is no difference."""
    if key in _IGNORED or key not in mine or key not in theirs or mine[key] == theirs[key]:
        return
    values = [shown_value(each[key]) for each in (mine, theirs)]
    yield Difference(
        file,
        f"{file}: {key} is {values[0]} in {giver.name}, {values[1]} in {other.name}",
        f"the output takes {giver.name}'s",
        is_refused=key in refused or "*" in refused,
    )


def _first_of(root: Path, subfolder: str, names: Sequence[str]) -> str | None:
    """Return the first existing file of a module's folder, by path within the model's, or None."""
    for name in names:
        inner = inner_path(subfolder, name)
        if os.path.lexists(root / inner):
            return inner
    return None


def _read(root: Path, name: str) -> dict[str, Any] | None:
    """Read a JSON file; return None if it is missing, or too large to be a config."""
    path = root / name
    if not os.path.lexists(path):
        return None
    refuse_link_outside(root, path)
    if path.is_file() and path.stat().st_size > MAX_JSON_NBYTES:
        return None
    content: dict[str, Any] = read_json(path)
    return content


def _has_merged_weights(model: ModularModel, module: Module) -> bool:
    names = _names_in(model.root, module.subfolder)
    return stored_weights(names.__contains__) is not None


def _unmerged_weights(
    giver: ModularModel, models: Sequence[ModularModel], merged: set[str], told: set[str]
) -> Iterator[Difference]:
    """Find weights in modules that cannot be merged, unless they are the same everywhere.

    `merged` are the folders of modules that can be merged, `told` the keys of modules that not all
    models have.
    """
    for module in giver.modules:
        if not module.subfolder or module.subfolder in merged or module.key in told:
            continue
        for name in _names_in(giver.root, module.subfolder):
            if not name.endswith(_WEIGHTS):
                continue
            inner = inner_path(module.subfolder, name)
            others = [
                other.name
                for other in models
                if other.root != giver.root and not _has_same_file(giver, other, module, name)
            ]
            if others:
                yield Difference(
                    inner,
                    f"{inner}: is another in {giver.name} than in {', '.join(others)}, and no "
                    "model.safetensors, so that it cannot be merged (load each model in "
                    "sentence-transformers and save it: that writes one)",
                    f"the output takes {giver.name}'s",
                    is_refused=True,
                )


def _has_same_file(giver: ModularModel, other: ModularModel, module: Module, name: str) -> bool:
    """Return True if another model has the same bytes in a file of the corresponding module."""
    subfolder = next((each.subfolder for each in other.modules if each.key == module.key), None)
    if subfolder is None:
        return False
    return _same_bytes(
        giver.root, inner_path(module.subfolder, name), other.root, inner_path(subfolder, name)
    )


def _names_in(root: Path, subfolder: str) -> list[str]:
    refuse_link_outside(root, root / subfolder)
    try:
        return sorted(path.name for path in (root / subfolder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _same_bytes(root: Path, name: str, other_root: Path, other_name: str) -> bool:
    paths = root / name, other_root / other_name
    if not all(os.path.lexists(path) for path in paths):
        return False
    for folder, path in zip((root, other_root), paths, strict=True):
        refuse_link_outside(folder, path)
    return same_content(*paths)
