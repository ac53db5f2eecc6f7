"""The planner: from a recipe and opened sources to a `MergePlan`.

Decides names, dtypes, output shards, every offset and the memory before a byte of weights is read.
Pure, except that it looks for files beside the weights and at the memory in use and available.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shardmix._typing import Unpack
from shardmix.conventions.file_kinds import LeftOut
from shardmix.conventions.module_tree import inner_path, module_subfolders
from shardmix.conventions.vocabularies import is_tokenizer_file
from shardmix.conventions.weight_names import DIFFUSERS, MARKS, MODEL
from shardmix.dtypes import (
    FLOAT_DTYPES,
    OUT_DTYPES,
    tensor_nbytes,
    torch_name,
)
from shardmix.errors import BudgetError, listed
from shardmix.matching.belonging import PartConfig, check_belong_together
from shardmix.matching.config_dtypes import config_dtypes
from shardmix.matching.fused_tensors import split_alike
from shardmix.matching.parts import match_parts
from shardmix.matching.tensors import MatchedTensors, match_tensors
from shardmix.methods.base import Params
from shardmix.methods.registry import merge_method
from shardmix.methods.statistics import num_entries, num_groups
from shardmix.options import RunSettings
from shardmix.plan.backend_choice import decide
from shardmix.plan.chunk_size import whole_chunk_nbytes
from shardmix.plan.layout import FileNumbers, TensorParameters, plan_shards
from shardmix.plan.memory_budget import Gathering, plan_memory
from shardmix.plan.merge_plan import MergePlan, ModuleConfig, OutputShard, QuantisedOutput
from shardmix.plan.opening import ConfigSource, OpenedModels
from shardmix.plan.outcome import Outcome
from shardmix.plan.output_modules import PlannedModules, plan_modules
from shardmix.plan.output_quantisation import (
    check_config,
    coding_memory,
    quantised,
    ragged_notes,
    written,
)
from shardmix.plan.planned_sources import planned_sources, reader_memory
from shardmix.plan.weight_warnings import weight_warnings
from shardmix.recipe import Recipe
from shardmix.recipe.build import recipe_notes
from shardmix.recipe.parameters import resolve_parameters
from shardmix.sources.auxiliary_files import (
    AuxiliaryFiles,
    adapter_warnings,
    find_auxiliary_files,
    left_out_warning,
    unmerged_weights,
)
from shardmix.sources.base import Source
from shardmix.sources.checkpoint import CONFIG_NAME, read_config
from shardmix.system.hashing import XXH3
from shardmix.system.page_cache import plan_cache_use

if TYPE_CHECKING:
    from shardmix.matching.modules import ModularModel
    from shardmix.plan.factor_results import FactorResults


def plan_merge(
    recipe: Recipe,
    opened: OpenedModels,
    settings: RunSettings,
    factors: "FactorResults | None" = None,
    **outcome: Unpack[Outcome],
) -> MergePlan:
    """Plan a merge of a recipe's models; if the device is open and a GPU does not work, on the CPU.

    `factors` are those of an adapter of a given rank, once they are computed.
    Raises `MismatchError` if the models do not fit, `BudgetError` if the memory budget cannot hold
    one smallest chunk.
    """
    if recipe.as_adapter:
        # Imported here: models need none of it.
        from shardmix.plan.adapter_plan import plan_adapter

        return plan_adapter(recipe, opened, settings, factors, **outcome)
    try:
        return _plan_merge(recipe, opened, settings, **outcome)
    except BudgetError as error:
        if settings.device != "auto":
            raise
        plan = _plan_merge(recipe, opened, replace(settings, device="cpu"), **outcome)
        return replace(plan, warnings=(*plan.warnings, f"on the CPU, since on a GPU {error}"))


def _plan_merge(
    recipe: Recipe, opened: OpenedModels, settings: RunSettings, **outcome: Unpack[Outcome]
) -> MergePlan:
    sources: Sequence[Source] = opened.sources
    config_source = opened.config_source
    mapped = opened.mapped
    if mapped is not None:
        sources, config_source = mapped.sources, replace(config_source, config=mapped.config)
    sources = _read_as(recipe, sources)
    matched = match_parts(sources)
    modules = plan_modules(recipe, sources, matched, config_source.folder, config_source.modules)
    groups = _placed(matched.groups, modules)
    arranged = [split_alike(group) for group in groups]
    planned, numbers = planned_sources(sources, [split for split, _ in arranged])
    parts = _planned_parts(recipe, arranged, numbers, config_source, modules)
    main = parts[0]
    shards = tuple(shard for part in parts for shard in part.shards)
    settings = decide(settings, shards)
    write_nbytes = sum(shard.file_nbytes for shard in shards)
    gathering = _gathering(shards, [params for part in parts for params in part.parameters])
    coding = coding_memory(shards)
    readers = reader_memory(planned)
    auxiliary_files = find_auxiliary_files(
        config_source.folder,
        weights=_merged_files(config_source, parts),
        is_single_file=config_source.is_single_file,
    )
    if mapped is not None:
        auxiliary_files = _without_tokenizer(auxiliary_files, config_source.main_subfolder)
    check_config(recipe, auxiliary_files.files, inner_path(main.subfolder, CONFIG_NAME))
    left_out = tuple(dict.fromkeys((*auxiliary_files.left_out, *config_source.left_out)))
    warnings = [
        *recipe_notes(recipe),
        *(() if mapped is None else mapped.notes),
        *weight_warnings(
            recipe,
            [params for part in parts for params in part.parameters],
            (name for part in parts for name in part.float_names),
        ),
        *(note for part in parts for note in part.notes),
        *modules.notes,
        *ragged_notes(shards),
        *check_belong_together(
            sources,
            groups,
            recipe,
            config_sources=[part.config_source for part in parts],
            modular_config_source=_modular_config_source(recipe, config_source, sources[0]),
            max_memory=settings.max_memory_nbytes,
        ),
        *adapter_warnings(part for source in sources for part in source.parts),
        *dict.fromkeys(note for source in sources for note in source.warnings),
        *_auxiliary_file_warnings(auxiliary_files, left_out, config_source),
    ]
    if _stem(sources[0], config_source) not in MARKS and _lacks_config(
        config_source, auxiliary_files.files
    ):
        warnings.append(
            f"no {CONFIG_NAME} in {config_source.folder.name}: the output holds weights alone and "
            "will not load with from_pretrained; name a model that has one with --config-from"
        )
    return MergePlan(
        recipe=recipe,
        sources=planned,
        parameters=tuple(params for part in parts for params in part.parameters),
        digest_algorithm=outcome.get("digest_algorithm", XXH3),
        record_paths=outcome.get("record_paths", False),
        output=str(outcome.get("output") or ""),
        config_source_name=config_source.name,
        config_source_commit=config_source.commit,
        config_source_folder=str(config_source.folder.absolute()),
        auxiliary_files=auxiliary_files.files,
        left_out=left_out,
        config_dtypes=main.config_dtypes,
        untied=main.untied,
        main_subfolder=main.subfolder,
        module_configs=tuple(
            ModuleConfig(part.subfolder, part.config_dtypes, part.untied) for part in parts[1:]
        ),
        tokenizer_folder="" if mapped is None else str(mapped.folder.absolute()),
        vocabulary=None if mapped is None else mapped.vocabulary,
        modules_folder="" if modules.folder is None else str(modules.folder.absolute()),
        modules=modules.output,
        factoring=None,
        low_rank=None,
        adapter_config="",
        shards=shards,
        disk_needed_nbytes=write_nbytes,  # what lies beside the weights is added from the plan
        settings=settings,
        readers=readers,
        gathering=gathering,
        quantised=main.quantised,
        coding=coding,
        memory=plan_memory(
            settings,
            num_tensors=sum(len(shard.tensor_names) for shard in shards),
            readers=readers,
            gathering=gathering,
            coding=coding,
        ),
        cache_use=plan_cache_use(
            read_nbytes=sum(shard.read_nbytes for shard in shards),
            write_nbytes=write_nbytes,
            fsync=settings.fsync,
        ),
        warnings=tuple(warnings),
    )


def _without_tokenizer(auxiliary_files: AuxiliaryFiles, subfolder: str) -> AuxiliaryFiles:
    """Return a config source's auxiliary files without those of its tokenizer."""
    prefix = inner_path(subfolder, "")
    return replace(
        auxiliary_files,
        files=tuple(
            name
            for name in auxiliary_files.files
            if not (name.startswith(prefix) and is_tokenizer_file(name.removeprefix(prefix)))
        ),
    )


