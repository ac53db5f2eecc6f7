"""Which tensors of an output hold what a reducer found in a strip: by name, and by leaf.

Only for the rare strip in which something was found.
"""

from collections.abc import Iterator

from shardmix.blocks import Strip, TensorPlaces
from shardmix.digests import LEAF_NBYTES
from shardmix.findings import LeafFindings, combined
from shardmix.reducer import Reducer
from shardmix.safetensors_layout import element_nbytes


def strip_findings(
    strip: Strip, reducer: Reducer, places: TensorPlaces
) -> Iterator[tuple[int, LeafFindings]]:
    """Yield (leaf, findings) for the strip that a reducer has just finished."""
    width = element_nbytes(strip.run.out_dtype)
    first = strip.out_position
    stop = first + strip.num_elements * width
    for leaf in range(first // LEAF_NBYTES, -(-stop // LEAF_NBYTES)):
        start_in_leaf = max(first, leaf * LEAF_NBYTES)
        stop_in_leaf = min(stop, (leaf + 1) * LEAF_NBYTES)
        found = []
        if reducer.disagreeing:
            models = (strip.run.models[source] for source in sorted(reducer.disagreeing))
            found.append(LeafFindings(disagreeing={strip.run.name: tuple(models)}))
        if not reducer.is_finite:
            for name, start, end in places.between(start_in_leaf, stop_in_leaf):
                counts = reducer.count_nonfinite((start - first) // width, (end - first) // width)
                if counts.num_nan or counts.num_inf:
                    triple = (counts.num_nan, counts.num_inf, counts.num_overflowed)
                    found.append(LeafFindings(nonfinite={name: triple}))
        yield leaf, combined(found)
