"""A quantised model, decoded to float32 while it is read.

Its tensors have the names and shapes of the unquantised model; scales are none of them. Outputs
keep the dtype that the config names, or bfloat16. Tensors that are not quantised stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardmix.conventions.naming import DTYPE_KEYS, quantisation_config, without_quantisation
from shardmix.dtypes import DTYPE_RANK, OUT_DTYPES
from shardmix.errors import SourceError
from shardmix.formats.tensor_table import TensorTable
from shardmix.sources.base import Source, TensorReader, WrappedSource
from shardmix.sources.identity import SourceIdentity
from shardmix.sources.quantisation.coded import NONE, CodedTensor
from shardmix.sources.quantisation.schemes import find_coded, left_over
from shardmix.sources.quantisation.stored import Stored, read_declaration
from shardmix.sources.quantised_reader import (
    EXPERTS_NBYTES,
    PIECE_NBYTES,
    QuantisedReader,
    SideRows,
)

METHODS = frozenset(("", "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4"))
"""Values of `quant_method` whose tensors are decoded; "" if a config names none."""


class QuantisedSource(WrappedSource):
    """A source whose quantised tensors are decoded."""

    def __init__(
        self, inner: Source, coded: Sequence[CodedTensor], left_out: Sequence[int]
    ) -> None:
        by_codes = {tensor.codes: tensor for tensor in coded}
        gone = {row for tensor in coded for row in tensor.rows} - by_codes.keys()
        gone.update(left_out)
        rows = [row for row in range(len(inner.tensors)) if row not in gone]
        found = [by_codes.get(row) for row in rows]
        self._codings = tuple(dict.fromkeys(tensor.coding for tensor in coded))
        numbers = {coding: number for number, coding in enumerate(self._codings)}

        def column(values: list[int]) -> npt.NDArray[np.int32]:
            return np.array(values, np.int32)

        self._rows = SideRows(
            np.array([numbers[each.coding] if each else 0 for each in found], np.uint16),
            column(rows),
            column([each.scales if each else NONE for each in found]),
            column([each.tensor_scale if each else NONE for each in found]),
            column([each.zeros if each else NONE for each in found]),
            column([each.order if each else NONE for each in found]),
        )
        super().__init__(inner, _decoded_table(inner, rows, found))
        self._overhead_nbytes = _overhead_nbytes(inner.tensors, coded)

    @property
    def identity(self) -> SourceIdentity:
        """Identity of the inner source, and the codings."""
        decoding = "; ".join(sorted(map(str, self._codings)))
        return replace(self._inner.identity, decoding=decoding)

    @property
    def config(self) -> Mapping[str, Any]:
        """Config without any quantisation."""
        return without_quantisation(self._inner.config)

    def open_reader(self) -> TensorReader:
        """Return a reader that decodes."""
        return QuantisedReader(
            self._inner, self._tensors, self._codings, self._rows, self._overhead_nbytes
        )


def decode_quantised(source: Source) -> Source | None:
    """Return a source with its quantised tensors decoded; None if there are none that are known.

    Raises `SourceError` if the tensors of a known scheme are not whole.
    """
    declared = quantisation_config(source.config)
    if declared is None or str(declared.get("quant_method") or "") not in METHODS:
        return None
    reader = source.open_reader()
    stored = Stored(source.tensors, lambda row: _integers(source.tensors, reader, row))
    try:
        coded = find_coded(stored, read_declaration(declared))
        if not coded:
            return None
        claimed = np.zeros(len(source.tensors), np.bool_)
        claimed[[row for tensor in coded for row in tensor.rows]] = True
        left_out = list(left_over(stored, claimed.tolist()))
    except SourceError as error:
        raise error.of(source.text) from None
    finally:
        reader.close()
    return QuantisedSource(source, coded, left_out)


def _integers(tensors: TensorTable, reader: TensorReader, row: int) -> tuple[int, ...]:
    buffer = bytearray(int(tensors.nbytes[row]))
    reader.read(row, 0, memoryview(buffer))
    dtype = np.int64 if tensors[row].dtype == "I64" else np.int32
    return tuple(np.frombuffer(buffer, dtype).tolist())


def _decoded_table(
    inner: Source, rows: Sequence[int], found: Sequence[CodedTensor | None]
) -> TensorTable:
    """Return the tensors as they are once decoded."""
    table = inner.tensors
    is_coded = np.array([tensor is not None for tensor in found], np.bool_)
    float32, kept = DTYPE_RANK["F32"], DTYPE_RANK[_kept_dtype(inner.config)]
    stored_ranks = table.dtype_ranks[rows]
    shapes = tuple(
        table.shapes[row] if tensor is None else tensor.shape
        for row, tensor in zip(rows, found, strict=True)
    )
    nbytes = table.nbytes[rows]
    nbytes[is_coded] = [4 * _num_elements(tensor.shape) for tensor in found if tensor is not None]
    decoded = TensorTable(
        names=tuple(
            table.names[row] if tensor is None else tensor.name
            for row, tensor in zip(rows, found, strict=True)
        ),
        shapes=shapes,
        dtype_ranks=np.where(is_coded, float32, stored_ranks).astype(np.uint8),
        files=table.files[rows],
        starts=table.starts[rows],
        nbytes=nbytes,
        decoded=None if table.decoded is None else table.decoded[rows],
        kept_ranks=np.where(
            is_coded, kept, stored_ranks if table.kept_ranks is None else table.kept_ranks[rows]
        ).astype(np.uint8),
    )
    return decoded.with_decoded(np.flatnonzero(is_coded))


def _kept_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype of decoded tensors in an output that keeps dtypes."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in DTYPE_KEYS:
            name = str(part.get(key)).removeprefix("torch.")
            if name in OUT_DTYPES:
                return OUT_DTYPES[name]
    return "BF16"


def _num_elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _overhead_nbytes(tensors: TensorTable, coded: Sequence[CodedTensor]) -> int:
    """Return the memory of a reader that decodes these tensors."""
    experts = [
        int(tensors.nbytes[each.codes]) // max(1, each.shape[0])
        for each in coded
        if each.coding.is_transposed
    ]
    # Zero points of all groups of 32 rows as words, bytes and floats; and the order of columns.
    groups = [tensors.shapes[each.scales][-1] for each in coded if each.coding.zero_bits]
    ordered = [
        4 * tensors.shapes[each.scales][-1] + 8 * each.shape[-1]
        for each in coded
        if each.order != NONE
    ]
    return (
        PIECE_NBYTES
        + 2 * min(EXPERTS_NBYTES, max(experts, default=0))  # codes; scales have fewer bytes
        + 512 * max(groups, default=0)
        + max(ordered, default=0)
    )
