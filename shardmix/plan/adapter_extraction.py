"""The plan of an adapter of what models changed in their base, matrix by matrix.

Weights of linear layers become factors. What else changed is kept whole, as far as PEFT can load
it: norms, embeddings, biases. A change that an adapter cannot hold is an error that names it. A
recipe may say that all of this is left as it is in the base.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardmix._typing import Unpack
from shardmix.conventions.declarations import declaration_of
from shardmix.conventions.peft_output import (
    Wrapped,
    adapted_names,
    config_content,
    is_linear,
    is_transposed,
    matrix_names,
    model_types,
    stacked_names,
    task_of,
    tied_names,
    value_name,
)
from shardmix.dtypes import DTYPES, FLOAT_DTYPES
from shardmix.errors import MismatchError, SourceError, listed
from shardmix.matching.belonging import PartConfig, check_belong_together
from shardmix.matching.tensors import MatchedTensors, match_tensors
from shardmix.options import RunSettings
from shardmix.plan.adapter_layout import METHOD, AdapterLayout, assembled, base_name, out_dtype
from shardmix.plan.factor_results import FactorResults
from shardmix.plan.factoring import (
    Difference,
    Factoring,
    FactorRecord,
    check_rank,
    fitted,
)
from shardmix.plan.merge_plan import MergePlan
from shardmix.plan.opening import OpenedModels
from shardmix.plan.outcome import Outcome
from shardmix.plan.planned_sources import planned_sources, reader_memory
from shardmix.recipe import Recipe
from shardmix.recipe.parameters import ResolvedParameters, resolve_parameters
from shardmix.sources.base import Source
from shardmix.sources.identity import SourceFile
from shardmix.sources.stored_factors import FactorFile, StoredFactor, StoredFactors

_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of the base, and what an adapter can do to it."""

    index: int
    """Index into the matched tensors."""
    name: str
    """Name in the base's class, as PEFT knows it."""
    each: Difference
    """Its rows, shape and rank."""
    holders: tuple[int, ...]
    """Indexes of the parameters that must be kept with it if it is kept whole, itself among them;
    none if it cannot be."""
    is_module: bool
    """True if it is kept as part of its module, which PEFT replaces; else it is set in place."""

    @property
    def module(self) -> str:
        """Dotted name of its module."""
        return self.name.rpartition(".")[0]


def plan_extraction(
    recipe: Recipe,
    opened: OpenedModels,
    settings: RunSettings,
    factors: FactorResults | None,
    **outcome: Unpack[Outcome],
) -> MergePlan:
    """Plan an adapter of at most a rank.

    Raises `MismatchError` if the models do not fit one another, `RecipeError` if no matrix has such
    a rank, `SourceError` if nothing changed, `BudgetError` if factors do not fit into the budget.
    """
    sources = opened.sources
    base = sources[0]
    declaration = declaration_of(base.config, base.folder)
    matched = _matched(sources)
    resolved = resolve_parameters(recipe, matched.names)
    parameters = _parameters(recipe, sources, matched, resolved)
    check_rank(recipe.rank or 0, [each.each.most_rank for each in parameters])
    planned, (numbers,) = planned_sources(sources, [tuple(sources)])
    factoring = None
    if factors is None:
        factoring = Factoring(
            recipe.rank or 0,
            recipe.energy,
            out_dtype(recipe),
            # What is only measured comes first: a change that is refused is found early.
            tuple(sorted((each.each for each in parameters), key=lambda each: each.most_rank > 0)),
            reader_nbytes=reader_memory(planned).worker_nbytes,
        )
        factoring = fitted(factoring, settings)
    known = factors or _largest(parameters)
    changed = [each for each in parameters if known.records[each.each.name].norm > 0]
    factored = [each for each in changed if known.records[each.each.name].rank]
    if not factored:
        raise SourceError(
            f"changed no weight of a linear layer of {base.text}, so there is nothing for a LoRA "
            "adapter to hold",
            subject=sources[-1].text,
            remedy="name the model that was trained on it",
        )
    whole = [each for each in changed if not each.each.most_rank]
    kept = dict.fromkeys(index for each in whole for index in each.holders)
    left = tuple(each.each.name for each in whole if not each.holders)
    if not kept:  # the models themselves are not read
        planned = tuple(replace(each, decoders=()) for each in planned)
    layout = AdapterLayout(recipe, sources, planned, numbers, resolved.groups)
    layout.add_source(_stored(sources[-1], factored, known))
    by_index = {each.index: each for each in parameters}
    modules = {each.module for each in factored}
    copies = tied_names([each.name for each in parameters], declaration, base.config)
    saved: dict[str, None] = {}
    for index in kept:
        rows = [int(own[index]) for own in matched.rows]
        (dtype,) = sources[1].tensors.kept_dtypes(matched.rows[1][[index]])
        for name in (by_index[index].name, *copies.get(by_index[index].name, ())):
            group = int(resolved.rows[index])
            layout.add_value(value_name(name, modules), rows, group, dtype)
            if by_index[index].is_module:
                saved.setdefault(name.rpartition(".")[0])
    content = config_content(
        [Wrapped(each.module, known.records[each.each.name].rank) for each in factored],
        saved=list(saved),
        names=[each.name for each in parameters],
        base=base_name(base, (), record_paths=outcome.get("record_paths", False)),
        revision=base.identity.commit,
        task_type=task_of(base.config),
        model_types=model_types(base.config),
        has_bias=False,
        is_tied=any(by_index[index].name in copies for index in kept),
        saves_values=not all(by_index[index].is_module for index in kept),
    )
    warnings = _warnings(recipe, sources, settings)
    if left and factors is not None:
        warnings += (
            f"{listed(left, _MOST_NAMED)}: changed, but left as in {base.text} (--skip-others)",
        )
    return assembled(
        recipe,
        settings,
        layout.planned,
        layout.shard(),
        resolved.groups,
        base,
        content,
        warnings,
        factoring=factoring,
        low_rank=None
        if factors is None
        else factors.facts(
            (factors.records[each.each.name] for each in parameters if each.each.most_rank),
            whole=(each.each.name for each in whole if each.holders),
            left=left,
        ),
        **outcome,
    )


