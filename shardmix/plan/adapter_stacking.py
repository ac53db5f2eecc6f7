"""Adapters on one base put side by side, parameter by parameter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from shardmix.conventions import peft
from shardmix.conventions.peft_output import Wrapped, bias_name, matrix_names
from shardmix.dtypes import DTYPES
from shardmix.errors import SourceError, listed
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.adapted import AdaptedSource
from shardmix.sources.adapter_changes import Change, LowRankPair
from shardmix.sources.adapters import Adapter
from shardmix.sources.base import Source
from shardmix.sources.stacked_adapters import COLUMNS, ROWS, SUM, StackedPart, StackedTensor


@dataclass(slots=True)
class _Group:
    """The matrices of all adapters for one parameter."""

    pair: LowRankPair
    """Those of the first adapter, which give the name."""
    parts: list[tuple[int, LowRankPair, float]] = field(default_factory=list)
    """Index of the adapter, its matrices, and their factor."""


@dataclass(frozen=True, slots=True)
class StackedGroup:
    """All matrices for one parameter, side by side."""

    wrapped: Wrapped
    """The module or parameter that is wrapped, with the sum of ranks."""
    a: StackedTensor
    """A."""
    b: StackedTensor
    """B."""
    num_stacked: int
    """Number of matrices that the parameter stacks."""


class Stacking:
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

    def stacked(self) -> tuple[list[StackedGroup], list[StackedTensor]]:
        """Return the matrices of each parameter, and what is added to biases.

        Raises `SourceError` if there are none.
        """
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
        found = []
        for group in groups:
            pair = group.pair
            is_parameter = pair.num_stacked > 1 or not pair.name.endswith(".weight")
            rank = sum(own.rank for _, own, _ in group.parts)
            wrapped = Wrapped(pair.name if is_parameter else pair.module, rank, is_parameter)
            a, b = self._matrices(group, rank, depths.get(pair.name, 0))
            found.append(StackedGroup(wrapped, a, b, pair.num_stacked))
        return found, list(self._biases(groups))

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


def saved_modules(
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