def _read_as(recipe: Recipe, sources: Sequence[Source]) -> Sequence[Source]:
    """Return the sources as the method takes them: as changes to the base, if it and they can."""
    if not merge_method(recipe.merge_method).takes_changes:
        return sources
    base, *others = sources
    return [base, *(other.changes_to(base) or other for other in others)]


def _lacks_config(config_source: ConfigSource, auxiliary_files: Sequence[str]) -> bool:
    """Return True if transformers would look for a config in vain; some modules need none."""
    subfolder = config_source.main_subfolder
    kind = next(
        (module.kind for module in config_source.modules if module.subfolder == subfolder),
        "Transformer",
    )
    name = inner_path(subfolder, CONFIG_NAME)
    return kind == "Transformer" and name not in auxiliary_files


@dataclass(frozen=True, slots=True)
class _PlannedPart:
    """One part of the output: the model itself, or a module with weights of its own."""

    subfolder: str
    """Its folder within the output; empty for the output itself."""
    config_source: PartConfig
    """Source of its config and tokenizer."""
    float_names: tuple[str, ...]
    """Names of its float tensors, as in messages."""
    untied: tuple[str, ...]
    """Parts of its config that must say `tie_word_embeddings: false`."""
    notes: tuple[str, ...]
    """Notes for the user."""
    config_dtypes: tuple[tuple[str, str], ...]
    """Dtypes that its config must state."""
    parameters: tuple[Params, ...]
    """Its tensors' parameters, one for each group that shares them."""
    shards: tuple[OutputShard, ...]
    """Its files."""
    quantised: QuantisedOutput | None
    """Its tensors that are written as codes."""


