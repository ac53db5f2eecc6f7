"""The shard planner: from a recipe and opened checkpoints to a `MergePlan`.

Decides names, dtypes, output shards, every offset and the memory before a byte of weights is read.
Pure but for looking up files beside the weights and how much memory is in use and available.
"""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from shardmix.belonging import Base, check_belong_together
from shardmix.checkpoint import CONFIG_NAME, Checkpoint, read_config
from shardmix.companions import (
    Companions,
    adapter_warnings,
    find_companions,
    left_out_warning,
    unmerged_weights,
)
from shardmix.config_dtypes import config_dtypes
from shardmix.devices import num_devices
from shardmix.digests import XXH3
from shardmix.errors import RecipeError, listed
from shardmix.file_kinds import LeftOut
from shardmix.fused_tensors import split_alike
from shardmix.matching import MatchedTensors, match_tensors
from shardmix.memory import (
    BEST_STRIP_NBYTES,
    MemoryPlan,
    fit_memory,
    reserved_nbytes,
    vram_use,
)
from shardmix.module_differences import ModularModel
from shardmix.module_tree import Module, inner_path, module_places
from shardmix.output_modules import PlannedModules, plan_modules
from shardmix.page_cache import plan_cache_use
from shardmix.parts import match_parts
from shardmix.plan import LINEAR, MergePlan, ModuleConfig, OutputShard, SourceFile
from shardmix.reader import MAX_MAPPED_AT_ONCE
from shardmix.recipe import OUT_DTYPES, Recipe
from shardmix.run_settings import LLVM, LLVM_DTYPES, TORCH, RunSettings
from shardmix.safetensors_layout import DTYPES, FLOAT_DTYPES, element_nbytes, tensor_nbytes
from shardmix.shard_layout import plan_shards
from shardmix.weight_names import DIFFUSERS, MARKS, MODEL
from shardmix.weight_warnings import weight_warnings

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack

MEASURED_FROM_NBYTES = 200 * 10**9
"""Source bytes of a merge for which a GPU is tried where nobody named a device.

To load torch's build for CUDA and to make a context takes seconds. What a GPU can save is the sums:
with kernels a tenth of a merge's time, which went at 6.6 GB/s on two cores (docs/performance.md).
So of 200 GB, half a minute, it can save three seconds; of less, not even what it takes to try.
"""

_TORCH_NAMES = {"F64": "float64", **{dtype: name for name, dtype in OUT_DTYPES.items()}}


@dataclass(frozen=True, slots=True)
class Donor:
    """The model that gives the output its config, tokenizer and other companion files."""

    name: str
    """What the model card may call it."""
    folder: Path
    """Its folder."""
    config: dict[str, Any]
    """Content of its config.json; empty if it has none."""
    commit: str | None
    """The commit, where it came from the Hub."""
    weights: tuple[str, ...] = ()
    """Its weight files, by path within the folder: what of it is no companion of weights."""
    is_single_file: bool = False
    """It was named as a file, so what else lies in its folder may be anybody's."""
    left_out: tuple[LeftOut, ...] = ()
    """Files of its repository on the Hub that were not fetched."""
    modules: tuple[Module, ...] = ()
    """Its sentence-transformers modules."""
    main_place: str = ""
    """Where in its folder config and main weights are: "" or the folder of one of these."""


class Outcome(TypedDict, total=False):
    """Where an output goes, and what it tells of itself."""

    output: Path | None
    """The folder to make; None where that is left open."""
    digest_algorithm: str
    """What its files are hashed with; default: XXH3."""
    record_paths: bool
    """Its provenance tells where on this machine the sources lie; default: it doesn't."""


