"""An adapter's matrices, matched to a base's tensors, as `Change`s. Reads no tensor data.

An adapter that does not fit its base, or contradicts its own config, is refused before a weight is
read. `sources.adapted` applies the changes.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from shardmix.conventions import peft
from shardmix.dtypes import DTYPES, FLOAT_DTYPES
from shardmix.errors import SourceError, listed, shown
from shardmix.sources.adapter_changes import ONES, Change, LowRankPair, MatchedAdapter, Patch, View
from shardmix.sources.adapter_names import BaseNames, Place, Stack
from shardmix.sources.adapters import Adapter
from shardmix.sources.base import Source

_MOST_PARAMETERS = 6


def matched(adapter: Adapter, base: Source) -> MatchedAdapter:
    """Return what an adapter does to a base.

    Raises `SourceError` if the adapter does not fit the base, or contradicts its own config.
    """
    try:
        return _Matching(adapter, base).matched()
    except SourceError as error:
        raise error.of(f"{adapter.text}") from None


@dataclass(slots=True)
class _Pair:
    """The matrices of one module, by kind: rows of the adapter's table."""

    rows: dict[str, int] = field(default_factory=dict)

    def names(self) -> Collection[str]:
        return self.rows.keys()


class _Matching:
    """Matches an adapter's parts to a base's tensors."""

    def __init__(self, adapter: Adapter, base: Source) -> None:
        self._adapter, self._base = adapter, base
        self._config = adapter.config
        self._table = adapter.weights.tensors
        self._names = BaseNames(base)
        self._model_types = _model_types(base.config)
        self._changes: dict[int, Change] = {}
        self._pairs: list[LowRankPair] = []

    def matched(self) -> MatchedAdapter:
        modules: dict[str, dict[int, _Pair]] = {}
        for row, part in enumerate(self._adapter.parts):
            if part.kind == peft.VALUE:
                self._add_value(row, part.module)
            else:
                pair = modules.setdefault(part.module, {}).setdefault(part.depth, _Pair())
                if part.kind in pair.rows:
                    raise SourceError(
                        f"holds {shown(self._table.names[row])} twice, for two adapters",
                        remedy="save one adapter a folder",
                    )
                pair.rows[part.kind] = row
        for module, pairs in modules.items():
            self._add_module(module, pairs)
        if not self._changes:
            raise SourceError("changes nothing: it holds no tensors", remedy="fetch it again")
        return MatchedAdapter(self._changes, tuple(self._pairs))

    # Whole values: modules that were trained as they are.

    def _add_value(self, row: int, name: str) -> None:
        if self._config.is_tied and self._is_copy(name):
            return
        target = self._find(name, name)
        info, value = self._base.tensors[target], self._table[row]
        if info.shape != value.shape:
            rows = "the vocabulary was resized" if info.shape[1:] == value.shape[1:] else ""
            raise SourceError(
                f"replaces {name} {list(info.shape)} by {list(value.shape)}"
                f"{f': {rows}' if rows else ''}; shapes must be the base's",
                remedy="resize the base's embeddings first (resize_token_embeddings) and save it"
                if rows
                else "name the model that it was trained on",
            )
        is_float = value.dtype in FLOAT_DTYPES and info.dtype in FLOAT_DTYPES
        if not is_float and value.dtype != info.dtype:
            raise SourceError(
                f"replaces {name} in {info.dtype} by {value.dtype}; floats are replaced by floats",
                remedy="name the model that it was trained on",
            )
        self._extend(target, name, value=row)

    def _is_copy(self, name: str) -> bool:
        """Return True if a value is that of another one that the base shares, and stores alone."""
        if self._names.find(name) is not None:
            return False
        values = {part.module for part in self._adapter.parts if part.kind == peft.VALUE}
        return any(
            name in names and values.intersection(names) - {name} for names in self._names.shared()
        )

    # Low-rank changes of modules.

    def _add_module(self, module: str, pairs: Mapping[int, _Pair]) -> None:
        for depth in sorted(pairs):
            rows = pairs[depth].rows
            for one, other in (
                (peft.A, peft.B),
                (peft.B, peft.A),
                (peft.EMBEDDING_A, peft.EMBEDDING_B),
                (peft.EMBEDDING_B, peft.EMBEDDING_A),
            ):
                if one in rows and other not in rows:
                    raise SourceError(
                        f"holds {one} of {module} but not its {other}", remedy="fetch it again"
                    )
            if peft.MAGNITUDE in rows and not self._config.has_magnitudes:
                raise SourceError(
                    f"holds DoRA's magnitudes of {module}, but its config says use_dora: false",
                    remedy="fetch it again",
                )
        first = pairs[min(pairs)].rows
        if peft.TOKENS in first:
            self._add_tokens(module, first[peft.TOKENS])
            if len(first) == 1:
                return
        if peft.EMBEDDING_A in first:
            self._add_embedding(module, first)
        elif peft.A in first:
            name = f"{module}.weight"
            is_weight = len(pairs) == 1 and not self._config.target_parameters
            expert = self._names.expert(name) if len(pairs) == 1 else None
            if expert is not None:
                self._add_expert(module, *expert, first)
                return
            target = self._find(name, module) if is_weight else self._names.find(name)
            if len(pairs) == 1 and target is not None:
                self._add_weight(module, f"{module}.weight", target, first)
            else:
                self._add_parameters(module, pairs)
        else:
            kinds = listed(sorted(first))
            raise SourceError(
                f"holds {kinds} of {module}, but not its matrices", remedy="fetch it again"
            )

    def _add_embedding(self, module: str, rows: Mapping[str, int]) -> None:
        name = f"{module}.weight"
        target = self._find(name, module)
        a, b = self._matrix(rows[peft.EMBEDDING_A]), self._matrix(rows[peft.EMBEDDING_B])
        rank = self._rank(module, a[0], b[1])
        shape = self._base.tensors.shapes[target]
        if shape != (a[1], b[0]):
            raise self._misfit(name, shape, a, b)
        # W (n, d) changes by (B·A) transposed: A is (rank, n), and B is (d, rank).
        left = View(rows[peft.EMBEDDING_A], 0, 1, a[1])
        right = View(rows[peft.EMBEDDING_B], 0, 1, rank)
        patch = Patch(0, a[1], rank, left, right, self._config.scaling_of(module))
        self._add_patches(target, name, (patch,), b[0], rows, is_by_column=True)
        ab = rows[peft.EMBEDDING_A], rows[peft.EMBEDDING_B]
        self._add_pair(name, module, ab, [(target, patch)], is_embedding=True)

    def _add_weight(self, module: str, name: str, target: int, rows: Mapping[str, int]) -> None:
        """Add the change of a weight: of a linear layer, a convolution, or stacked matrices."""
        shape = self._base.tensors.shapes[target]
        a, b = self._shape(rows[peft.A]), self._shape(rows[peft.B])
        if len(a) > 2 or len(b) > 2:
            self._add_convolution(module, name, target, rows)
        elif len(shape) == 3:
            self._add_stacked(name, name, target, rows)
        else:
            self._add_linear(module, name, target, rows)
        if peft.BIAS in rows:
            self._add_bias(module, rows[peft.BIAS])
            self._pairs[-1] = self._pairs[-1]._replace(bias=rows[peft.BIAS])

    def _add_linear(self, module: str, name: str, target: int, rows: Mapping[str, int]) -> None:
        shape = self._base.tensors.shapes[target]
        a, b = self._matrix(rows[peft.A]), self._matrix(rows[peft.B])
        rank = self._rank(module, a[0], b[1])
        fits = shape == (b[0], a[1])
        fits_transposed = shape == (a[1], b[0])
        if fits and fits_transposed:
            fits = not self._is_transposed(module)
        if not fits and not fits_transposed:
            raise self._misfit(name, shape, a, b)
        left, right = View(rows[peft.B], 0, rank, 1), View(rows[peft.A], 0, a[1], 1)
        if not fits:
            left, right = View(rows[peft.A], 0, 1, a[1]), View(rows[peft.B], 0, 1, rank)
        patch = Patch(0, shape[0], rank, left, right, self._config.scaling_of(module))
        self._add_patches(target, name, (patch,), shape[1], rows, is_by_column=not fits)
        self._add_pair(name, module, (rows[peft.A], rows[peft.B]), [(target, patch)])

    def _add_expert(
        self, module: str, place: Place, num_columns: int, rows: Mapping[str, int]
    ) -> None:
        """Add the change of one expert, of which the base stores all in one piece."""
        name = f"{module}.weight"
        shape = place.num_rows, num_columns
        a, b = self._matrix(rows[peft.A]), self._matrix(rows[peft.B])
        rank = self._rank(module, a[0], b[1])
        if shape != (b[0], a[1]) or rows.keys() != {peft.A, peft.B}:
            raise self._misfit(name, shape, a, b)
        left, right = View(rows[peft.B], 0, rank, 1), View(rows[peft.A], 0, a[1], 1)
        scaling = self._config.scaling_of(module)
        patch = Patch(place.first_row, place.num_rows, rank, left, right, scaling)
        self._add_patches(place.row, name, (patch,), num_columns, rows)
        self._add_pair(name, module, (rows[peft.A], rows[peft.B]), [(place.row, patch)])

    def _is_transposed(self, module: str) -> bool:
        """Return True if a square weight is stored as (in, out)."""
        if not self._model_types:
            return self._config.fan_in_fan_out
        is_such = not peft.CONV1D_TYPES.isdisjoint(self._model_types)
        return is_such and module.rpartition(".")[2] in peft.CONV1D_MODULES

    def _add_convolution(
        self, module: str, name: str, target: int, rows: Mapping[str, int]
    ) -> None:
        shape = self._base.tensors.shapes[target]
        a, b = self._shape(rows[peft.A]), self._shape(rows[peft.B])
        kernel = shape[2:]
        is_grouped = len(shape) > 2 and (a[0] != b[1] or a[1] != shape[1])
        if is_grouped and a[2:] == kernel and b[0] == shape[0] and b[1] and a[0] % b[1] == 0:
            raise SourceError(
                f"changes {name}, a convolution in groups, by B·A that mixes the groups: no "
                "weight of its shape does the same; PEFT cannot merge it either",
                remedy="train it without this module, or keep it an adapter",
            )
        rank = self._rank(module, a[0], b[1] if len(b) > 1 else 0)
        if (b[0], *a[1:]) != shape or b[2:] != (1,) * len(kernel):
            raise self._misfit(name, shape, a, b)
        columns = math.prod(shape[1:])
        left, right = View(rows[peft.B], 0, rank, 1), View(rows[peft.A], 0, columns, 1)
        patch = Patch(0, shape[0], rank, left, right, self._config.scaling_of(module))
        self._add_patches(target, name, (patch,), columns, rows)
        self._add_pair(name, module, (rows[peft.A], rows[peft.B]), [(target, patch)])

    def _add_bias(self, module: str, row: int) -> None:
        name = f"{module}.bias"
        target = self._find(name, name)
        shape, own = self._base.tensors.shapes[target], self._shape(row)
        if shape != own:
            raise SourceError(
                f"adds {list(own)} to {name} {list(shape)}; shapes must be the same",
                remedy="name the model that it was trained on",
            )
        scaling = self._config.scaling_of(module)
        patch = Patch(0, 1, 1, View(ONES), View(row, 0, 0, 1), scaling)
        self._add_patches(target, name, (patch,), shape[0], {})

    # Parameters that are no module's weight: stacked experts.

    def _add_parameters(self, module: str, pairs: Mapping[int, _Pair]) -> None:
        """Match the matrices of a module's parameters, which only their nesting tells apart."""
        ends = self._config.target_parameters
        targets = [
            (name, row)
            for name, row in (self._names.below(module) | self._names.stacks(module)).items()
            if any(f".{name}".endswith(f".{end}") for end in ends)
        ]
        depths = sorted(pairs, reverse=True)  # the first parameter is wrapped first
        if len(targets) != len(depths) or len(targets) > _MOST_PARAMETERS:
            raise SourceError(
                f"changes {module}, of which {self._base.text} has {len(targets)} of the "
                f"{len(depths)} parameters that it changes",
                remedy="name the model that it was trained on",
            )
        order = {name: number for number, name in enumerate(peft.PARAMETER_ORDER)}
        fitting = [
            [self._fits(self._shape_of(target), pairs[depth].rows) for _, target in targets]
            for depth in depths
        ]
        names = [name.rpartition(".")[2] for name, _ in targets]
        choices = list(_assignments(fitting))
        if len(choices) > 1 and all(name in order for name in names):
            ordered = sorted(range(len(targets)), key=lambda number: order[names[number]])
            choices = [tuple(ordered)] if tuple(ordered) in choices else choices
        if len(choices) != 1:
            problem = "fit none" if not choices else "fit in several ways"
            raise SourceError(
                f"changes {len(depths)} parameters of {module} ({listed(names)}) by matrices that "
                f"{problem}",
                remedy="name the model that it was trained on",
            )
        for depth, number in zip(depths, choices[0], strict=True):
            name, target = targets[number]
            rows = pairs[depth].rows
            if isinstance(target, int) and len(self._shape_of(target)) == 2:
                self._add_linear(name, name, target, rows)
            else:
                self._add_stacked(name, name, target, rows)

    def _shape_of(self, target: "int | Stack") -> tuple[int, ...]:
        return self._base.tensors.shapes[target] if isinstance(target, int) else target.shape

    def _fits(self, shape: Sequence[int], rows: Mapping[str, int]) -> bool:
        """Return True if matrices have the shapes for a parameter."""
        a, b = self._shape(rows[peft.A]), self._shape(rows[peft.B])
        if len(a) != 2 or len(b) != 2 or len(shape) not in (2, 3):
            return False
        sizes = (b[0], a[1])
        return sizes == tuple(shape[-2:]) or sizes == tuple(reversed(shape[-2:]))

    def _add_stacked(
        self, module: str, name: str, target: "int | Stack", rows: Mapping[str, int]
    ) -> None:
        """Add the change of stacked matrices (experts, m, n): B·A of each expert.

        A is (experts · rank, in), expert by expert; B is (out, rank · experts), the experts of each
        column together. Source: `ParamWrapper.get_delta_weight`.
        """
        shape = self._shape_of(target)
        num, m, n = shape
        a, b = self._matrix(rows[peft.A]), self._matrix(rows[peft.B])
        if peft.MAGNITUDE in rows or peft.BIAS in rows:
            raise SourceError(
                f"holds magnitudes or a bias of {name}, of which PEFT makes none",
                remedy="fetch it again",
            )
        if num < 1 or a[0] % num:
            raise self._misfit(name, shape, a, b)
        rank = self._rank(module, a[0] // num, b[1] // num)
        fits, fits_transposed = (m, n) == (b[0], a[1]), (n, m) == (b[0], a[1])
        if fits and fits_transposed:
            fits = peft.TRANSPOSED_EXPERTS.isdisjoint(self._model_types)
        if b[1] != num * rank or not (fits or fits_transposed):
            raise self._misfit(name, shape, a, b)
        scaling = self._config.scaling_of(module)
        patches = []
        for expert in range(num):
            of_a = View(rows[peft.A], expert * rank * a[1], a[1], 1)
            of_b = View(rows[peft.B], expert, num * rank, num)
            if not fits:
                of_a, of_b = (
                    of_a._replace(row_step=1, column_step=a[1]),
                    of_b._replace(row_step=num, column_step=num * rank),
                )
            left, right = (of_b, of_a) if fits else (of_a, of_b)
            patches.append(Patch(expert * m, m, rank, left, right, scaling))
        ab = rows[peft.A], rows[peft.B]
        if isinstance(target, int):
            self._add_patches(target, name, tuple(patches), n, rows)
            placed = [(target, patch) for patch in patches]
            self._add_pair(name, module, ab, placed, num_stacked=num)
            return
        first, placed = 0, []
        for place in target.places:
            cut = tuple(_cut(patches[first // m], first % m, place.num_rows, place.first_row))
            self._add_patches(place.row, name, cut, n, {})
            placed += [(place.row, patch) for patch in cut]
            first += place.num_rows
        self._add_pair(name, module, ab, placed, num_stacked=num)

    def _add_pair(
        self,
        name: str,
        module: str,
        ab: tuple[int, int],
        placed: Sequence[tuple[int, Patch]],
        *,
        is_embedding: bool = False,
        num_stacked: int = 1,
    ) -> None:
        """Note matrices as they are stored, and the rows that they change."""
        part = self._adapter.parts[ab[0]]
        self._pairs.append(
            LowRankPair(
                name=name,
                module=part.module,
                depth=part.depth,
                a=ab[0],
                b=ab[1],
                is_embedding=is_embedding,
                num_stacked=num_stacked,
                rank=placed[0][1].rank,
                scaling=placed[0][1].scaling,
                places=tuple((row, patch.first_row, patch.num_rows) for row, patch in placed),
            )
        )

    # Rows of embeddings.

    def _add_tokens(self, module: str, row: int) -> None:
        name = f"{module}.weight"
        target = self._find(name, module)
        indices = self._config.token_indices
        rows = next(
            (
                rows
                for end, rows in indices.items()
                if not end or module == end or module.endswith(f".{end}")
            ),
            None,
        )
        shape, own = self._base.tensors.shapes[target], self._shape(row)
        if rows is None or len(shape) != 2 or own != (len(rows), shape[1]):
            raise SourceError(
                f"replaces rows of {name} {list(shape)} by {list(own)}, which are not those that "
                "its config lists in trainable_token_indices",
                remedy="fetch it again",
            )
        if max(rows, default=0) >= shape[0]:
            raise SourceError(
                f"replaces row {max(rows)} of {name}, which has {shape[0]}",
                remedy="name the model that it was trained on, with its vocabulary resized alike",
            )
        self._check_float(target, name)
        self._extend(target, name, tokens=row, token_rows=rows, num_columns=shape[1])

    # Common to all.

    def _add_patches(
        self,
        target: int,
        name: str,
        patches: tuple[Patch, ...],
        num_columns: int,
        rows: Mapping[str, int],
        *,
        is_by_column: bool = False,
    ) -> None:
        self._check_float(target, name)
        most = max(patches[0].num_rows, num_columns)
        if patches[0].rank > most:
            raise SourceError(
                f"changes {name} {list(self._base.tensors.shapes[target])} by matrices of rank "
                f"{patches[0].rank}, beyond the matrix itself",
                remedy="fetch it again",
            )
        magnitude = rows.get(peft.MAGNITUDE)
        if self._config.has_magnitudes and magnitude is None and rows:
            raise SourceError(
                f"lacks DoRA's magnitudes of {name}, which its config asks for (use_dora)",
                remedy="fetch it again",
            )
        if magnitude is not None:
            count = num_columns if is_by_column else patches[0].num_rows
            if math.prod(self._shape(magnitude)) != count:
                raise SourceError(
                    f"has {list(self._shape(magnitude))} magnitudes for {name}; DoRA has {count}",
                    remedy="fetch it again",
                )
        self._extend(
            target,
            name,
            patches=patches,
            num_columns=num_columns,
            magnitude=magnitude,
            is_by_column=is_by_column,
        )

    def _extend(self, target: int, name: str, **fields: Any) -> None:
        """Add fields to a tensor's change. Raises `SourceError` if it has one of them already."""
        change = self._changes.get(target)
        if change is None:
            change = Change(num_columns=max(1, math.prod(self._base.tensors.shapes[target][1:])))
        patches = sorted((*change.patches, *fields.get("patches", ())), key=lambda each: each[0])
        overlap = any(
            one.first_row + one.num_rows > other.first_row for one, other in pairwise(patches)
        )
        is_twice = any(
            key in fields and getattr(change, key) is not None for key in ("value", "tokens")
        )
        if overlap or is_twice:
            raise SourceError(
                f"changes {name} twice", remedy="check that it is the adapter of one model"
            )
        self._changes[target] = replace(change, **fields | {"patches": tuple(patches)})

    def _find(self, name: str, what: str) -> int:
        """Return the base's row of a tensor. Raises `SourceError` if it has none."""
        row = self._names.find(name)
        if row is not None:
            return row
        trained = self._config.base_model
        by = f" (it was trained on {shown(trained)})" if trained else ""
        raise SourceError(
            f"changes {what}, and {self._base.text} has no {name}{by}",
            remedy="name the model that it was trained on, saved with all that it changes",
        )

    def _check_float(self, target: int, name: str) -> None:
        dtype = DTYPES[self._base.tensors.dtype_ranks[target]]
        if dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"changes {name}, which {self._base.text} stores in {dtype}; it is quantised, or "
                "no weight",
                remedy="name the unquantised model",
            )

    def _shape(self, row: int) -> tuple[int, ...]:
        info = self._table[row]
        if info.dtype not in FLOAT_DTYPES:
            raise SourceError(
                f"{info.name} is {info.dtype}; an adapter's matrices are floats of 16 bits or more",
                remedy="save it without quantisation",
            )
        return info.shape

    def _matrix(self, row: int) -> tuple[int, int]:
        shape = self._shape(row)
        if len(shape) != 2 or 0 in shape:
            raise SourceError(
                f"{self._table.names[row]} is {list(shape)}, no matrix; it may be a part that a "
                "trainer did not gather before it saved",
                remedy="save it again with all shards gathered",
            )
        return shape[0], shape[1]

    def _rank(self, module: str, of_a: int, of_b: int) -> int:
        """Return the rank of a module, on which its matrices and the config agree."""
        if of_a != of_b:
            raise SourceError(
                f"A of {module} has rank {of_a}, and B {of_b}; they must be the same",
                remedy="fetch it again",
            )
        rank = self._config.rank_of(module)
        if of_a != rank:
            raise SourceError(
                f"the matrices of {module} have rank {of_a}, and its config says {rank}",
                remedy="fetch config and weights again: they are not of one adapter",
            )
        return rank

    def _misfit(
        self, name: str, shape: Sequence[int], a: Sequence[int], b: Sequence[int]
    ) -> SourceError:
        return SourceError(
            f"B {list(b)} · A {list(a)} does not fit {name} {list(shape)} of {self._base.text}",
            remedy="name the model that it was trained on",
        )


def _cut(patch: Patch, start: int, num_rows: int, first_row: int) -> Iterator[Patch]:
    """Yield the part of a patch that changes `num_rows` of its rows, moved to `first_row`."""
    left = patch.left._replace(start=patch.left.start + start * patch.left.row_step)
    yield patch._replace(first_row=first_row, num_rows=num_rows, left=left)


def _assignments(fitting: Sequence[Sequence[bool]]) -> Iterator[tuple[int, ...]]:
    """Yield each way to give every row of a square table a column of its own that is True there."""
    if not fitting:
        yield ()
        return
    for column, fits in enumerate(fitting[0]):
        if fits:
            rest = [[*row[:column], False, *row[column + 1 :]] for row in fitting[1:]]
            for others in _assignments(rest):
                yield (column, *others)


def _model_types(config: Mapping[str, object]) -> frozenset[str]:
    """Return the types of a model and of its parts."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return frozenset(str(part["model_type"]) for part in parts if part.get("model_type"))
