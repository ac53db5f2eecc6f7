"""A model's weights, by parameter: the stored tensors that make each, and values on demand.

The names in a checkpoint are not always those in the model (prefixes, renamed modules, experts
stored one by one and computed as one). transformers knows the mapping, and is asked. Nothing is
written to disk.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from shardmix.conventions.naming import is_computed_buffer
from shardmix.errors import SourceError
from shardmix.formats.safetensors_layout import TensorInfo
from shardmix.scoring.empty_model import TORCH_DTYPES
from shardmix.sources.base import Source

# Read at a time if the stored dtype or device is not the computing one.
CHUNK_NBYTES = 16 << 20


@dataclass(slots=True)
class _Recipe:
    """The way in which one parameter, or several stored as one, come from stored tensors."""

    target: str
    """Name of the (first) parameter."""
    rows: list[int] = field(default_factory=list)
    """Rows of the source's table, in order."""
    patterns: list[str] = field(default_factory=list)
    """For a conversion: the pattern that each row matched."""
    converter: Any = None
    """transformers' conversion, or None if the one tensor is the parameter."""


class ModelWeights:
    """Reads parameters of one model directly from its shards, and counts the bytes."""

    def __init__(self, source: Source, model: Any) -> None:
        self._source = source
        self._model = model
        self._reader = source.open_reader()
        self._chunk: torch.Tensor | None = None
        self.bytes_read = 0
        self._targets: dict[str, torch.Tensor] = model.state_dict()
        self._recipes = _recipes(source, model, self._targets)
        self._by_name: dict[str, _Recipe] = {}
        for recipe in self._recipes:
            for name in _outputs(recipe):
                self._by_name.setdefault(name, recipe)
        self._share_ties()

    def _share_ties(self) -> None:
        """Let a name without stored tensors use those of the parameter that it is tied to."""
        owners = {
            id(parameter): name
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if name in self._by_name
        }
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            owner = owners.get(id(parameter))
            if name not in self._by_name and owner is not None:
                self._by_name[name] = self._by_name[owner]

    def missing(self) -> list[str]:
        """Return the parameters without stored tensors."""
        return [
            name
            for name, target in self._targets.items()
            if name not in self._by_name and target.device.type == "meta"
        ]

    def unused(self) -> list[str]:
        """Return the stored tensors that no parameter comes from."""
        used = {row for recipe in self._recipes for row in recipe.rows}
        return [
            name
            for row, name in enumerate(self._source.tensors.names)
            if row not in used and not is_computed_buffer(name)
        ]

    def comes_and_goes(self, name: str) -> bool:
        """Return True if this is read from the shards; a buffer may be computed instead."""
        return name in self._by_name or self._targets[name].device.type == "meta"

    def is_plain(self, name: str) -> bool:
        """Return True if the parameter is one stored tensor, of the same shape."""
        recipe = self._by_name.get(name)
        return recipe is not None and recipe.converter is None

    def converted_nbytes(self, names: Sequence[str]) -> int:
        """Return the most room that conversions of these need beside their result."""
        return max(
            (
                self._targets[name].nbytes
                for name in names
                if name in self._by_name and not self.is_plain(name)
            ),
            default=0,
        )

    def prefetch(self, names: Sequence[str]) -> None:
        """Let the system read ahead the stored tensors of these parameters."""
        for recipe in self._unique_recipes(names):
            for row in recipe.rows:
                self._reader.prefetch(row, 0, self._source.tensors[row].num_elements)

    def read(self, names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
        """Return values of the parameters, in the model's dtype; zeros for those without stored
        tensors.

        Raises `SourceError` if stored shapes are not the model's.
        """
        values: dict[str, torch.Tensor] = {}
        for recipe in self._unique_recipes(names):
            if recipe.converter is None:
                values[recipe.target] = self._read_plain(recipe, device)
            else:
                values.update(self._convert(recipe, device))
        result = {}
        for name in names:
            expected = self._targets[name]
            if name not in self._by_name:
                result[name] = torch.zeros(expected.shape, dtype=expected.dtype, device=device)
                continue
            value = values.get(name)
            if value is None:  # tied: under the name that it is stored by
                value = values[self._by_name[name].target]
            self._check_shape(name, value.shape, expected.shape)
            result[name] = value
        return result

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return some rows of a plain matrix [rows, width], in the model's dtype, on the CPU.

        `rows` are sorted and unique; neighbours are read together.
        """
        row = self._by_name[name].rows[0]
        info = self._source.tensors[row]
        self._check_shape(name, info.shape, self._targets[name].shape)
        width = info.num_elements // info.shape[0]
        stored = torch.empty((len(rows), *info.shape[1:]), dtype=self._stored_dtype(info))
        numbers = rows.tolist()
        start = 0
        while start < len(numbers):
            stop = start + 1
            while stop < len(numbers) and numbers[stop] == numbers[stop - 1] + 1:
                stop += 1
            self._read_into(stored[start:stop], row, numbers[start] * width)
            start = stop
        return stored.to(self._targets[name].dtype)

    def close(self) -> None:
        """Close all files."""
        self._reader.close()

    def _read_plain(self, recipe: _Recipe, device: torch.device) -> torch.Tensor:
        row = recipe.rows[0]
        expected = self._targets[recipe.target]
        self._check_shape(recipe.target, self._source.tensors[row].shape, expected.shape)
        return self._read_tensor(row, expected.dtype, device)

    def _convert(self, recipe: _Recipe, device: torch.device) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(recipe.converter)
        dtype = self._targets[recipe.target].dtype
        for row, pattern in zip(recipe.rows, recipe.patterns, strict=True):
            name = self._source.tensors[row].name
            tensor = self._read_tensor(row, dtype, device)
            converter.add_tensor(recipe.target, name, pattern, tensor)
        converted = converter.convert(recipe.target, model=self._model, config=self._model.config)
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }

    def _read_tensor(self, row: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        info = self._source.tensors[row]
        stored_dtype = self._stored_dtype(info)
        if not (stored_dtype.is_floating_point and dtype.is_floating_point):
            dtype = stored_dtype
        value = torch.empty(info.shape, dtype=dtype, device=device)
        if dtype == stored_dtype and device.type == "cpu":
            self._read_into(value, row, 0)
            return value
        flat = value.view(-1)
        step = CHUNK_NBYTES // stored_dtype.itemsize
        for start in range(0, len(flat), step):
            count = min(step, len(flat) - start)
            stored = self._chunk_of(count, stored_dtype)
            self._read_into(stored, row, start)
            flat[start : start + count].copy_(stored)
        return value

    def _chunk_of(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        if self._chunk is None:
            self._chunk = torch.empty(CHUNK_NBYTES, dtype=torch.uint8)
        return self._chunk[: count * dtype.itemsize].view(dtype)

    def _read_into(self, tensor: torch.Tensor, row: int, start: int) -> None:
        if tensor.numel():
            room = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            self._reader.read(row, start, room)
            self.bytes_read += len(room)

    def _stored_dtype(self, info: TensorInfo) -> torch.dtype:
        if info.dtype not in TORCH_DTYPES:
            raise SourceError(
                f"{info.name} is stored as {info.dtype}, which cannot be computed with",
                subject=self._source.text,
                remedy="score the original model",
            )
        return TORCH_DTYPES[info.dtype]

    def _unique_recipes(self, names: Sequence[str]) -> list[_Recipe]:
        found = (self._by_name[name] for name in names if name in self._by_name)
        return list({id(recipe): recipe for recipe in found}.values())

    def _check_shape(self, name: str, stored: Sequence[int], expected: Sequence[int]) -> None:
        if tuple(stored) != tuple(expected):
            raise SourceError(
                f"{name} is stored as {list(stored)}, and its config says {list(expected)}; "
                "weights and config must be of one model",
                subject=self._source.text,
                remedy="fetch both again",
            )


def _recipes(source: Source, model: Any, targets: dict[str, torch.Tensor]) -> list[_Recipe]:
    """Return the sources of the model's parameters, by transformers' own rules for names."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    recipes: dict[str, _Recipe] = {}
    prefix = model.base_model_prefix
    names = source.tensors.names
    for row in sorted(range(len(names)), key=lambda row: _natural(names[row])):
        name = names[row]
        target, pattern = rename_source_key(name, renamings, converters, prefix, targets)
        if target not in targets and name in targets:
            # The rule is for another version of the model: the name is right as it is.
            target, pattern = name, None
        if target not in targets:
            continue  # belongs to a part that this type of model does not have
        recipe = recipes.setdefault(
            target, _Recipe(target, converter=by_pattern[pattern] if pattern else None)
        )
        if pattern is not None:
            recipe.rows.append(row)
            recipe.patterns.append(pattern)
        elif not recipe.rows:
            recipe.rows.append(row)
    return list(recipes.values())


def _outputs(recipe: _Recipe) -> list[str]:
    """Return the parameters that a recipe makes: one, or all that a conversion splits into."""
    if recipe.converter is None:
        return [recipe.target]
    first, *others = recipe.converter.target_patterns
    return [recipe.target, *(recipe.target.replace(first, other) for other in others)]


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts numbers in names by value: experts are stacked in that order."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)
