"""The plan of an output that is a LoRA adapter.

Adapters on one base are put side by side, exactly, or reduced to a rank by their matrices alone.
What other models changed in a base is approximated by factors of a rank. Factors are computed
before the adapter can be laid out: until then the plan is that of the largest adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from shardmix._typing import Unpack
from shardmix.conventions.declarations import declaration_of
from shardmix.conventions.peft_output import (
    Wrapped,
    config_content,
    model_types,
    task_of,
    tied_names,
    value_name,
)
from shardmix.errors import SourceError
from shardmix.options import RunSettings
from shardmix.plan.adapter_extraction import plan_extraction
from shardmix.plan.adapter_layout import (
    METHOD,
    AdapterLayout,
    assembled,
    base_name,
    common,
    out_dtype,
)
from shardmix.plan.adapter_stacking import StackedGroup, Stacking, saved_modules
from shardmix.plan.factor_results import FactorResults
from shardmix.plan.factoring import Factoring, Product, check_rank, fitted
from shardmix.plan.merge_plan import MergePlan
from shardmix.plan.opening import OpenedModels
from shardmix.plan.outcome import Outcome
from shardmix.plan.planned_sources import planned_sources
from shardmix.recipe import Recipe
from shardmix.recipe.parameters import ResolvedParameters, resolve_parameters
from shardmix.sources.adapted import AdaptedSource
from shardmix.sources.base import Source
from shardmix.sources.stacked_adapters import StackedAdapters, StackedTensor
from shardmix.sources.stored_factors import StoredFactors


def plan_adapter(
    recipe: Recipe,
    opened: OpenedModels,
    settings: RunSettings,
    factors: FactorResults | None,
    **outcome: Unpack[Outcome],
) -> MergePlan:
    """Plan an adapter of what models changed in their base.

    Without a rank it is exact, and all models must be adapters. `factors` are those of a rank, once
    they are computed. Raises `SourceError` if a model is no adapter on the base, or changes it in a
    way that no sum of matrices does; `MismatchError` if models do not fit; `BudgetError` if factors
    do not fit into the budget.
    """
    base, *models = opened.sources
    if isinstance(base, AdaptedSource):
        raise SourceError(
            "has an adapter itself; the base of an adapter is a model that others can load",
            subject=base.text,
            remedy="merge it first, or name the model below it with --base-model",
        )
    if recipe.rank is not None and not all(_is_stackable(model, base) for model in models):
        return plan_extraction(recipe, opened, settings, factors, **outcome)
    return _plan_stacked(recipe, opened, settings, factors, **outcome)


def _is_stackable(model: Source, base: Source) -> bool:
    """Return True if a model is made of the base by sums of matrices and whole values only."""
    if not isinstance(model, AdaptedSource):
        return False
    if any(c.magnitude is not None or c.tokens is not None for c in model.changes.values()):
        return False
    return model.base.identity == base.identity or _is_stackable(model.base, base)


def _plan_stacked(
    recipe: Recipe,
    opened: OpenedModels,
    settings: RunSettings,
    factors: FactorResults | None,
    **outcome: Unpack[Outcome],
) -> MergePlan:
    base, *models = opened.sources
    resolved = resolve_parameters(recipe, base.tensors.names)
    rows: list[int] = resolved.rows.tolist()
    stacking = Stacking(base, rows, [METHOD.weights(params) for params in resolved.groups])
    for number, model in enumerate(models):
        for adapted in _adapted(model, base):
            stacking.add(number, adapted)
    groups, biases = stacking.stacked()
    saved, has_biases = saved_modules(stacking.values, base.tensors, stacking.value_names)
    copies = tied_names(
        [*stacking.value_names.values(), *base.tensors.names],
        declaration_of(base.config, base.folder),
        base.config,
    )
    shared = [name for row in stacking.values for name in copies.get(stacking.value_names[row], ())]
    saved += [name.rpartition(".")[0] for name in shared]
    factoring = _factoring(recipe, groups, settings, factors)
    layout = _layout(recipe, opened, stacking, groups, biases, resolved, copies, factors)
    content = config_content(
        _wrapped(groups, factors),
        saved=saved,
        names=base.tensors.names,
        base=base_name(base, stacking.adapters, record_paths=outcome.get("record_paths", False)),
        revision=base.identity.commit,
        task_type=common(adapter.config.task_type for adapter in stacking.adapters)
        or task_of(base.config),
        model_types=model_types(base.config),
        has_bias=bool(biases),
        saves_values=has_biases,
        is_tied=bool(shared),
    )
    low_rank = None
    if factors is not None:
        whole = (base.tensors.names[row] for row in stacking.values)
        low_rank = factors.facts(factors.records.values(), whole=whole)
    return assembled(
        recipe,
        settings,
        layout.planned,
        layout.shard(),
        resolved.groups,
        base,
        content,
        tuple(dict.fromkeys(note for model in opened.sources for note in model.warnings)),
        factoring=factoring,
        low_rank=low_rank,
        **outcome,
    )


def _adapted(model: Source, base: Source) -> Iterator[AdaptedSource]:
    """Yield a model and those that it is made of, from the base up, each with an adapter more."""
    if isinstance(model, AdaptedSource):
        if model.base.identity != base.identity:
            yield from _adapted(model.base, base)
        yield model
        return
    raise SourceError(
        f"is not an adapter on {base.text}; what adapters hold is put side by side",
        subject=model.text,
        remedy=f"give it as {base.text}+ADAPTER, or give --rank to approximate what it changed",
    )


def _layout(
    recipe: Recipe,
    opened: OpenedModels,
    stacking: Stacking,
    groups: Sequence[StackedGroup],
    biases: Sequence[StackedTensor],
    resolved: ResolvedParameters,
    copies: Mapping[str, Sequence[str]],
    factors: FactorResults | None,
) -> AdapterLayout:
    """Return the output's tensors: matrices, factors in place of some, biases, whole values."""
    model = opened.sources[-1]
    planned, (numbers,) = planned_sources(opened.sources, [tuple(opened.sources)])
    if not stacking.values:  # the models themselves are not read
        planned = tuple(replace(each, decoders=()) for each in planned)
    layout = AdapterLayout(recipe, opened.sources, planned, numbers, resolved.groups)
    known = {} if factors is None else {each.name: each for each in factors.file.factors}
    exact = [group for group in groups if group.wrapped.name not in known]
    stacked = [each for group in exact for each in (group.a, group.b)]
    if stacked or biases:
        layout.add_source(StackedAdapters(model, stacking.adapters, (*stacked, *biases)))
    if factors is not None and known:
        tensors = [
            tensor
            for group in groups
            if group.wrapped.name in known
            for tensor in known[group.wrapped.name].tensors((group.a.name, group.b.name))
        ]
        layout.add_source(StoredFactors(model, factors.file.file, tensors))
    wrapped = {group.wrapped.name for group in groups if not group.wrapped.is_parameter}
    for row, dtype in stacking.values.items():
        own = stacking.value_names[row]
        for name in (own, *copies.get(own, ())):
            rows, group = [row] * len(opened.sources), int(resolved.rows[row])
            layout.add_value(value_name(name, wrapped), rows, group, dtype)
    return layout


