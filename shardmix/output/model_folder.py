"""All of an output folder but its weights: config, tokenizer, index, model card.

Copies files and writes small JSON and Markdown; reads no tensors.
"""

import codecs
import copy
import heapq
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
import yaml

from shardmix._version import __version__
from shardmix.conventions.adapters import CONFIG_NAME as ADAPTER_CONFIG_NAME
from shardmix.conventions.model_types import ENCODER
from shardmix.conventions.module_tree import inner_path
from shardmix.conventions.naming import DTYPE_KEYS, TIE_KEY, without_quantisation
from shardmix.conventions.output_quantisations import OUTPUT_QUANTISATIONS
from shardmix.conventions.sentence_modules import (
    CLS,
    MODULES_NAME,
    moved_to_root,
    pooling_config,
    sentence_modules,
)
from shardmix.conventions.token_ids import GENERATION_NAME
from shardmix.conventions.tokenizer_splices import Splice
from shardmix.conventions.weight_names import DIFFUSERS, index_name, stem_of
from shardmix.errors import printable, unreadable, writing_failed
from shardmix.formats.strict_json import read_json
from shardmix.matching.config_dtypes import with_dtypes
from shardmix.methods.registry import merge_method
from shardmix.output.counted_folder import CountedFile, CountedFolder
from shardmix.plan.low_rank import describe_low_rank
from shardmix.plan.merge_plan import MergePlan, ModuleConfig, OutputShard
from shardmix.recipe import Recipe
from shardmix.recipe.recipe import KEEP, plain_value
from shardmix.recipe.yaml_file import recipe_to_dict
from shardmix.sources.checkpoint import CONFIG_NAME
from shardmix.sources.identity import has_changed
from shardmix.system.files import open_regular
from shardmix.system.held_folder import HeldFolder

CARD_NAME = "README.md"
LOW_RANK_NAME = "low_rank.json"
"""Name of the report of an adapter's factors."""
_COPIED_AT_ONCE_NBYTES = 1 << 20
_LINES_AT_ONCE = 1000
_quoted = encode_basestring  # the same as json.dumps, five times as fast


OutputFolder = HeldFolder | CountedFolder
"""The folder that an output is written to, or one that only counts its size."""


def write_all_but_weights(plan: MergePlan, folder: OutputFolder) -> None:
    """Write all files of an output that do not depend on its weights."""
    write_auxiliary_files(plan, folder)
    if plan.adapter_config:
        with _writing(folder, ADAPTER_CONFIG_NAME) as file:
            file.write(plan.adapter_config)
    if plan.low_rank is not None:
        _write_json(folder, LOW_RANK_NAME, asdict(describe_low_rank(plan.low_rank)))
    write_model_card(plan, folder)
    write_index(plan, folder)


def write_auxiliary_files(plan: MergePlan, folder: OutputFolder) -> None:
    """Copy the config source's auxiliary files, with a config that is true of the output."""
    for name in plan.auxiliary_files:
        _copy(Path(plan.config_source_folder) / name, folder, name)
    if plan.vocabulary is not None:
        for name in plan.vocabulary.files:
            _write_tokenizer_file(plan, folder, name)
    main = ModuleConfig(plan.main_subfolder, plan.config_dtypes, plan.untied)
    for part in (main, *plan.module_configs):
        _adapt_config(plan, folder, part)
    _write_modules(plan, folder)


def _write_tokenizer_file(plan: MergePlan, folder: OutputFolder, name: str) -> None:
    """Copy a file of the tokenizer that rows were mapped to, with further tokens if it has some.

    Raises `SourceChangedError` if it is another than it was then.
    """
    vocabulary = plan.vocabulary
    assert vocabulary is not None
    path = Path(plan.tokenizer_folder) / name
    own = [splice for splice in vocabulary.splices if splice.name == name]
    digest = _copy(path, folder, inner_path(plan.main_subfolder, name), own)
    if digest not in (None, dict(vocabulary.digests)[name]):
        raise has_changed(path)


def _write_modules(plan: MergePlan, folder: OutputFolder) -> None:
    """Write the sentence-transformers modules that are not copied unchanged."""
    modules = plan.modules
    giver = Path(plan.modules_folder or plan.config_source_folder)
    main = f"{modules.main_subfolder}/" if modules.main_subfolder else ""
    for name in modules.files:
        _copy(giver / name, folder, name.removeprefix(main))
    if main and modules.files:
        content = read_json(giver / MODULES_NAME, expected=list)
        _write_json(folder, MODULES_NAME, moved_to_root(content, modules.main_subfolder))
    pooling = modules.pooling or CLS
    for name in modules.pooling_configs:
        _write_json(folder, name, pooling_config(read_json(giver / name), pooling))
    if CONFIG_NAME in plan.auxiliary_files and _needs_sentence_modules(plan):
        config = read_json(Path(plan.config_source_folder) / CONFIG_NAME)
        for name, content in sentence_modules(config, pooling).items():
            _write_json(folder, name, content)


