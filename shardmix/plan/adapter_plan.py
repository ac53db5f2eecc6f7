"""The plan of an output that is a LoRA adapter: the changes of adapters on one base, side by side.

An adapter is one file and its config. Its matrices are made of the adapters' own; modules that some
of them replace as a whole are merged as in any model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from shardmix._typing import Unpack
from shardmix.conventions import peft
from shardmix.conventions.peft_output import (
    Wrapped,
    bias_name,
    config_content,
    matrix_names,
    task_of,
    value_name,
)
from shardmix.dtypes import DTYPES, FLOAT_DTYPES, OUT_DTYPES, WIDE_DTYPES, element_nbytes
from shardmix.errors import SourceError, listed
from shardmix.formats.safetensors_layout import HEADER_LENGTH_NBYTES, encode_header
from shardmix.formats.tensor_table import TensorTable
from shardmix.methods import passthrough, task_arithmetic
from shardmix.methods.base import Params
from shardmix.methods.task_arithmetic import TaskArithmetic
from shardmix.options import RunSettings
from shardmix.plan.backend_choice import decide
from shardmix.plan.layout import FileNumbers
from shardmix.plan.memory_budget import plan_memory
from shardmix.plan.merge_plan import (
    MergePlan,
    OutputModules,
    OutputShard,
    PlannedSource,
    Segment,
    SegmentSource,
)
from shardmix.plan.opening import OpenedModels
from shardmix.plan.outcome import Outcome
from shardmix.plan.planned_sources import planned_sources, reader_memory
from shardmix.recipe import Recipe
from shardmix.recipe.parameters import resolve_parameters
from shardmix.recipe.recipe import KEEP
from shardmix.sources.adapted import AdaptedSource
from shardmix.sources.adapters import Adapter, Change, LowRankPair
from shardmix.sources.base import Source
from shardmix.sources.stacked_adapters import (
    COLUMNS,
    ROWS,
    SUM,
    StackedAdapters,
    StackedPart,
    StackedTensor,
)
from shardmix.system.hashing import XXH3
from shardmix.system.page_cache import plan_cache_use

_METHOD = TaskArithmetic()


def plan_adapter(
    recipe: Recipe, opened: OpenedModels, settings: RunSettings, **outcome: Unpack[Outcome]
) -> MergePlan:
    """Plan an adapter with all changes of adapters on one base, its ranks their sums.

    Raises `SourceError` if a model is no adapter on the base, or changes it in a way that no sum of
    matrices does.
    """
    if recipe.rank is not None:
        raise SourceError("is not supported yet", subject="rank", remedy="leave it out")
    base, *models = opened.sources
    if isinstance(base, AdaptedSource):
        raise SourceError(
            "has an adapter itself; the base of an adapter is a model that others can load",
            subject=base.text,
            remedy="merge it first, or name the model below it with --base-model",
        )
    resolved = resolve_parameters(recipe, base.tensors.names)
    weights = [_METHOD.weights(params) for params in resolved.groups]
    stacking = _Stacking(base, resolved.rows.tolist(), weights)
    for number, model in enumerate(models):
        for adapted in _adapted(model, base):
            stacking.add(number, adapted)
    values = stacking.values
    wrapped, stacked = stacking.stacked()
    names = {each.name for each in wrapped if not each.is_parameter}
    saved, biases = _saved(values, base.tensors, stacking.value_names)
    source = StackedAdapters(models[-1], stacking.adapters, stacked)
    planned, (numbers,) = planned_sources(opened.sources, [tuple(opened.sources)])
    if not values:  # the models themselves are not read
        planned = tuple(replace(each, decoders=()) for each in planned)
    planned = (*planned[:-1], replace(planned[-1], decoders=(*planned[-1].decoders, source)))
    layout = _Layout(recipe, opened.sources, numbers, resolved.groups, resolved.rows.tolist())
    stream = sum(len(each.identity.files) for each in planned)
    stream += sum(len(each.decoders) for each in planned) - 1
    layout.add_table(source.tensors, number=len(models), stream=stream)
    for row, dtype in values.items():
        layout.add_value(value_name(stacking.value_names[row], names), row, dtype)
    content = config_content(
        wrapped,
        saved=saved,
        names=base.tensors.names,
        base=_base_name(base, stacking.adapters, record_paths=outcome.get("record_paths", False)),
        revision=base.identity.commit,
        task_type=_common(adapter.config.task_type for adapter in stacking.adapters)
        or task_of(base.config),
        model_types=_model_types(base.config),
        has_bias=any(tensor.way == SUM for tensor in stacked),
        saves_biases=biases,
    )
    notes = tuple(dict.fromkeys(note for model in opened.sources for note in model.warnings))
    return assembled(
        recipe, settings, planned, layout.shard(), resolved.groups, base, content, notes, **outcome
    )


def assembled(
    recipe: Recipe,
    settings: RunSettings,
    planned: tuple[PlannedSource, ...],
    shard: OutputShard,
    parameters: Sequence[Params],
    base: Source,
    content: Mapping[str, object],
    warnings: tuple[str, ...],
    **outcome: Unpack[Outcome],
) -> MergePlan:
    """Return the plan of an adapter, of which everything but the memory is decided."""
    settings = decide(settings, (shard,))
    readers = reader_memory(planned)
    return MergePlan(
        recipe=recipe,
        sources=planned,
        parameters=tuple(parameters),
        digest_algorithm=outcome.get("digest_algorithm", XXH3),
        record_paths=outcome.get("record_paths", False),
        output=str(outcome.get("output") or ""),
        config_source_name=base.public_name,
        config_source_commit=base.identity.commit,
        config_source_folder=str(base.folder.absolute()),
        auxiliary_files=(),
        left_out=(),
        config_dtypes=(),
        untied=(),
        main_subfolder="",
        module_configs=(),
        tokenizer_folder="",
        vocabulary=None,
        modules_folder="",
        modules=OutputModules(),
        adapter_config=json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        shards=(shard,),
        disk_needed_nbytes=shard.file_nbytes,
        settings=settings,
        readers=readers,
        gathering=None,
        memory=plan_memory(
            settings, num_tensors=len(shard.tensor_names), readers=readers, gathering=None
        ),
        cache_use=plan_cache_use(
            read_nbytes=shard.read_nbytes, write_nbytes=shard.file_nbytes, fsync=settings.fsync
        ),
        warnings=warnings,
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


@dataclass(slots=True)
class _Group:
    """The matrices of all adapters for one parameter."""

    pair: LowRankPair
    """Those of the first adapter, which give the name."""
    parts: list[tuple[int, LowRankPair, float]] = field(default_factory=list)
    """Index of the adapter, its matrices, and their factor."""


class _Stacking:
    """Puts adapters' matrices side by side, parameter by parameter of the base."""

    def __init__(
        self, base: Source, rows: Sequence[int], weights: Sequence[tuple[float, ...]]
    ) -> None:
        self._base, self._rows, self._weights = base, rows, weights
        self._groups: dict[tuple[object, ...], _Group] = {}
        self.adapters: list[Adapter] = []
        """All adapters, in order."""
        self.values: dict[int, str] = {}
        """Row of the base's table of each parameter that an adapter replaces → dtype to keep."""
        self.value_names: dict[int, str] = {}
        """Row of the base's table → name of the parameter as an adapter means it."""

    def add(self, model: int, adapted: AdaptedSource) -> None:
        """Add the adapter of a model. Raises `SourceError` if it is no sum of matrices."""
        adapter, number = adapted.adapter, len(self.adapters)
        try:
            for row, change in adapted.changes.items():
                self._check(row, change)
                if change.value is not None and self._weight(row, model):
                    table = adapter.weights.tensors
                    self.values.setdefault(row, DTYPES[table.dtype_ranks[change.value]])
                    self.value_names.setdefault(row, adapter.parts[change.value].module)
        except SourceError as error:
            raise error.of(adapter.text) from None
        self.adapters.append(adapter)
        for pair in adapted.pairs:
            factors = {self._weight(row, model) for row, _, _ in pair.places}
            if len(factors) > 1:
                raise SourceError(
                    f"has several weights for the parts of {pair.name}, which an adapter holds in "
                    "one piece",
                    subject=adapter.text,
                    remedy="give all of it one weight",
                )
            factor = factors.pop() * pair.scaling
            if factor:
                key = pair.places[0], pair.num_stacked, pair.is_embedding
                group = self._groups.setdefault(key, _Group(pair))
                group.parts.append((number, pair, factor))

    def _weight(self, row: int, model: int) -> float:
        return self._weights[self._rows[row]][model]

    def _check(self, row: int, change: Change) -> None:
        name = self._base.tensors.names[row]
        what = None
        if change.magnitude is not None:
            what = f"scales {name} by magnitudes (DoRA, use_dora)"
        elif change.tokens is not None:
            what = f"replaces single rows of {name} (trainable_token_indices)"
        if what is not None:
            raise SourceError(
                f"{what}, which is no sum of matrices that could stand beside another adapter's",
                remedy="merge it into the model instead, without --as-adapter",
            )

    def stacked(self) -> tuple[list[Wrapped], list[StackedTensor]]:
        """Return what the output wraps, and its tensors. Raises `SourceError` if there is none."""
        values = self.values
        groups = [
            group
            for group in self._groups.values()
            if not any(row in values for row, _, _ in group.pair.places)
        ]
        if not groups:
            raise SourceError(
                "no matrix of an adapter has an effect with these weights, so there is nothing to "
                "write",
                remedy="give other weights, or other adapters",
            )
        _refuse_overlaps(groups)
        depths = _depths(groups)
        wrapped: list[Wrapped] = []
        tensors: list[StackedTensor] = []
        for group in groups:
            pair = group.pair
            is_parameter = pair.num_stacked > 1 or not pair.name.endswith(".weight")
            rank = sum(own.rank for _, own, _ in group.parts)
            wrapped.append(Wrapped(pair.name if is_parameter else pair.module, rank, is_parameter))
            tensors += self._matrices(group, rank, depths.get(pair.name, 0))
        tensors += self._biases(groups)
        return wrapped, tensors

    def _matrices(self, group: _Group, rank: int, depth: int) -> Iterator[StackedTensor]:
        pair, stack = group.pair, group.pair.num_stacked
        shapes = [self._shapes(number, own) for number, own, _ in group.parts]
        (a, b), others = shapes[0], shapes[1:]
        for (number, _, _), (other_a, other_b) in zip(group.parts[1:], others, strict=True):
            if a[1:] != other_a[1:] or (b[0], *b[2:]) != (other_b[0], *other_b[2:]):
                raise SourceError(
                    f"stores the matrices of {pair.name} in other shapes than "
                    f"{self.adapters[group.parts[0][0]].text}",
                    subject=self.adapters[number].text,
                    remedy="leave one of them out",
                )
        name_a, name_b = matrix_names(pair.module, is_embedding=pair.is_embedding, depth=depth)
        yield StackedTensor(
            name_a,
            (rank * stack, *a[1:]),
            ROWS,
            tuple(StackedPart(number, own.a) for number, own, _ in group.parts),
            num_blocks=stack,
        )
        yield StackedTensor(
            name_b,
            (b[0], rank * stack, *b[2:]),
            COLUMNS,
            tuple(StackedPart(number, own.b, factor) for number, own, factor in group.parts),
        )

    def _biases(self, groups: Sequence[_Group]) -> Iterator[StackedTensor]:
        """Yield what is added to biases: if any module has some, PEFT wants it of all."""
        if not any(own.bias is not None for group in groups for _, own, _ in group.parts):
            return
        names = set(self._base.tensors.names)
        for group in groups:
            pair = group.pair
            stored = self._base.tensors.names[pair.places[0][0]]
            bias = f"{stored.removesuffix('.weight')}.bias"
            if pair.is_embedding or pair.num_stacked > 1 or bias not in names:
                raise SourceError(
                    f"changes {pair.name}, which has no bias, while another adapter has lora_bias: "
                    "PEFT takes an adapter with biases of all its modules, or of none",
                    subject=self.adapters[group.parts[0][0]].text,
                    remedy="merge them into the model instead, without --as-adapter",
                )
            table = self._base.tensors
            row = table.names.index(bias)
            parts = tuple(
                StackedPart(number, own.bias, factor)
                for number, own, factor in group.parts
                if own.bias is not None and row not in self.values
            )
            yield StackedTensor(bias_name(pair.module), table.shapes[row], SUM, parts)

    def _shapes(self, number: int, pair: LowRankPair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shapes = self.adapters[number].weights.tensors.shapes
        return shapes[pair.a], shapes[pair.b]


def _refuse_overlaps(groups: Sequence[_Group]) -> None:
    """Raise `SourceError` if two adapters change the same rows in pieces of different size."""
    found = sorted(
        (row, first, first + count, number)
        for number, group in enumerate(groups)
        for row, first, count in group.pair.places
    )
    for before, after in pairwise(found):
        if before[0] == after[0] and before[2] > after[1] and before[3] != after[3]:
            names = [groups[each[3]].pair.name for each in (before, after)]
            raise SourceError(
                f"{names[0]} and {names[1]}: are the same weights, which one adapter changes in "
                "one piece and another piece by piece",
                remedy="merge them into the model instead, without --as-adapter",
            )


def _depths(groups: Sequence[_Group]) -> dict[str, int]:
    """Return parameter → number of `base_layer`s in its matrices' names.

    Of several parameters of a module the first is wrapped first, so it lies deepest.
    """
    by_module: dict[str, list[LowRankPair]] = {}
    for group in groups:
        if group.pair.num_stacked > 1 or not group.pair.name.endswith(".weight"):
            module = group.pair.name.rpartition(".")[0]
            by_module.setdefault(module, []).append(group.pair)
    order = {name: number for number, name in enumerate(peft.PARAMETER_ORDER)}
    depths: dict[str, int] = {}
    for module, pairs in by_module.items():
        names = [pair.name.rpartition(".")[2] for pair in pairs]
        if len(pairs) > 1 and not all(name in order for name in names):
            depth = {pair.name: pair.depth for pair in pairs}
            if len(set(depth.values())) < len(pairs):
                raise SourceError(
                    f"{listed(names)} of {module}: their order in PEFT is known only if one "
                    "adapter has them all",
                    remedy="merge them into the model instead, without --as-adapter",
                )
            depths |= depth
            continue
        ordered = sorted(pairs, key=lambda pair: order.get(pair.name.rpartition(".")[2], 0))
        depths |= {pair.name: depth for depth, pair in enumerate(reversed(ordered))}
    return depths


def _saved(
    values: dict[int, str], table: TensorTable, value_names: dict[int, str]
) -> tuple[list[str], bool]:
    """Return the modules that are saved whole, and True if there are single biases as well.

    PEFT takes a module only with all of its parameters, so those that are missing are added.
    """
    rows = {name: row for row, name in enumerate(table.names)}
    saved: dict[str, None] = {}
    has_biases = False
    for row in list(values):
        name = value_names[row]
        module, _, last = name.rpartition(".")
        if last == "bias" and f"{module}.weight" not in value_names.values():
            has_biases = True
            continue
        saved.setdefault(module)
        stored = table.names[row].rpartition(".")[0]
        for other in ("weight", "bias"):
            own = rows.get(f"{stored}.{other}")
            if own is not None and own not in values:
                values[own] = DTYPES[table.dtype_ranks[own]]
                value_names[own] = f"{module}.{other}"
    return list(saved), has_biases


class _Layout:
    """The output's one file: its tensors, and where their values are read."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[Source],
        numbers: Sequence[FileNumbers],
        groups: Sequence[Params],
        rows: Sequence[int],
    ) -> None:
        self._keep = recipe.output_dtype == KEEP
        self._dtype = "" if self._keep else OUT_DTYPES[recipe.output_dtype]
        self._sources, self._numbers = sources, numbers
        self._groups, self._rows = groups, rows
        self._segments: dict[str, Segment] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add_table(self, table: TensorTable, *, number: int, stream: int) -> None:
        """Add all tensors of a stream of decoded tensors, as they are. `number` is the source's."""
        for row, info in enumerate(table):
            own = SegmentSource(number, info.dtype, stream, int(table.starts[row]))
            self._add(info.name, info.shape, info.dtype, passthrough.NAME, 0, (own,), ())

    def add_value(self, name: str, row: int, dtype: str) -> None:
        """Add a parameter of the base as the merged model has it."""
        group = self._rows[row]
        params = self._groups[group]
        dtypes = {DTYPES[source.tensors.dtype_ranks[row]] for source in self._sources}
        is_wide = not WIDE_DTYPES.isdisjoint(dtypes)
        models = _METHOD.contributors(params, is_wide=is_wide)
        own = []
        for number in (0, *(model + 1 for model in models)):
            table, files = self._sources[number].tensors, self._numbers[number]
            file = files.decoded if table.is_decoded(row) else files.first + int(table.files[row])
            info = table[row]
            own.append(SegmentSource(number, info.dtype, file, info.start))
        shape = self._sources[0].tensors.shapes[row]
        factors = _METHOD.factors(params, models, ())
        self._add(name, shape, dtype, task_arithmetic.NAME, group, tuple(own), factors)

    def _add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        method: str,
        parameters: int,
        sources: tuple[SegmentSource, ...],
        factors: tuple[float, ...],
    ) -> None:
        out_dtype = dtype if self._keep or dtype not in FLOAT_DTYPES else self._dtype
        num_elements = int(np.prod(shape, dtype=np.int64))
        self._shapes[name] = shape
        self._segments[name] = Segment(
            name, 1, num_elements, method, parameters, out_dtype, 0, sources, factors
        )

    def shard(self) -> OutputShard:
        """Return the output's file."""
        header = encode_header(
            (
                (name, segment.out_dtype, self._shapes[name])
                for name, segment in self._segments.items()
            ),
            {"format": "pt"},
        )
        segments = tuple(
            replace(self._segments[name], out_offset=offset)
            for name, offset in zip(header.names, header.offsets, strict=False)
            if self._segments[name].num_elements
        )
        return OutputShard(
            filename=peft.WEIGHTS_NAME,
            header=header.encoded[HEADER_LENGTH_NBYTES:].decode(),
            file_nbytes=header.file_nbytes,
            read_nbytes=sum(
                each.num_elements * sum(map(element_nbytes, each.dtypes)) for each in segments
            ),
            tensor_names=header.names,
            segments=segments,
        )


def _base_name(base: Source, adapters: Sequence[Adapter], *, record_paths: bool) -> str:
    """Return the name by which users of an adapter find its base.

    It is no path of this machine, unless paths are recorded.
    """
    if base.identity.hub_id is not None:
        return base.identity.hub_id
    if record_paths:
        return base.path
    return _common(adapter.config.base_model for adapter in adapters) or base.public_name


def _common(texts: Iterator[str]) -> str:
    """Return the text that all are, or ""."""
    found = set(texts)
    return found.pop() if len(found) == 1 else ""


def _model_types(config: Mapping[str, object]) -> set[str]:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return {str(part["model_type"]) for part in parts if part.get("model_type")}