def _wrapped(groups: Sequence[StackedGroup], factors: FactorResults | None) -> list[Wrapped]:
    records = {} if factors is None else factors.records
    return [
        group.wrapped._replace(rank=records[group.wrapped.name].rank)
        if group.wrapped.name in records
        else group.wrapped
        for group in groups
    ]


def _factoring(
    recipe: Recipe,
    groups: Sequence[StackedGroup],
    settings: RunSettings,
    factors: FactorResults | None,
) -> Factoring | None:
    """Return the matrices that must be reduced to the recipe's rank; None if they are known."""
    if recipe.rank is None or factors is not None:
        return None
    products, numbers = [], [2 * number for number in range(len(groups))]
    for number, group in zip(numbers, groups, strict=True):
        product = Product(
            name=group.wrapped.name,
            a=number,
            b=number + 1,
            shape_a=group.a.shape,
            shape_b=group.b.shape,
            num_stacked=group.num_stacked,
            most_rank=0,
        )
        most = min(recipe.rank, product.rank, *product.sides)
        products.append(replace(product, most_rank=most))
    check_rank(recipe.rank, [min(product.sides) for product in products])
    reduced = tuple(
        each for each in products if each.rank > each.most_rank or recipe.energy is not None
    )
    if not reduced:
        return None
    return fitted(
        Factoring(recipe.rank, recipe.energy, out_dtype(recipe), products=reduced), settings
    )