def plan_merge(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    donor: Donor,
    settings: RunSettings,
    **outcome: Unpack[Outcome],
) -> MergePlan:
    """Plan a merge of the recipe's checkpoints, given in its order.

    Raises `MismatchError` where the models do not fit, `BudgetError` where the memory budget
    cannot hold one smallest strip.
    """
    matched = match_parts(checkpoints)
    modules = plan_modules(recipe, checkpoints, matched, donor.folder, donor.modules)
    groups = _placed(matched.groups, modules)
    parts = _planned_parts(recipe, groups, donor, modules)
    main = parts[0]
    shards = tuple(shard for part in parts for shard in part.shards)
    settings = _decided(settings, shards)
    write_nbytes = sum(shard.file_nbytes for shard in shards)
    companions = find_companions(
        donor.folder,
        weights=_merged_files(donor, parts),
        is_single_file=donor.is_single_file,
    )
    left_out = tuple(dict.fromkeys((*companions.left_out, *donor.left_out)))
    warnings = [
        *weight_warnings(recipe, (name for part in parts for name in part.float_names)),
        *(note for part in parts for note in part.notes),
        *modules.notes,
        *check_belong_together(
            checkpoints,
            groups,
            recipe,
            bases=[part.base for part in parts],
            modular_base=_modular_base(recipe, donor, checkpoints[0]),
            max_memory=settings.max_memory_nbytes,
        ),
        *adapter_warnings(part for checkpoint in checkpoints for part in checkpoint.parts),
        *_companion_warnings(companions, left_out, donor),
    ]
    if _stem(checkpoints[0], donor) not in MARKS and _lacks_config(donor, companions.files):
        warnings.append(
            f"no {CONFIG_NAME} in {donor.folder.name}: the output holds weights alone and will not "
            "load with from_pretrained; name a model that has one with --base"
        )
    return MergePlan(
        sources=recipe.sources,
        public_names=tuple(public_name(checkpoint) for checkpoint in checkpoints),
        hub_ids=tuple(checkpoint.hub_id for checkpoint in checkpoints),
        commits=tuple(checkpoint.commit for checkpoint in checkpoints),
        weights=recipe.weights,
        dtype=recipe.dtype,
        max_shard_size=recipe.max_shard_size,
        model_type=recipe.model_type,
        allow_differences=recipe.allow_differences,
        digest_algorithm=outcome.get("digest_algorithm", XXH3),
        record_paths=outcome.get("record_paths", False),
        output=str(outcome.get("output") or ""),
        base_name=donor.name,
        base_commit=donor.commit,
        base_folder=str(donor.folder.absolute()),
        companions=companions.files,
        left_out=left_out,
        config_dtypes=main.config_dtypes,
        untied=main.untied,
        main_place=main.place,
        module_configs=tuple(
            ModuleConfig(part.place, part.config_dtypes, part.untied) for part in parts[1:]
        ),
        modules_folder="" if modules.folder is None else str(modules.folder.absolute()),
        modules=modules.output,
        files=tuple(
            SourceFile(
                str(shard.path.absolute()),
                shard.nbytes,
                shard.mtime_ns,
                shard.header_sha256,
                model,
                shard.path.relative_to(part.root).as_posix(),
                shard.stamp,
            )
            for group in groups
            for model, part in enumerate(group)
            for shard in part.shards
        ),
        shards=shards,
        disk_needed_nbytes=write_nbytes,  # and what is beside the weights, once there is a plan
        settings=settings,
        memory=plan_memory(settings, num_tensors=sum(len(shard.tensor_names) for shard in shards)),
        cache_use=plan_cache_use(
            read_nbytes=sum(shard.read_nbytes for shard in shards),
            write_nbytes=write_nbytes,
            fsync=settings.fsync,
        ),
        warnings=tuple(warnings),
    )


def _lacks_config(donor: Donor, companions: Sequence[str]) -> bool:
    """Tell whether transformers would look for a config in vain; some modules have none."""
    place = donor.main_place
    kind = next((module.kind for module in donor.modules if module.place == place), "Transformer")
    name = inner_path(place, CONFIG_NAME)
    return kind == "Transformer" and name not in companions


@dataclass(frozen=True, slots=True)
class _PlannedPart:
    """One part of the output: the model itself, or a module with weights of its own."""

    place: str
    """Its folder within the output; empty: the output itself."""
    base: Base
    """What gives its config and tokenizer."""
    float_names: tuple[str, ...]
    """Its tensors of floats, by the names that they are told by."""
    untied: tuple[str, ...]
    """Parts of its config that must say `tie_word_embeddings: false`."""
    notes: tuple[str, ...]
    """What is to be told of it."""
    config_dtypes: tuple[tuple[str, str], ...]
    """What its config must say of dtypes."""
    shards: tuple[OutputShard, ...]
    """Its files."""


def _modular_base(recipe: Recipe, donor: Donor, first: Checkpoint) -> ModularModel | None:
    """Return what gives the output its modules, unless it is a model of the merge as a whole."""
    if recipe.base is None and not first.is_single_file:
        return None
    return ModularModel(recipe.base or donor.name, donor.folder, donor.modules)