def _modular_config_source(
    recipe: Recipe, config_source: ConfigSource, first: Source
) -> "ModularModel | None":
    """Return the model that gives the output its modules, unless it is a whole model of the
    merge."""
    if recipe.config_from is None and not first.is_single_file:
        return None
    from shardmix.matching.modules import ModularModel

    return ModularModel(
        recipe.config_from or config_source.name, config_source.folder, config_source.modules
    )


def _placed(
    groups: Sequence[tuple[Source, ...]], modules: PlannedModules
) -> list[tuple[Source, ...]]:
    """Return the parts for which the output has a module; another check reports the others."""
    main, *others = groups
    return [main, *(group for group in others if group[0].key in modules.subfolders)]


def _merged_files(config_source: ConfigSource, parts: Sequence[_PlannedPart]) -> list[str]:
    """Return the weight files of the config source that merged ones replace."""
    unmerged = set(module_subfolders(config_source.modules)) - {part.subfolder for part in parts}
    return [name for name in config_source.weights if name.rpartition("/")[0] not in unmerged]


def _planned_parts(
    recipe: Recipe,
    groups: Sequence[tuple[Sequence[Source], Sequence[str]]],
    numbers: Sequence[Sequence[FileNumbers]],
    config_source: ConfigSource,
    modules: PlannedModules,
) -> list[_PlannedPart]:
    """Plan each part by itself: names, ties, dtypes and shards do not depend on other parts.

    `groups` has the sources of each part, and notes on them.
    """
    parts: list[_PlannedPart] = []
    for (group, split_notes), its_numbers in zip(groups, numbers, strict=True):
        folder, subfolder, config = (
            config_source.folder,
            config_source.main_subfolder,
            config_source.config,
        )
        if parts:
            folder, subfolder = (
                modules.folder or config_source.folder,
                modules.subfolders[group[0].key],
            )
            config = read_config(folder / subfolder)
        matched = match_tensors(group, config, folder / subfolder)
        out_dtypes = _output_dtypes(recipe.output_dtype, group[0], matched)
        chosen = None if parts else quantised(recipe, matched, out_dtypes, config)
        resolved = resolve_parameters(recipe, matched.names)
        parameters = TensorParameters(
            method=merge_method(recipe.merge_method),
            groups=resolved.groups,
            rows=resolved.rows,
            num_groups_before=sum(len(part.parameters) for part in parts),
        )
        shards, shard_notes = plan_shards(
            recipe,
            group,
            matched,
            written(recipe, out_dtypes, chosen),
            parameters,
            subfolder=subfolder,
            stem=MODEL if subfolder else _stem(group[0], config_source),
            numbers=its_numbers,
        )
        parts.append(
            _PlannedPart(
                subfolder=subfolder,
                config_source=PartConfig(recipe.config_from, folder / subfolder, config),
                float_names=tuple(
                    inner_path(subfolder, name)
                    for name, dtype in zip(matched.names, out_dtypes, strict=True)
                    if dtype in FLOAT_DTYPES
                ),
                untied=matched.untied,
                notes=(*split_notes, *matched.notes, *shard_notes),
                config_dtypes=_config_dtypes(config, matched, out_dtypes),
                parameters=tuple(parameters.groups),
                shards=shards,
                quantised=None if chosen is None else chosen.output,
            )
        )
    return parts


