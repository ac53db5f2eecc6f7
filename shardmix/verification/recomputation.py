"""The merge of an output's shardmix.json, done again and compared with its files.

A digest proves that an output is what was written; recomputing proves that it is what its sources
give. Finds the sources, and checks that they are those that were merged. Knows nothing of digests.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from shardmix.conventions.adapters import parts_of
from shardmix.conventions.module_tree import module_subfolders, read_modules
from shardmix.conventions.sentence_modules import MODULES_NAME
from shardmix.errors import RecipeError, ShardmixError, SourceError
from shardmix.execute.compare_pass import compare
from shardmix.execute.prepare import ready
from shardmix.execute.progress import OnProgress
from shardmix.matching.differences import EVERYTHING
from shardmix.matching.tensors import QUANTISATION
from shardmix.options import MergeOptions, run_settings
from shardmix.output.provenance import PROVENANCE_NAME, Provenance, SourceRecord, recorded_recipe
from shardmix.plan import planner
from shardmix.plan.merge_plan import MergePlan
from shardmix.plan.opening import disk_errors_named, open_models
from shardmix.sources.located import is_hub_id
from shardmix.sources.resolve import resolve_all


def locations_given(
    provenance: Provenance, sources: Mapping[str, str | PathLike[str]]
) -> dict[int, str]:
    """Return number of a source → path, from the user's numbers and names.

    Raises `RecipeError` if there is no such source, or if two have that name.
    """
    names = [source.name for source in provenance.sources]
    by_number: dict[int, str] = {}
    by_name: dict[int, str] = {}
    for key, path in sources.items():
        if key in map(str, range(1, len(names) + 1)):
            by_number[int(key)] = str(path)
        elif names.count(key) == 1:
            by_name[names.index(key) + 1] = str(path)
        elif key in names:
            raise _ambiguous(RecipeError, key, names)
        else:
            known = ", ".join(f"{number} ({name})" for number, name in enumerate(names, start=1))
            raise RecipeError(
                f"is none of this output's sources: {known}",
                subject=f"--source {key}",
                remedy="name one of these",
            )
    return by_name | by_number


def recompute(
    folder: Path,
    provenance: Provenance,
    given: Mapping[int, str],
    max_memory: int | str | None,
    on_progress: OnProgress | None,
    cancel: threading.Event | None,
) -> tuple[list[str], int]:
    """Merge the sources again, against the output; return the differences, and the bytes read.

    Raises `ShardmixError` if the sources cannot be found, are others, or cannot be merged.
    """
    names = [source.name for source in provenance.sources]
    locations = [
        given[number] if number in given else _location(folder, number, source, names)
        for number, source in enumerate(provenance.sources, start=1)
    ]
    recorded = recorded_recipe(provenance, folder / PROVENANCE_NAME)
    if recorded.rank is not None:
        raise SourceError(
            "holds factors of singular value decompositions, whose last bits differ between "
            "machines, so that computing them again proves nothing",
            subject=folder,
            remedy="verify it by its digests, without --recompute",
        )
    # A model's config says how weights are tied; an adapter has none.
    config_from = None if recorded.as_adapter else str(folder)
    recipe = replace(
        recorded.with_sources(locations, config_from=config_from),
        # All but their weights was judged when they were merged.
        allow_differences=(*recorded.allow_differences, EVERYTHING, QUANTISATION),
    )
    options: MergeOptions = {"max_memory": max_memory}
    settings = run_settings(options)
    with disk_errors_named():
        named = () if config_from is None else (config_from,)
        resolved = resolve_all((*recipe.sources, *named))
        opened = open_models(recipe, resolved, max_memory=settings.max_memory_nbytes)
        plan = planner.plan_merge(recipe, opened, settings)
    for model, source in enumerate(provenance.sources):
        _check_identity(plan, model, source)
    plan, backend, _ = ready(
        plan, options, lambda chosen: planner.plan_merge(recipe, opened, run_settings(chosen))
    )
    differences = compare(plan, backend, folder, on_progress, cancel)
    givers = _and(locations)
    found = [
        f"{folder / file}: {num_bytes} bytes of {part} are not what {givers} give"
        for (file, part), num_bytes in sorted(differences.num_bytes.items())
    ]
    found += [
        f"{folder / file}: cannot be compared with what {givers} give ({reason})"
        for file, reason in sorted(differences.unreadable.items())
    ]
    planned = {shard.filename for shard in plan.shards}
    # Weights in other folders were copied; so were modules', if models may differ in them.
    summed = {""}
    if MODULES_NAME not in recorded.allow_differences:
        summed |= set(module_subfolders(read_modules(folder)))
    found += [
        f"{folder / name}: is not what a merge of {givers} would write"
        for name in sorted(provenance.digests.files)
        if name.endswith(".safetensors")
        and name not in planned
        and name.rpartition("/")[0] in summed
    ]
    return found, plan.read_nbytes + plan.write_nbytes


def _location(folder: Path, number: int, source: SourceRecord, names: Sequence[str]) -> str:
    """Return the path or Hub id of a source that the user did not name."""
    # With adapters, a part may be a Hub id.
    recorded = parts_of(source.path) if source.path else []
    if recorded and all(_exists(part) or is_hub_id(part) for part in recorded):
        return str(source.path)
    is_alone = names.count(source.name) == 1
    origins = [(source.base_name, source.hub_id, source.commit)]
    origins += [(adapter.name, adapter.hub_id, adapter.commit) for adapter in source.adapters]
    found = [_part_location(folder, *origin, is_alone=is_alone) for origin in origins]
    if None not in found:
        return "+".join(filter(None, found))
    if not is_alone:
        raise _ambiguous(SourceError, source.name, names).of(folder)
    raise SourceError(
        f"this source of {folder} cannot be found, since {PROVENANCE_NAME} names no paths",
        subject=source.name,
        remedy=f"say where it is: --source {source.name}=PATH, or --source {number}=PATH",
    )


def _part_location(
    folder: Path, name: str, hub_id: str | None, commit: str | None, *, is_alone: bool
) -> str | None:
    """Return the path or Hub id of a model or an adapter, or None if it is not to be found."""
    if hub_id is not None and commit is not None:
        return f"{hub_id}@{commit}"
    is_plain = Path(name).name == name  # a stranger may have written `../..`
    beside = folder.resolve().parent / name
    return str(beside) if is_alone and is_plain and _exists(str(beside)) else None


def _exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - False, too, for texts that cannot be paths


def _ambiguous(kind: type[ShardmixError], name: str, names: Sequence[str]) -> ShardmixError:
    numbers = [number for number, other in enumerate(names, start=1) if other == name]
    count = "two" if len(numbers) == 2 else str(len(numbers))
    words = _and([f"--source {number}=PATH" for number in numbers])
    return kind(f"{count} sources are called {name}", remedy=f"give {words}")


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _check_identity(plan: MergePlan, model: int, source: SourceRecord) -> None:
    """Raise `SourceError` if a source is not the model that was merged."""
    # In order: files in several folders may have one name.
    planned = plan.sources[model]
    files = [(file.name, file.nbytes, file.header_sha256) for file in planned.identity.files]
    records = [(record.name, record.bytes, record.header_sha256) for record in source.files]
    if files == records:
        return
    if len(files) != len(records):
        finding = f"it has {len(files)} weight files, not {len(records)}"
    else:
        differing = next(
            record for file, record in zip(files, records, strict=True) if file != record
        )
        finding = f"{differing[0]} differs in name, size or header"
    raise SourceError(
        f"is not the {source.name} that was merged ({finding})",
        subject=planned.text,
        remedy=f"say where that is with --source {model + 1}=PATH",
    )