def _adapt_config(plan: MergePlan, folder: OutputFolder, part: ModuleConfig) -> None:
    """Make the config of the output, or of one of its modules, true of the stored weights."""
    name = inner_path(part.subfolder, CONFIG_NAME)
    if name not in plan.auxiliary_files:
        return
    config = read_json(Path(plan.config_source_folder) / name)
    if part.subfolder and "model_type" not in config:
        return  # a module's arguments, not a config of transformers
    own = config
    if plan.vocabulary is not None:
        configs = dict(plan.vocabulary.configs)
        config = json.loads(configs[name]) if name in configs else config
        generation = inner_path(part.subfolder, GENERATION_NAME)
        if generation in configs:
            _write_json(folder, generation, json.loads(configs[generation]))
    dtypes = dict(part.dtypes)
    adapted = untied(with_dtypes(config, dtypes), part.untied)
    is_kept = plan.recipe.output_dtype == KEEP
    if not is_kept and "" in dtypes and not any(map(adapted.get, DTYPE_KEYS)):
        adapted["torch_dtype"] = dtypes[""]  # transformers 5 reads the old key as well
    # Weights were decoded; or the key is stale, which was refused unless it is allowed.
    adapted = without_quantisation(adapted)
    quantised = plan.quantised
    if quantised is not None and part.subfolder == plan.main_subfolder:
        quantisation = OUTPUT_QUANTISATIONS[quantised.quantisation]
        adapted["quantization_config"] = quantisation.config(quantised.unconverted)
    # If nothing changes, the config source's file stays as it is, byte for byte.
    if adapted != own:
        _write_json(folder, name, adapted)


def write_index(plan: MergePlan, folder: OutputFolder) -> None:
    """Write an index, as huggingface_hub lays it out, in each folder with several shards."""
    for subfolder in dict.fromkeys(shard.subfolder for shard in plan.shards):
        shards = [shard for shard in plan.shards if shard.subfolder == subfolder]
        if len(shards) > 1:
            name = index_name(stem_of(Path(shards[0].filename).name))
            _write_index(shards, folder, inner_path(subfolder, name))


def _write_index(shards: Sequence[OutputShard], folder: OutputFolder, name: str) -> None:
    data_nbytes = sum(shard.file_nbytes - shard.head_nbytes() for shard in shards)
    # Merged, not sorted: pairs of a million names take memory that no plan counts.
    by_shard = (
        zip(
            sorted(shard.tensor_names),
            itertools.repeat(json.dumps(Path(shard.filename).name)),
            strict=False,
        )
        for shard in shards
    )
    lines = (f"\n    {_quoted(name)}: {filename}" for name, filename in heapq.merge(*by_shard))
    with _writing(folder, name) as file:
        # In pieces: as one text, the index of 90,000 tensors takes 17 MiB that no plan counts.
        file.write(f'{{\n  "metadata": {{"total_size": {data_nbytes}}},\n  "weight_map": {{')
        comma = ""
        while piece := ",".join(itertools.islice(lines, _LINES_AT_ONCE)):
            file.write(comma + piece)
            comma = ","
        file.write("\n  }\n}\n")


def write_model_card(plan: MergePlan, folder: OutputFolder) -> None:
    """Write the model card: the models, their weights, and the recipe to repeat the merge."""
    # As huggingface_hub's ModelCard would, whose import takes longer than planning a 70B merge.
    ids = list(dict.fromkeys(_model_ids(plan)))
    data = {
        "base_model": ids[:1] if plan.adapter_config else ids,
        "base_model_relation": "adapter" if plan.adapter_config else "merge",
        "library_name": _library_name(plan),
        "tags": ["merge", "shardmix"],
    }
    known = {key: value for key, value in data.items() if value}
    front_matter = yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=math.inf)
    with _writing(folder, CARD_NAME) as file:
        file.write(f"---\n{front_matter}---\n\n{_card_text(plan)}")


