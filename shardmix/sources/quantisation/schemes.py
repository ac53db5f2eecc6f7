"""The table of schemes, and the tensors that none of them explains."""

from collections.abc import Callable, Iterator, Sequence

from shardmix.errors import SourceError
from shardmix.sources.quantisation import experts, fp4, fp8, integers
from shardmix.sources.quantisation.coded import FETCH, CodedTensor
from shardmix.sources.quantisation.stored import Declared, Stored

SCHEMES: tuple[Callable[[Stored, Declared], Iterator[CodedTensor]], ...] = (
    fp8.find,
    fp4.find,
    experts.find,
    integers.find,
)
"""Functions that find the tensors of one scheme; a tensor has one scheme at most."""

# Scales of what is computed while the model runs: the unquantised model has none.
_OF_ACTIVATIONS = frozenset(
    (
        *("input_scale", "output_scale", "activation_scale", "input_scale_ub"),
        *("input_zero_point", "output_zero_point", "input_global_scale"),
        *("k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale"),
        *("k_zero_point", "v_zero_point", "q_zero_point", "activation_scale_inv"),
    )
)
_OF_WEIGHTS = (
    *("weight_scale", "_scale_inv", "weight_global_scale", "weight_scale_2"),
    *("weight_zero_point", "weight_shape", "weight_g_idx"),
)


def find_coded(stored: Stored, declared: Declared) -> list[CodedTensor]:
    """Return all quantised tensors of a model. Raises `SourceError` if one is not whole."""
    found: list[CodedTensor] = []
    owner: dict[int, str] = {}
    for scheme in SCHEMES:
        for tensor in scheme(stored, declared):
            for row in tensor.rows:
                if owner.setdefault(row, tensor.name) != tensor.name:
                    raise SourceError(
                        f"{stored.told(row)} belongs to two tensors, {owner[row]} and "
                        f"{tensor.name}",
                        remedy=FETCH,
                    )
            found.append(tensor)
    names = {tensor.name for tensor in found}
    if len(names) != len(found):
        twice = next(name for name in names if sum(each.name == name for each in found) > 1)
        raise SourceError(f"holds {twice} twice, in two quantised forms", remedy=FETCH)
    for tensor in found:
        plain = stored.row(tensor.name)
        if plain is not None and plain != tensor.codes:
            raise SourceError(
                f"holds both {stored.told(plain)} and the codes of it, {stored.told(tensor.codes)}",
                remedy=FETCH,
            )
    return found


def left_over(stored: Stored, claimed: Sequence[bool]) -> Iterator[int]:
    """Yield the rows of scales of activations, which no unquantised model has.

    Raises `SourceError` for codes without scales and for scales without codes.
    """
    for row, name in enumerate(stored.tensors.names):
        if claimed[row]:
            continue
        ending, dtype = name.rpartition(".")[2], stored.dtype(row)
        if ending in _OF_ACTIVATIONS and _is_one_number(stored, row):
            yield row
        elif dtype.startswith(("F8_", "F6_", "F4")):
            raise SourceError(
                f"{stored.told(row)} are codes, and no scales of theirs are known here",
                remedy=FETCH,
            )
        elif ending.endswith(_OF_WEIGHTS) or (ending.endswith("_scales") and dtype == "U8"):
            raise SourceError(
                f"{stored.told(row)} belongs to codes that are not there", remedy=FETCH
            )


def _is_one_number(stored: Stored, row: int) -> bool:
    return all(length == 1 for length in stored.shape(row))