def _placed(
    groups: Sequence[tuple[Checkpoint, ...]], modules: PlannedModules
) -> list[tuple[Checkpoint, ...]]:
    """Return the parts for which the output has a module; others are told of as a difference."""
    main, *others = groups
    return [main, *(group for group in others if group[0].key in modules.places)]


def _merged_files(donor: Donor, parts: Sequence[_PlannedPart]) -> list[str]:
    """Return those weight files of the base that the output has merged ones in the place of."""
    unmerged = set(module_places(donor.modules)) - {part.place for part in parts}
    return [name for name in donor.weights if name.rpartition("/")[0] not in unmerged]


def _planned_parts(
    recipe: Recipe,
    groups: Sequence[Sequence[Checkpoint]],
    donor: Donor,
    modules: PlannedModules,
) -> list[_PlannedPart]:
    """Plan each part by itself: names, ties, dtypes and shards are no business of another's."""
    parts: list[_PlannedPart] = []
    num_files = 0
    for group in groups:
        folder, place, config = donor.folder, donor.main_place, donor.config
        if parts:
            folder, place = modules.folder or donor.folder, modules.places[group[0].key]
            config = read_config(folder / place)
        group, split_notes = split_alike(group)
        matched = match_tensors(group, config, folder / place)
        out_dtypes = _output_dtypes(recipe.dtype, group[0], matched)
        shards, shard_notes = plan_shards(
            recipe,
            group,
            matched,
            out_dtypes,
            place=place,
            stem=MODEL if place else _stem(group[0], donor),
            num_files_before=num_files,
        )
        parts.append(
            _PlannedPart(
                place=place,
                base=Base(recipe.base, folder / place, config),
                float_names=tuple(
                    inner_path(place, name)
                    for name, dtype in zip(matched.names, out_dtypes, strict=True)
                    if dtype in FLOAT_DTYPES
                ),
                untied=matched.untied,
                notes=(*split_notes, *matched.notes, *shard_notes),
                config_dtypes=_config_dtypes(config, matched, out_dtypes),
                shards=shards,
            )
        )
        num_files += sum(len(part.shards) for part in group)
    return parts


def _stem(first: Checkpoint, donor: Donor) -> str:
    """Return what the output's weight files are called: what its loader looks for."""
    if "_class_name" in donor.config or (first.stem == DIFFUSERS and not donor.config):
        return DIFFUSERS
    mark = MARKS.get(first.stem)
    is_there = mark is not None and os.path.lexists(donor.folder / mark)
    return first.stem if is_there else MODEL


def _companion_warnings(
    companions: Companions, left_out: Sequence[LeftOut], donor: Donor
) -> Iterator[str]:
    """Tell of companions that hold weights, and of what somebody may miss."""
    modules = tuple(f"{place}/" for place in module_places(donor.modules))
    # What modules have is the same in all models, or else told of as a difference.
    unmerged = [name for name in unmerged_weights(companions.files) if not name.startswith(modules)]
    if unmerged:
        values = "its values are" if len(unmerged) == 1 else "their values are"
        yield f"{listed(unmerged)}: copied, not merged; {values} those of {donor.name}"
    warning = left_out_warning(left_out, donor.name)
    if warning is not None:
        yield warning


def plan_memory(settings: RunSettings, *, num_tensors: int) -> MemoryPlan:
    """Fit strips and workers to the budgets and to what the process holds at this moment.

    `num_tensors` are the output's: of each there may be something to tell.

    Where the device is still open, to the GPU's, with the peak of whichever takes more. Raises
    `BudgetError` where one smallest strip does not fit.
    """
    num_gpus = num_devices(settings.device)
    if not settings.is_device_open:
        reserved = reserved_nbytes(settings.backend, num_devices=num_gpus, num_tensors=num_tensors)
        return _fitted(settings, reserved, num_gpus)
    # Both are tried in one process, with the libraries of both.
    reserved = reserved_nbytes(TORCH, LLVM, num_devices=num_gpus, num_tensors=num_tensors)
    on_gpu = _fitted(settings, reserved, num_gpus)
    # torch's strips are larger than the kernels', so either fits in what this one takes.
    on_cpu = _fitted(replace(settings, device="cpu", backend=TORCH), reserved, 0)
    peak = max(on_gpu.projected_peak_nbytes, on_cpu.projected_peak_nbytes)
    return replace(on_gpu, projected_peak_nbytes=peak)