def _stem(first: Source, config_source: ConfigSource) -> str:
    """Return the stem of the output's weight files, as its loader expects."""
    if "_class_name" in config_source.config or (
        first.stem == DIFFUSERS and not config_source.config
    ):
        return DIFFUSERS
    mark = MARKS.get(first.stem)
    is_there = mark is not None and os.path.lexists(config_source.folder / mark)
    return first.stem if is_there else MODEL


def _auxiliary_file_warnings(
    auxiliary_files: AuxiliaryFiles, left_out: Sequence[LeftOut], config_source: ConfigSource
) -> Iterator[str]:
    """Yield warnings of auxiliary files with weights, and of files that somebody may miss."""
    modules = tuple(f"{subfolder}/" for subfolder in module_subfolders(config_source.modules))
    # Weights of modules are the same in all models, or reported as a difference.
    unmerged = [
        name for name in unmerged_weights(auxiliary_files.files) if not name.startswith(modules)
    ]
    if unmerged:
        values = "its values are" if len(unmerged) == 1 else "their values are"
        yield f"{listed(unmerged)}: copied, not merged; {values} those of {config_source.name}"
    warning = left_out_warning(left_out, config_source.name)
    if warning is not None:
        yield warning


def _output_dtypes(dtype: str, first: Source, matched: MatchedTensors) -> list[str]:
    kept = first.tensors.kept_dtypes(matched.rows[0])
    if dtype == "keep":
        return kept
    return [OUT_DTYPES[dtype] if own in FLOAT_DTYPES else own for own in kept]


def _config_dtypes(
    config: Mapping[str, Any], matched: MatchedTensors, out_dtypes: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Return the dtypes that the output's config must state for the whole and its parts."""
    kinds = Counter(zip(matched.shapes, out_dtypes, strict=True))
    nbytes = {
        (shape, dtype): tensor_nbytes(dtype, shape)
        for shape, dtype in kinds
        if dtype in FLOAT_DTYPES
    }
    stored = {dtype for _, dtype in nbytes}
    if len(stored) == 1:
        # With one dtype no name of 90,000 tensors has to be checked.
        columns = [("", torch_name(dtype), 1) for dtype in stored]
    else:
        rows = zip(matched.names, matched.shapes, out_dtypes, strict=True)
        columns = [
            (name, torch_name(dtype), nbytes[shape, dtype])
            for name, shape, dtype in rows
            if dtype in stored
        ]
    return tuple(config_dtypes(config, columns).items())


def _gathering(shards: Sequence[OutputShard], parameters: Sequence[Params]) -> Gathering | None:
    """Return the needs of gathering statistics; None if the factors of all segments are known."""
    pending = [segment for shard in shards for segment in shard.merged if segment.is_pending]
    if not pending:
        return None
    nums_entries = [
        num_entries(
            merge_method(segment.method).needs(parameters[segment.parameters]).statistics,
            len(segment.sources),
        )
        for segment in pending
    ]
    return Gathering(
        whole_chunk_nbytes=max(map(whole_chunk_nbytes, pending)),
        num_sources=max(len(segment.sources) for segment in pending),
        num_tensors=len(pending),
        num_entries=sum(nums_entries),
        num_group_entries=max(
            entries * num_groups(segment.num_elements)
            for entries, segment in zip(nums_entries, pending, strict=True)
        ),
    )
