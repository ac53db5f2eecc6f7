"""The arrangement of passes in memory, on sizes that are told apart in every sum."""

import pytest

from shardmix.scoring.batches import BatchShape, shape_batches
from shardmix.scoring.encoding import EncodedExamples, TokenSequence
from shardmix.scoring.fit import ModelSizes, NothingFits, arrange
from shardmix.scoring.units import Grain, Kind, Partition, Unit
from shardmix.system.units import MIB

SIZES = ModelSizes(
    hidden_size=1021,
    num_heads=7,
    holds_attention=False,
    holds_position_bias=False,
    element_nbytes=2,
    vocabulary=30011,
)


def unit(nbytes, kind=Kind.WHOLE):
    return Unit("u", kind, ("u.weight",), nbytes, 0)


def cuts(*, block=101 * MIB, num_blocks=31, width=9973):
    blocks = (unit(block),) * num_blocks
    return {
        Grain.BLOCK: Partition((), 0, blocks, width),
        Grain.MODEL: Partition((), 0, (unit(block * num_blocks),), width * num_blocks),
        Grain.LEAF: Partition((), 0, (unit(block // 7),) * num_blocks * 7, width),
    }


def batches(num_texts, length):
    """Return what makes batches of so many texts of one length."""
    sequence = TokenSequence({"input_ids": [1] * length}, labels=(1, 2, 3), label_start=1)
    encoded = EncodedExamples(
        (sequence,) * num_texts, (1,) * num_texts, 0, 0, 2048, is_clamped=False, silent=()
    )
    return lambda tokens, labels: shape_batches(encoded, max_tokens=tokens, max_labels=labels)


def arranged(available, *, num_texts=64, length=251, **sizes):
    return arrange(
        cuts(**sizes), batches(num_texts, length), SIZES, available=available, best_tokens=2048
    )


def test_blocks_hold_one_block_and_read_once():
    arrangement = arranged(1 << 40)
    assert arrangement.grain is Grain.BLOCK
    assert len(arrangement.waves) == 1
    assert 101 * MIB < arrangement.projected_nbytes < 31 * 101 * MIB


@pytest.mark.parametrize("extra", [0, 10, 100, 1000])
def test_what_is_projected_fits(extra):
    least = least_nbytes()
    arrangement = arranged(least + extra * MIB)
    assert arrangement.projected_nbytes <= least + extra * MIB


def least_nbytes(**sizes):
    with pytest.raises(NothingFits) as error:
        arranged(1, **sizes)
    return error.value.least_nbytes


def test_least_budget_works_and_less_fails():
    """The least that is named works, and less does not."""
    least = least_nbytes()
    assert arranged(least).projected_nbytes == least
    with pytest.raises(NothingFits):
        arranged(least - 1)


def test_more_memory_never_reads_more():
    """More memory never means more reading."""
    least = least_nbytes(num_texts=2000)
    readings = [
        len(arranged(least + extra * MIB, num_texts=2000).waves) for extra in range(0, 6000, 500)
    ]
    assert readings[0] > 1
    assert readings == sorted(readings, reverse=True)
    assert readings[-1] == 1


def test_fitting_model_is_held_whole():
    """A model that fits whole is held if its passes are too many beside a block."""
    small = {"block": MIB, "num_blocks": 31}
    arrangement = arranged(
        least_nbytes(num_texts=2000, **small) + 80 * MIB, num_texts=2000, **small
    )
    assert arrangement.grain is Grain.MODEL
    assert len(arrangement.waves) == 1


def test_a_budget_below_a_block_cuts_finer():
    budget = 200 * MIB
    assert arranged(budget, num_texts=4, length=31).grain is Grain.LEAF


def test_every_sequence_is_in_a_tight_batch():
    """Every sequence is in one batch, no longer than it must be."""
    lengths = [3, 50, 4, 49, 7, 500, 6]
    sequences = tuple(TokenSequence({"input_ids": [1] * n}, (1,), 1) for n in lengths)
    encoded = EncodedExamples(sequences, (1,) * 7, 0, 0, 2048, is_clamped=False, silent=())
    shapes = shape_batches(encoded, max_tokens=100, max_labels=99)
    assert sorted(n for shape in shapes for n in shape.members) == list(range(7))
    for shape in shapes:
        assert shape.length == max(lengths[n] for n in shape.members)
        assert shape.num_tokens <= 100 or len(shape.members) == 1
    assert sum(shape.num_tokens for shape in shapes) <= sum(lengths) * 1.2


def test_long_texts_leave_short_ones_short():
    """A few long texts do not make many short ones long."""
    lengths = [20] * 40 + [100] * 3
    sequences = tuple(TokenSequence({"input_ids": [1] * n}, (1,), 1) for n in lengths)
    encoded = EncodedExamples(sequences, (1,) * 43, 0, 0, 2048, is_clamped=False, silent=())
    shapes = shape_batches(encoded, max_tokens=100_000, max_labels=1000)
    assert [shape.length for shape in shapes] == [20, 100]


def test_labels_bound_a_batch_too():
    sequences = tuple(TokenSequence({"input_ids": [1] * 9}, (1,) * 5, 4) for _ in range(10))
    encoded = EncodedExamples(sequences, (1,) * 10, 0, 0, 2048, is_clamped=False, silent=())
    shapes = shape_batches(encoded, max_tokens=1000, max_labels=12)
    assert [shape.num_labels for shape in shapes] == [10] * 5
    assert isinstance(shapes[0], BatchShape)
