"""A quantised model before it is decoded: its tensors by name, and what its config declares."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardmix.dtypes import DTYPES
from shardmix.errors import SourceError
from shardmix.formats.tensor_table import TensorTable

MAX_BLOCK = 1 << 16
"""The longest block along an axis that a config may declare; those in use have 16 to 1,024."""


class Stored:
    """The tensors of a model, by name."""

    def __init__(self, tensors: TensorTable, integers: Callable[[int], tuple[int, ...]]) -> None:
        self.tensors = tensors
        self._row_of = {name: row for row, name in enumerate(tensors.names)}
        self._ranks: list[int] = tensors.dtype_ranks.tolist()
        self.integers = integers
        """Reads a tensor of a few integers, such as a shape."""

    def row(self, name: str) -> int | None:
        """Return a tensor's row, or None if there is none of that name."""
        return self._row_of.get(name)

    def dtype(self, row: int) -> str:
        """Return a tensor's safetensors dtype."""
        return DTYPES[self._ranks[row]]

    def shape(self, row: int) -> tuple[int, ...]:
        """Return a tensor's shape as stored."""
        return self.tensors.shapes[row]

    def told(self, row: int) -> str:
        """Return a tensor's name, dtype and shape, for messages."""
        return f"{self.tensors.names[row]} ({self.dtype(row)} {list(self.shape(row))})"

    def of_dtypes(self, *dtypes: str) -> Iterator[tuple[int, str]]:
        """Yield row and name of each tensor with one of these dtypes."""
        ranks = {DTYPES.index(dtype) for dtype in dtypes}
        for row, rank in enumerate(self._ranks):
            if rank in ranks:
                yield row, self.tensors.names[row]


@dataclass(frozen=True, slots=True)
class Declared:
    """The quantisation that a config declares. A model may have layers of several kinds."""

    method: str
    """The method's name; "" if it names none."""
    blocks: tuple[tuple[int, int], ...] = ()
    """Rows and columns of blocks that share a scale."""
    group_sizes: tuple[int, ...] = ()
    """Columns that share a scale."""
    bits: tuple[int, ...] = ()
    """Widths of integers."""
    has_zero_points: bool | None = None
    """True if all layers have zero points, False if none has; None if it does not say."""


def read_declaration(quantisation: Mapping[str, Any]) -> Declared:
    """Return the statements of a `quantization_config`.

    Raises `SourceError` if a size in it is none.
    """
    method = quantisation.get("quant_method")
    blocks, sizes, bits, zeros = [], [], [], []
    if quantisation.get("weight_block_size") is not None:
        blocks.append(_block("weight_block_size", quantisation["weight_block_size"]))
    if quantisation.get("transform_config"):
        raise SourceError(
            "config.json says that the model's weights are transformed before they are quantised "
            "(transform_config), and the transforms are not undone here",
            remedy="merge the unquantised checkpoint",
        )
    groups = quantisation.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        prefix = f"config_groups.{name}.weights"
        if weights.get("block_structure") is not None:
            blocks.append(_block(f"{prefix}.block_structure", weights["block_structure"]))
        size = weights.get("group_size")
        if size is not None and size != -1:  # -1 is one group in older versions
            sizes.append(_size(f"{prefix}.group_size", size, MAX_BLOCK))
        if weights.get("num_bits") is not None and weights.get("type") != "float":
            bits.append(_size(f"{prefix}.num_bits", weights["num_bits"], 64))
        zeros.append(weights.get("symmetric") is False)
    return Declared(
        str(method or ""),
        blocks=tuple(dict.fromkeys(blocks)),
        group_sizes=tuple(dict.fromkeys(sizes)),
        bits=tuple(dict.fromkeys(bits)),
        has_zero_points=zeros[0] if len(set(zeros)) == 1 else None,
    )


def _block(key: str, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise SourceError(
            f"config.json says {key} is {_shown(value)}; it must be rows and columns, such as "
            "[128, 128]",
            remedy="correct it there",
        )
    rows, columns = (_size(key, length, MAX_BLOCK) for length in value)
    return rows, columns


def _size(key: str, value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise SourceError(
            f"config.json says {key} is {_shown(value)}; it must be whole, from 1 to {most:,}",
            remedy="correct it there",
        )
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