def _matched(sources: Sequence[Source]) -> MatchedTensors:
    """Match the models' tensors; refuse models of which an adapter cannot tell all."""
    for source in sources:
        if source.others:
            raise SourceError(
                f"has weights in modules of its own ({source.others[0].subfolder}), which PEFT "
                "does not adapt",
                subject=source.text,
                remedy="name its main module's folder",
            )
    base = sources[0]
    matched = match_tensors(sources, base.config, base.folder)
    if matched.untied or matched.num_added:
        raise MismatchError(
            "store parameters one by one that the base shares; an adapter cannot part them",
            subject=f"{base.text} and {sources[-1].text}",
            remedy="save the models with the same tie_word_embeddings",
        )
    return matched


def _warnings(recipe: Recipe, sources: Sequence[Source], settings: RunSettings) -> tuple[str, ...]:
    """Return the differences between models that are told; others are refused."""
    base = sources[0]
    found = check_belong_together(
        sources,
        [tuple(sources)],
        recipe,
        config_sources=[PartConfig(None, base.folder, base.config)],
        max_memory=settings.max_memory_nbytes,
    )
    return (*found, *dict.fromkeys(note for source in sources for note in source.warnings))


def _parameters(
    recipe: Recipe,
    sources: Sequence[Source],
    matched: MatchedTensors,
    resolved: ResolvedParameters,
) -> list[_Parameter]:
    """Return all parameters that have elements."""
    base = sources[0]
    declaration = declaration_of(base.config, base.folder)
    names = adapted_names(matched.names, declaration, base.config)
    stacked = stacked_names(matched.names, declaration)
    tied = tied_names(names, declaration, base.config)
    modules = {name.rpartition(".")[0] for name in names}
    outer = {module[:at] for module in modules for at, letter in enumerate(module) if letter == "."}
    types = model_types(base.config)
    weights = [METHOD.weights(params) for params in resolved.groups]
    dtypes = [DTYPES[rank] for rank in base.tensors.dtype_ranks[matched.rows[0]].tolist()]
    linear = {
        index
        for index, (name, shape, dtype) in enumerate(
            zip(names, matched.shapes, dtypes, strict=True)
        )
        if dtype in FLOAT_DTYPES
        and index not in stacked
        and name not in tied
        and is_linear(name, shape)
    }
    by_module: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        by_module.setdefault(name.rpartition(".")[0], []).append(index)
    found = []
    for index, (name, shape) in enumerate(zip(names, matched.shapes, strict=True)):
        if 0 in shape:
            continue
        module, _, last = name.rpartition(".")
        siblings = by_module[module]
        is_module = (
            last in ("weight", "bias")
            and module not in outer
            and not linear.intersection(siblings)
            and all(dtypes[other] in FLOAT_DTYPES for other in siblings)
        )
        holders = tuple(siblings) if is_module else (index,)
        is_kept = dtypes[index] in FLOAT_DTYPES and index not in stacked
        if recipe.skip_others or index in linear or not is_kept:
            holders = ()
        num_rows = shape[0] if shape else 1
        num_columns = math.prod(shape[1:])
        each = Difference(
            name=matched.names[index],
            rows=tuple(int(rows[index]) for rows in matched.rows),
            weights=weights[int(resolved.rows[index])],
            num_rows=num_rows,
            num_columns=num_columns,
            most_rank=min(recipe.rank or 0, num_rows, num_columns) if index in linear else 0,
            is_transposed=is_transposed(module, types),
            is_refused=index not in linear and not holders and not recipe.skip_others,
        )
        found.append(_Parameter(index, name, each, holders, is_module))
    return found


def _largest(parameters: Sequence[_Parameter]) -> FactorResults:
    """Return the results of which the largest adapter would be made."""
    records, factors = {}, []
    for parameter in parameters:
        each = parameter.each
        norm = 0.0 if each.is_refused or not (each.most_rank or parameter.holders) else 1.0
        records[each.name] = FactorRecord(each.name, each.most_rank, norm, 0.0)
        if each.most_rank:
            shapes = ((each.most_rank, each.num_columns), (each.num_rows, each.most_rank))
            factors.append(StoredFactor(each.name, shapes, 0))
    file = FactorFile(SourceFile("", 0), tuple(factors), "")
    return FactorResults(records, file, (), 0)


def _stored(model: Source, factored: Sequence[_Parameter], known: FactorResults) -> StoredFactors:
    """Return the factors as an adapter's tensors."""
    factors = {each.name: each for each in known.file.factors}
    tensors = [
        tensor
        for each in factored
        for tensor in factors[each.each.name].tensors(matrix_names(each.module))
    ]
    return StoredFactors(model, known.file.file, tensors)
