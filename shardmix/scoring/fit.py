"""The arrangement of a model's forward passes in memory, and its projected size.

    peak = reserved + resident weights + largest unit + waiting passes + the pass that computes

Pure arithmetic on sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardmix.scoring.batches import BatchShape
from shardmix.scoring.model_weights import CHUNK_NBYTES
from shardmix.scoring.objectives import LOGIT_ROWS
from shardmix.scoring.units import SLICE_NBYTES, Grain, Kind, Partition, Unit
from shardmix.system.units import MIB

# Tokens of one pass: enough to keep the processor busy, few enough to stay small in memory.
BEST_TOKENS = {"cpu": 2048, "cuda": 16384}
_LEAST_TOKENS = 128
# Logits of a pass, for each of its tokens on average: 64 MiB for 2048.
_LOGIT_NBYTES = 32 << 10

# Room for thread stacks, allocator slack and the tokenised examples.
_RUN_NBYTES = 64 * MIB
# Matrix libraries repack their inputs, and the allocator rounds up and retains freed memory.
_SLACK = 1.15

# Copies of the hidden states that a pass holds between blocks: itself, a residual, a neighbour
# in an encoder-decoder; and within a block, besides the outputs of its matrices.
_STATES_HELD = 4
_OUTPUTS_HELD = 2
_MATRICES_HELD = 5

# In order of memory for one reading, the least first.
_GRAINS = (Grain.BLOCK, Grain.MODEL, Grain.LEAF)


class NothingFits(Exception):  # noqa: N818 - an outcome, which becomes an error elsewhere
    """No arrangement fits into the available bytes."""

    def __init__(self, least_nbytes: int) -> None:
        super().__init__(f"{least_nbytes} bytes are needed")
        self.least_nbytes = least_nbytes
        """Bytes of the smallest arrangement."""


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes that a model's intermediate results scale with."""

    hidden_size: int
    """Width of its hidden states."""
    num_heads: int
    """Attention heads."""
    holds_attention: bool
    """True if attention matrices of all heads are computed in memory (the "eager"
    implementation)."""
    holds_position_bias: bool
    """True if a matrix a head, of relative positions, is passed from the first block to the
    last."""
    element_nbytes: int
    """Bytes of one value of the dtype that it computes in."""
    vocabulary: int
    """Columns of its logits; 0 if it has none."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The way in which a model is scored."""

    grain: Grain
    """Size of its units."""
    partition: Partition
    """The units."""
    waves: tuple[tuple[BatchShape, ...], ...]
    """Passes that run side by side; the weights are read once a wave."""
    projected_nbytes: int
    """Peak memory of all of it, on top of what the process holds without it."""


def arrange(
    cuts: dict[Grain, Partition],
    shape: Callable[[int, int], tuple[BatchShape, ...]],
    sizes: ModelSizes,
    *,
    available: int,
    best_tokens: int,
    grains: Sequence[Grain] | None = None,
) -> Arrangement:
    """Choose how to score a model within `available` bytes, with one reading of its weights if
    possible.

    `shape` returns the batches for so many tokens and labels a batch. Blocks come first: they take
    the least memory for one reading. If the passes do not all fit beside a block, the whole model
    is loaded if there is room for it. Otherwise it is cut finer, or read more than once. `grains`
    limits the sizes of units.

    Raises `NothingFits`.
    """
    choices = [
        _arrangement(grain, cuts, shapes, sizes, available)
        for grain in grains or _GRAINS
        for shapes in _batchings(shape, sizes, best_tokens)
    ]
    fitting = [choice for choice in choices if choice.projected_nbytes <= available]
    if not fitting:
        raise NothingFits(min(choice.projected_nbytes for choice in choices))
    # The first of those that read least, in the order above.
    return min(fitting, key=lambda choice: len(choice.waves))