def _fitted(settings: RunSettings, reserved: int, num_gpus: int) -> MemoryPlan:
    return fit_memory(
        reserved=reserved,
        num_devices=num_gpus,
        vram=vram_use(settings.device),
        best_strip=BEST_STRIP_NBYTES["cuda" if settings.on_cuda else settings.backend],
        workers=settings.workers,
        max_memory=settings.max_memory_nbytes,
        max_vram=settings.max_vram_nbytes,
        mapped_views=MAX_MAPPED_AT_ONCE if settings.io == "mmap" else 0,
    )


def _output_dtypes(dtype: str, first: Checkpoint, matched: MatchedTensors) -> list[str]:
    kept = [DTYPES[rank] for rank in first.table.dtype_ranks[matched.rows[0]].tolist()]
    if dtype == "keep":
        return kept
    return [OUT_DTYPES[dtype] if own in FLOAT_DTYPES else own for own in kept]


def _config_dtypes(
    config: Mapping[str, Any], matched: MatchedTensors, out_dtypes: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Return the dtypes that the output's config must state of the whole and of its parts."""
    kinds = Counter(zip(matched.shapes, out_dtypes, strict=True))
    nbytes = {
        (shape, dtype): tensor_nbytes(dtype, shape)
        for shape, dtype in kinds
        if dtype in FLOAT_DTYPES
    }
    stored = {dtype for _, dtype in nbytes}
    if len(stored) == 1:
        # Of 90,000 tensors no name has to be looked at.
        columns = [("", _TORCH_NAMES[dtype], 1) for dtype in stored]
    else:
        rows = zip(matched.names, matched.shapes, out_dtypes, strict=True)
        columns = [
            (name, _TORCH_NAMES[dtype], nbytes[shape, dtype])
            for name, shape, dtype in rows
            if dtype in stored
        ]
    return tuple(config_dtypes(config, columns).items())


def public_name(checkpoint: Checkpoint) -> str:
    """Return what may be published of a source: its Hub id, or its own name without a path."""
    if checkpoint.hub_id is not None:
        return checkpoint.source
    if checkpoint.is_single_file:
        return checkpoint.shards[0].path.name
    return checkpoint.root.resolve().name


def _decided(settings: RunSettings, shards: Sequence[OutputShard]) -> RunSettings:
    """Return the settings with every `auto` decided.

    Sources are read by pread: as fast as mapping, in less memory. Kernels sum where llvmlite is
    installed and they know all the dtypes. Raises `RecipeError` where they were asked for and
    can't. Whether a GPU is the faster is measured when the merge starts, where that may pay; till
    then it is assumed.
    """
    io, backend = settings.io, settings.backend
    if settings.device == "auto":
        is_open = backend != LLVM and _summed_nbytes(shards) >= MEASURED_FROM_NBYTES
        device = "cuda" if is_open else "cpu"
        settings = replace(settings, device=device, is_device_open=is_open)
    if io == "auto":
        io = "pread"
    finding = _llvm_finding(settings, shards)
    if backend == LLVM and finding is not None:
        raise RecipeError(f"backend llvm: {finding}; use --backend torch (backend='torch')")
    if backend == "auto":
        backend = LLVM if finding is None else TORCH
    return replace(settings, io=io, backend=backend)


def _summed_nbytes(shards: Sequence[OutputShard]) -> int:
    """Return the bytes of all sources that are added up, and not just compared."""
    return sum(
        run.num_elements * sum(map(element_nbytes, run.dtypes))
        for shard in shards
        for run in shard.runs
        if run.reduction == LINEAR
    )


def _llvm_finding(settings: RunSettings, shards: Sequence[OutputShard]) -> str | None:
    """Say why the sums cannot be the kernels', or None if they can."""
    if settings.on_cuda:
        return "it sums on the CPU alone"
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite is not installed (pip install llvmlite)"
    dtypes = {
        dtype
        for shard in shards
        for run in shard.runs
        if run.reduction == LINEAR
        for dtype in (*run.dtypes, run.out_dtype)
    }
    others = sorted(dtypes - LLVM_DTYPES)
    return f"it does not know {', '.join(others)}" if others else None