def untied(config: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """Return a config in which some parts declare no tied parameters; "" is its top."""
    changed = copy.deepcopy(config) if parts else config
    for path in parts:
        part = changed
        for key in filter(None, path.split(".")):
            part = part.setdefault(key, {})
        part[TIE_KEY] = False
    return changed


def _model_ids(plan: MergePlan) -> list[str]:
    """Return the names that the Hub links a merge to: ids without revision, or else plain names."""
    return [source.identity.hub_id or printable(source.name) for source in plan.sources]


def _needs_sentence_modules(plan: MergePlan) -> bool:
    return plan.recipe.model_type == ENCODER and not _has_modules(plan)


def _has_modules(plan: MergePlan) -> bool:
    return MODULES_NAME in plan.auxiliary_files or MODULES_NAME in plan.modules.files


def _library_name(plan: MergePlan) -> str | None:
    if plan.adapter_config:
        return "peft"
    if stem_of(plan.shards[0].filename) == DIFFUSERS:
        return "diffusers"
    if _has_modules(plan) or _needs_sentence_modules(plan):
        return "sentence-transformers"
    return "transformers" if CONFIG_NAME in plan.auxiliary_files else None


def _card_text(plan: MergePlan) -> str:
    title = printable(Path(plan.output).name)
    method = merge_method(plan.recipe.merge_method)
    # By public name: a card travels, and a machine's paths are private.
    public = plan.public_recipe
    recipe = public.with_sources(
        list(map(printable, public.sources)),
        config_from=None if public.config_from is None else printable(public.config_from),
    )
    text = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True)
    config_source = _as_code(plan.config_source_name)
    paper = f" ([{method.reference}]({method.reference}))" if method.reference else ""
    by = f"[shardmix](https://pypi.org/project/shardmix/) {__version__}"
    what = f"""A merge of {plan.num_models} models by {by},
by the method `{method.name}`{paper}: {method.summary}. Computed in float32, and rounded once to the
output's dtype."""
    beside = (
        f"Config, tokenizer and the other files beside the weights are those of {config_source}."
    )
    if plan.vocabulary is not None:
        more = " with further tokens" if plan.vocabulary.splices else ""
        beside = (
            f"The tokenizer is that of {_as_code(plan.vocabulary.giver)}{more}, to whose tokens "
            "all rows were mapped; the other files beside the weights are those of "
            f"{config_source}."
        )
    if plan.adapter_config:
        what = f"""A LoRA adapter on {config_source}, written by {by}. It adds the weighted sum of
what each of these models changed in its base{paper}."""
        if plan.low_rank is not None:
            error = describe_low_rank(plan.low_rank).relative_error
            what += f"""
It is an approximation: the relative error of its factors is {error:.3g} in all, and
`{LOW_RANK_NAME}` has that of each."""
        beside = f"Load it with PEFT on {config_source}."
    return f"""# {title}

{what}

{_model_table(public)}

{beside}

## Recipe

```yaml
{text.rstrip()}
```
"""


def _model_table(recipe: Recipe) -> str:
    """Return a table of the models, with the parameters that each has of its own."""
    own = {setting.name: None for model in recipe.models for setting in model.parameters}
    rows = [["", "model", *own], ["---"] * (2 + len(own))]
    names = iter(recipe.sources)
    if recipe.base_model is not None:
        rows.append(["base", _as_code(next(names)), *[""] * len(own)])
    for number, (name, model) in enumerate(zip(names, recipe.models, strict=True), start=1):
        values = {each.name: repr(plain_value(each)) for each in model.parameters}
        cells = [_as_code(values[each]) if each in values else "" for each in own]
        rows.append([str(number), _as_code(name), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _as_code(name: str) -> str:
    """Return a name as Markdown code that stays within its cell of a table."""
    plain = printable(name).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def _copy(
    source: Path, folder: OutputFolder, name: str, splices: Sequence[Splice] = ()
) -> str | None:
    """Copy a file's bytes into the output, with texts put in; return the XXH3 of the file's own.

    Returns None if sizes are only counted.
    """
    try:
        original = open_regular(source)
    except OSError as error:
        raise unreadable(source, error) from None
    with original, _creating(folder, name) as file:
        if isinstance(file, CountedFile):
            more = sum(len(splice.text.encode()) for splice in splices)
            file.count(os.fstat(original.fileno()).st_size + more)
            return None
        hasher, position = xxhash.xxh3_128(), 0
        ends = [*(splice.offset for splice in splices), None]
        for number, end in enumerate(ends):
            while end is None or position < end:
                wanted = _COPIED_AT_ONCE_NBYTES
                try:
                    data = original.read(wanted if end is None else min(wanted, end - position))
                except OSError as error:
                    raise unreadable(source, error) from None
                if not data:
                    break
                hasher.update(data)
                file.write(data)
                position += len(data)
            if end is not None:
                file.write(splices[number].text.encode())
        return hasher.hexdigest()


def _write_json(folder: OutputFolder, name: str, content: dict[str, Any] | list[Any]) -> None:
    with _writing(folder, name) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _writing(folder: OutputFolder, name: str) -> Iterator[codecs.StreamWriter]:
    with _creating(folder, name) as file:
        yield codecs.getwriter("utf-8")(file)


@contextmanager
def _creating(folder: OutputFolder, name: str) -> Iterator[BinaryIO | CountedFile]:
    try:
        with folder.create(name) as file:
            yield file
    except OSError as error:
        raise writing_failed(folder.path / name, error) from None