def _batchings(
    shape: Callable[[int, int], tuple[BatchShape, ...]], sizes: ModelSizes, best_tokens: int
) -> list[tuple[BatchShape, ...]]:
    """Return the batches for the best size and for ever smaller ones."""
    batchings: list[tuple[BatchShape, ...]] = []
    tokens = best_tokens
    while tokens >= _LEAST_TOKENS:
        # A row of logits takes far more than a token: bound them, too.
        row_nbytes = max(sizes.vocabulary * sizes.element_nbytes, 1)
        batches = shape(tokens, max(LOGIT_ROWS, tokens * _LOGIT_NBYTES // row_nbytes))
        if batches not in batchings:
            batchings.append(batches)
        tokens //= 2
    return batchings


def _arrangement(
    grain: Grain,
    cuts: dict[Grain, Partition],
    shapes: tuple[BatchShape, ...],
    sizes: ModelSizes,
    available: int,
) -> Arrangement:
    partition, block_width = cuts[grain], cuts[Grain.BLOCK].width
    fixed = _RUN_NBYTES + CHUNK_NBYTES + partition.resident_nbytes
    fixed += max(_unit_nbytes(unit) for unit in partition.units)
    fixed += max(_computing_nbytes(shape, sizes, block_width) for shape in shapes)
    room = available / _SLACK - fixed
    is_sliced = any(unit.kind is Kind.SLICES for unit in partition.units)
    waves: list[list[BatchShape]] = [[]]
    held = most_held = 0
    for shape in shapes:
        nbytes = _waiting_nbytes(shape, sizes, 0 if grain is Grain.BLOCK else block_width)
        if is_sliced:
            nbytes += shape.num_labels * sizes.vocabulary * sizes.element_nbytes
        if grain is Grain.MODEL:
            held = 0  # nothing waits: passes run one after the other
        elif waves[-1] and held + nbytes > room:
            waves.append([])
            held = 0
        waves[-1].append(shape)
        held += nbytes
        most_held = max(most_held, held)
    return Arrangement(
        grain=grain,
        partition=partition,
        waves=tuple(map(tuple, waves)),
        projected_nbytes=int((fixed + most_held) * _SLACK),
    )


def _unit_nbytes(unit: Unit) -> int:
    if unit.kind is Kind.WHOLE:
        return unit.weights_nbytes + unit.conversion_nbytes
    return 2 * SLICE_NBYTES if unit.kind is Kind.SLICES else 0


def _computing_nbytes(shape: BatchShape, sizes: ModelSizes, block_width: int) -> int:
    """Return the most bytes of one pass while it computes: in a block, or its logits."""
    size = sizes.element_nbytes
    states = shape.num_tokens * sizes.hidden_size * size * _STATES_HELD
    # Scores, mask, softmax in float32 and its copy; or a mask and its like.
    matrices = sizes.num_heads * _MATRICES_HELD if sizes.holds_attention else 2
    attention = shape.num_cells * matrices * max(size, 4)
    outputs = shape.num_tokens * block_width * size * _OUTPUTS_HELD
    rows = min(shape.num_labels, LOGIT_ROWS)
    logits = shape.num_labels * sizes.vocabulary * size + rows * sizes.vocabulary * 4 * 3
    return states + max(attention + outputs, logits)


def _waiting_nbytes(shape: BatchShape, sizes: ModelSizes, width: int) -> int:
    """Return the bytes of a pass while it waits; within a block, with that block's outputs."""
    states = shape.num_tokens * (sizes.hidden_size * _STATES_HELD + width * _OUTPUTS_HELD)
    matrices = 1 + sizes.num_heads * 2 * sizes.holds_position_bias
    if sizes.holds_attention:
        # Some models return a block's attention, and hold it until the next block returns its
        # own.
        matrices += sizes.num_heads * (_MATRICES_HELD if width else 1)
    return states * sizes.element_nbytes + shape.num_cells * matrices * max(sizes.element_nbytes, 4)
